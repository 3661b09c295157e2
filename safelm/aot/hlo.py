"""Parses the text of a compiled XLA program: its computations, their calls and counts, collectives and products.

XLA's own cost analysis counts the body of a loop once. Here every computation gets the number of times it runs
(`Module.runs`), so that the body of the loop over layers or micro-batches counts as often as it runs.

Shapes are those of one device. A layout's `S(n)` says that a buffer is not in HBM (1: VMEM).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BITS = {"pred": 8, "token": 0}  # the others have their number of bits in their name
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of the program; `memory_space` 0 is HBM."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(re.search(r"\d+", self.dtype)[0])
        return self.num_elements * bits // 8

    @property
    def hbm_bytes(self) -> int:
        return 0 if self.memory_space else self.num_bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program.

    Attributes:
      buffers: the arrays it yields (several for a tuple).
      operands: the names of its inputs.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str  # what stands in the parentheses: the value of a constant, the number of a parameter
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self.buffers)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression that matches in the attributes."""
        match = re.search(pattern, self.attributes)
        return match and match[1]

    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of everything it calls: calls, to_apply, body, condition, branch_computations."""
        found = re.findall(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)", self.attributes)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", self.attributes):
            found += [("branch", name.strip().lstrip("%")) for name in group.split(",")]
        branches = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
        return found + [("branch", name) for name in branches]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, each a list of instructions in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often an update runs each computation that holds work: the entry, loop bodies, branches, calls."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                if instruction.opcode in ("while", "conditional", "call", "async-start"):
                    trips = self.trips(name, instruction) if instruction.opcode == "while" else 1
                    for role, called in instruction.called():
                        if role != "condition":
                            visit(called, times * trips)

        visit(self.entry, 1)
        return counts

    def trips(self, caller: str, loop: Instruction) -> int:
        """A loop's trip count, as XLA states it or from its counter's start, step and bound.

        Raises ValueError for neither.
        """
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        called = {role: self.computations[name] for role, name in loop.called()}
        compare = _root(called["condition"])
        if compare.opcode != "compare" or compare.attribute(r"direction=(\w+)") != "LT":
            raise ValueError(f"the loop {loop.name} has another condition than counter < bound: {compare}")
        counter, bound = (called["condition"][name] for name in compare.operands)
        index = int(counter.attribute(r"index=(\d+)") or 0)
        stop = _constant(called["condition"], bound.name)
        initial = self.computations[caller][loop.operands[0]]
        start = _constant(self.computations[caller], initial.operands[index]) if initial.opcode == "tuple" else 0
        step = _step(called["body"], _root(called["body"]).operands[index])
        if stop is None:
            raise ValueError(f"the bound of the loop {loop.name} is not a constant")
        return max(-(-(stop - (start or 0)) // step), 0)

    def work(self) -> Iterator[tuple[str, int, Instruction]]:
        """(computation, number of runs, instruction) of everything that is run; a fusion is one instruction."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield name, times, instruction


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`. Raises ValueError if it has no entry computation."""
    lines: dict[str, list[str]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = lines.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and _NAME.match(line):
            current.append(line)
        elif current:
            current[-1] += line  # a kernel's metadata has line breaks
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    parsed = {name: [_instruction(line) for line in body] for name, body in lines.items()}
    return Module({name: {i.name: i for i in body} for name, body in parsed.items()}, entry)


def _instruction(line: str) -> Instruction:
    match = _NAME.match(line)
    text = line[match.end() :]
    shape_end = _close(text, 0) if text.startswith("(") else re.match(r"\S+", text).end()
    opcode_end = text.index("(", shape_end)
    end = _close(text, opcode_end)
    arguments = text[opcode_end + 1 : end - 1]
    return Instruction(
        match[2],
        text[shape_end:opcode_end].strip(),
        tuple(buffers(text[:shape_end])),
        tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments,
        text[end:],
        bool(match[1]),
    )


def _close(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"unbalanced parentheses in {text!r}")


def buffers(shape: str) -> Iterator[Buffer]:
    """The arrays of a shape such as `(bf16[8,128]{1,0:T(8,128)S(1)}, u32[])`."""
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        yield Buffer(dtype, tuple(int(size) for size in dims.split(",") if size), int(space[1]) if space else 0)


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    """The integer that a name stands for, looking through copies; None if it is not a constant."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
        instruction = computation[instruction.operands[0]]
    is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments.strip())
    return int(instruction.arguments) if is_integer else None


def _step(body: dict[str, Instruction], name: str) -> int:
    """The increment of a loop's counter; 1 if it isn't a plain sum."""
    instruction = body[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = body[instruction.operands[0]]
    if instruction.opcode != "add":
        return 1
    steps = [value for operand in instruction.operands if (value := _constant(body, operand))]
    return steps[0] if steps else 1
