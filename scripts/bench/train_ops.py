"""Where the time of a training step goes on a CPU, by XLA's own profile: a table by part of the step and kind of op.

    python scripts/bench/train_ops.py                   # 1.84M parameters at 16 x 256, as scripts/bench/train.py has it
    python scripts/bench/train_ops.py --shape=135m --dtype=bfloat16 --steps=3 --most=20

The step is that of `scripts/bench/train.py`. It runs on one core, so that an op's time is its own and not that of the
hand-over between threads; what two cores make of it says `train.py`. An op's time is the lower quartile over its runs
times its runs in a step, which other work on the machine disturbs little.
"""

import argparse
import collections
import json
import os
import re
import tempfile
import time
from pathlib import Path

from safelm import cli

KINDS = ("products", "copies", "reductions", "other")
PARTS = ("loss", "attention", "rest of the blocks", "optimizer")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\S+|\([^=]*?\)) ([\w\-]+)\(")
_CONTROL = ("while", "call", "conditional", "parameter", "tuple")


def instructions(program: str) -> dict[str, tuple[str, str, str]]:
    """Opcode, shape and source of every instruction of a compiled program, by its name."""
    found = {}
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            source = re.search(r'op_name="([^"]*)"', line)
            found[match[1]] = (match[3], match[2], source[1] if source else "")
    return found


def kind_of(name: str, opcode: str) -> str:
    """What an instruction does, by XLA's name for it."""
    if opcode == "dot" or "ynn_fusion" in name or "custom-call" in opcode:
        return "products"
    if "copy" in name or "transpose" in name:
        return "copies"
    return "reductions" if "reduce" in name else "other"


def part_of(shape: str, source: str, length: int) -> str:
    """The part of the step that an instruction belongs to; attention is all that has scores or an einsum over heads."""
    sizes = [int(size) for size in re.findall(r"\d+", shape.partition("[")[2].partition("]")[0])]
    is_scores = len(sizes) >= 4 and any(size % (length // 4) == 0 for size in sizes[2:])
    if "Decoder" in source or "layers" in source or is_scores:
        return "attention" if is_scores or re.search(r"bk|causal|attend", source) else "rest of the blocks"
    return "loss" if "jvp()" in source or "while" in source else "optimizer"


def profile(
    shape: str, dtype: str, steps: int
) -> tuple[dict[str, list[float]], dict[str, tuple[str, str, str]], list[float]]:
    """Milliseconds of every run of every instruction, the instructions, and the processor seconds of a step."""
    import jax
    import train
    import train_safelm

    from safelm.io import host_memory
    from safelm.train import program
    from safelm.train import step as train_step

    host_memory.keep_freed_memory()
    made, make_program = [], program.make_program
    program.make_program = lambda *arguments: made.append(make_program(*arguments)) or made[0]
    settings = train.settings_of(train.SHAPES["cpu"][shape], "cpu", dtype)
    with tempfile.TemporaryDirectory() as folder:
        train_safelm.write_folder(Path(folder), settings)
        step, _ = train_safelm.make_step(Path(folder))
        compiled, mesh = made[0][0], made[0][0].batch_sharding.mesh
        with jax.set_mesh(mesh):
            batch = train_step.abstract_batch(compiled, settings["batch_size"], settings["seq_len"])
            controls = train_step.abstract_controls(mesh)
            text = compiled.step.lower(compiled.abstract_state, batch, controls).compile().as_text()
        seconds = []
        for _ in range(steps + 1):
            began = time.process_time()
            step()
            seconds.append(time.process_time() - began)
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        (file,) = Path(folder).glob("**/*.xplane.pb")
        events = jax.profiler.ProfileData.from_file(str(file))
        runs = collections.defaultdict(list)
        for event in (event for plane in events.planes for line in plane.lines for event in line.events):
            runs[event.name].append(event.duration_ns / 1e6)
    return runs, instructions(text), seconds[1:]


def main() -> None:
    parser = cli.parser("scripts.bench.train_ops", __doc__)
    parser.add_argument("--shape", choices=("tiny", "135m", "smoke"), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=5, help="profiled steps (default 5)")
    parser.add_argument("--most", type=int, default=12, help="single ops shown (default 12)")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON as well")
    show(parser.parse_args())


def show(args: argparse.Namespace) -> None:
    """Profiles and prints."""
    import train

    runs, known, seconds = profile(args.shape, args.dtype, args.steps)
    length, rows = train.SHAPES["cpu"][args.shape][3], []
    for name, found in runs.items():
        opcode, shape, source = known.get(name, ("", "", ""))
        if opcode and opcode not in _CONTROL:
            ms = sorted(found)[len(found) // 4] * len(found) / args.steps
            rows.append((ms, name, shape, source, part_of(shape, source, length), kind_of(name, opcode)))
    total = sum(row[0] for row in rows)
    sums = {part: {kind: sum(r[0] for r in rows if r[4:] == (part, kind)) for kind in KINDS} for part in PARTS}
    print(f"one core: {1e3 * min(seconds):.0f} ms of processor time a step at best, {total:.0f} ms in these ops")
    print(f"| share of the ops' time, % | {' | '.join(KINDS)} | all |\n|{' --- |' * (len(KINDS) + 2)}")
    for part, by_kind in sums.items():
        shares = [100 * ms / total for ms in (*by_kind.values(), sum(by_kind.values()))]
        print(f"| {part} | {' | '.join(f'{share:.1f}' for share in shares)} |")
    for ms, name, shape, source, *_ in sorted(rows, reverse=True)[: args.most]:
        print(f"{ms:8.2f} ms  {name:34.34s} {shape:42.42s} {source[-60:]}")
    if args.json:
        print(json.dumps({"milliseconds": sums, "processor_seconds": seconds}))


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # before JAX counts the cores
    main()
