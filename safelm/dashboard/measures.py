"""What a dashboard shows: rows of checkpoints, columns of measures under one protocol each, cells with intervals.

A protocol is everything that decides a number except which model was measured and how it decoded. Numbers of two
protocols stand in two columns, whatever they are called, so that nothing on the page compares them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.selection.settings import parse_tokens

LOW, HIGH, UNKNOWN = "low", "high", ""  # which end of a measure is the better one
_TOKENS = re.compile(r"\d+(\.\d+)?[KMBT]", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Row:
    """A checkpoint, its stage ("" = none) and its decoding method ("" = what needs no decoding)."""

    model: str
    stage: str
    method: str

    @property
    def tokens(self) -> int | None:
        """The tokens of pretraining, if the stage is called by them: `20M`, `1.5B`."""
        return parse_tokens(self.stage) if _TOKENS.fullmatch(self.stage) else None

    def __str__(self) -> str:
        method = "" if self.method in ("", "greedy") else f" + {self.method}"
        return f"{self.model}{f' @ {self.stage}' if self.stage else ''}{method}"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a group of numbers was measured under.

    Attributes:
      tool: whose protocol it is, such as `safelm.evaluate`.
      name: the suite or task.
      fields: every setting that decides the numbers.
    """

    tool: str
    name: str
    fields: Mapping[str, Any] = dataclasses.field(hash=False)


@dataclasses.dataclass(frozen=True)
class Column:
    """A measure under one protocol.

    Attributes:
      section: of the list of columns, such as "By judge".
      better: LOW, HIGH or UNKNOWN.
      percent: whether it is a share, shown in percent.
      shown: whether the matrix shows it before anyone asks.
    """

    protocol: str  # its key
    section: str
    title: str
    better: str = UNKNOWN
    percent: bool = True
    shown: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value; low and high are None where no 95% interval is known.

    Attributes:
      cases: number of cases behind it; 0 if unknown.
      by_seed: the value of each training seed, if there are several.
      by_category: (cases, value, low, high) of each category of prompts.
    """

    value: float | int
    low: float | int | None = None
    high: float | int | None = None
    cases: int = 0
    by_seed: Mapping[int, float | int] = dataclasses.field(default_factory=dict)
    by_category: Mapping[str, tuple[int, float, float, float]] = dataclasses.field(default_factory=dict)


def cell_of(found: Mapping[str, Any]) -> Cell:
    """The cell of a measure in a results file. Raises KeyError, TypeError or AttributeError for anything else."""
    by_seed = {int(seed): value for seed, value in found.get("by_seed", {}).items()}
    numbers = [found["value"], found["low"], found["high"], found.get("cases", 0)]
    for number in (*numbers, *by_seed.values()):
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise TypeError(f"{number!r} is no number")
    return Cell(*numbers, by_seed if len(by_seed) > 1 else {})


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of one run's cases, in the order of their `CaseSet`; None for a case that the run doesn't have.

    Attributes:
      labels: by judge.
      outcomes: by the judge of the headline.
      texts: prompt and answer, only where they were asked for.
    """

    row: Row
    seed: int
    labels: Mapping[str, Sequence[str | None]]
    outcomes: Sequence[str | None] = ()
    tag_probability: Sequence[float | None] = ()
    new_tokens: Sequence[int | None] = ()
    texts: Sequence[tuple[str, str] | None] = ()


@dataclasses.dataclass(frozen=True)
class CaseSet:
    """The cases of one protocol by id."""

    protocol: str  # its key
    ids: Sequence[str]
    categories: Sequence[str]
    harmful: Sequence[bool | None]
    runs: list[Labels]


@dataclasses.dataclass(frozen=True)
class Curves:
    """A training run's log: values by name over steps, thinned.

    Attributes:
      tokens_per_step: positions of a batch; None if the run's config isn't there.
    """

    name: str
    source: str
    tokens_per_step: int | None
    values: Mapping[str, Sequence[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file that was read, or left out for a reason."""

    path: str
    kind: str
    note: str = ""


@dataclasses.dataclass
class Board:
    """Everything on the page.

    Attributes:
      seeds: of cells that were added by seed, every seed's own.
    """

    protocols: dict[str, Protocol] = dataclasses.field(default_factory=dict)
    cells: dict[Column, dict[Row, Cell]] = dataclasses.field(default_factory=dict)
    seeds: dict[tuple[Column, Row], dict[int, Cell]] = dataclasses.field(default_factory=dict)
    cases: list[CaseSet] = dataclasses.field(default_factory=list)
    curves: list[Curves] = dataclasses.field(default_factory=list)
    sources: list[Source] = dataclasses.field(default_factory=list)

    def add(self, column: Column, row: Row, cell: Cell, *, source: str, seed: int | None = None) -> None:
        """Adds a cell. Raises ValueError, naming the file, if another one is there.

        Args:
          seed: of a checkpoint that was measured alone; None for a cell over all seeds. Of several seeds the row has
            the mean, without an interval.
        """
        there, of_seed = self.cells.setdefault(column, {}), self.seeds.get((column, row), {})
        if row in there and (seed is None or not of_seed or seed in of_seed):
            raise ValueError(
                f"{source}: {column.title} of {row}{f', seed {seed},' if seed else ''} is there already, by the same "
                "protocol; give one of the two another name: NAME=PATH"
            )
        if seed is not None:
            of_seed = {**of_seed, seed: cell}
            self.seeds[column, row] = of_seed
            cell = _over_seeds(of_seed)
        there[row] = cell

    def merge(self, other: "Board", *, source: str) -> None:
        """Takes over what was read of one file; samples of the same ids and protocol stand side by side.

        Raises ValueError, naming the file, for a cell that is there already.
        """
        self.protocols |= other.protocols
        self.curves += other.curves
        for column, of_row in other.cells.items():
            for row, cell in of_row.items():
                of_seed: Mapping[int | None, Cell] = other.seeds.get((column, row)) or {None: cell}
                for seed, each in of_seed.items():
                    self.add(column, row, each, source=source, seed=seed)
        for cases in other.cases:
            same = [there for there in self.cases if (there.protocol, there.ids) == (cases.protocol, cases.ids)]
            if same:
                same[0].runs.extend(cases.runs)
            else:
                self.cases.append(cases)

    @property
    def rows(self) -> list[Row]:
        """All rows, a model's together by stage; those without a method only where their checkpoint has no other."""
        found = list(dict.fromkeys(row for column in self.columns for row in self.cells[column]))
        decoded = {(row.model, row.stage) for row in found if row.method}
        kept = [row for row in found if row.method or (row.model, row.stage) not in decoded]
        models, stages, methods = (
            list(dict.fromkeys(getattr(row, name) for row in kept)) for name in ("model", "stage", "method")
        )
        return sorted(
            kept,
            key=lambda row: (
                models.index(row.model),
                row.tokens or 0,
                stages.index(row.stage),
                (row.method != "greedy", methods.index(row.method)),
            ),
        )

    @property
    def columns(self) -> list[Column]:
        """All columns: our own protocols' first, those of a protocol together."""
        keys = self.protocol_keys
        return sorted(self.cells, key=lambda column: keys.index(column.protocol))

    @property
    def protocol_keys(self) -> list[str]:
        """The keys of all protocols: of `safelm.evaluate`, of our other tools, of others."""
        tools = {key: protocol.tool for key, protocol in self.protocols.items()}
        return sorted(tools, key=lambda key: (tools[key] != "safelm.evaluate", not tools[key].startswith("safelm")))

    def cell(self, column: Column, row: Row) -> Cell | None:
        """A row's cell; of what needs no decoding, that of its checkpoint."""
        cells = self.cells[column]
        return cells.get(row) or cells.get(dataclasses.replace(row, method=""))


def _over_seeds(of_seed: Mapping[int, Cell]) -> Cell:
    """One seed's own cell; of several the mean, with no interval, since their cases are of the same prompts."""
    if len(of_seed) == 1:
        return next(iter(of_seed.values()))
    by_seed = {seed: cell.value for seed, cell in of_seed.items()}
    return Cell(sum(by_seed.values()) / len(by_seed), by_seed=by_seed)
