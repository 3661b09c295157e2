"""Groups runs from results files: a row is a model with a method, a column a stage with a suite, a cell has seeds.

A checkpoint's name gives its place: MODEL, MODEL@STAGE or MODEL@STAGE#SEED. Runs of one column must have the same
protocol.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from safelm.evaluate import outcomes
from safelm.evaluate.protocol import check_comparable
from safelm.evaluate.suites.attempts import goal_of
from safelm.io import records
from safelm.stats import seeds as seeds_lib
from safelm.stats.intervals import Estimate

ATTACK, REFUSAL = ASPECTS = ("attack_success", "over_refusal")
Case = Mapping[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """A model and its decoding method."""

    model: str
    method: str

    def __str__(self) -> str:
        return self.model if self.method == "greedy" else f"{self.model} + {self.method}"


@dataclasses.dataclass(frozen=True, order=True)
class Column:
    """A stage of training and the suite of prompts."""

    stage: str
    suite: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One checkpoint's labelled answers under one method, from a results file."""

    row: Row
    column: Column
    seed: int
    source: str
    protocol: Mapping[str, Any]
    cases: Sequence[Case]
    headline: Mapping[str, str]
    judged: Mapping[str, Any]
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: str = ""  # the name as it was given

    def __str__(self) -> str:
        return f"{self.row}@{self.column.stage}#{self.seed}"

    def values(self, aspect: str, benchmark: str = "") -> dict[str, int]:
        """Value by prompt: 1 if the attack succeeded or the safe prompt was refused, else 0.

        Unscored prompts are left out.
        """
        judge = self.headline.get(aspect, "")
        if not judge:
            return {}
        value = outcomes.succeeded if aspect == ATTACK else outcomes.refused
        found = {
            case["id"]: value(case, judge)
            for case in self.cases
            if case["harmful"] == (aspect == ATTACK) and (not benchmark or benchmark in case["benchmarks"])
        }
        return {prompt: each for prompt, each in found.items() if each is not None}

    @property
    def category_of(self) -> dict[str, str]:
        return {case["id"]: case["category"] for case in self.cases}

    @property
    def benchmarks(self) -> list[str]:
        return sorted({name for case in self.cases for name in case["benchmarks"]})


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Checked runs, in the order in which rows and columns are shown."""

    runs: Sequence[Run]
    rows: Sequence[Row]
    columns: Sequence[Column]
    may_differ: Collection[str] = ()
    _found: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def cell(self, row: Row, column: Column) -> list[Run]:
        """The runs of a cell, one per seed."""
        return [run for run in self.runs if run.row == row and run.column == column]

    def rate(self, row: Row, column: Column, aspect: str = ATTACK, benchmark: str = "") -> Estimate | None:
        """A cell's rate over prompts and seeds, with its interval by `safelm.stats.seeds`.

        None for an empty cell.
        """
        return self._once(self._rate, row, column, aspect, benchmark)

    def _rate(self, row: Row, column: Column, aspect: str, benchmark: str) -> Estimate | None:
        values, categories, seeds, goals = [], [], [], []
        for run in self.cell(row, column):
            category_of = run.category_of
            for prompt, value in run.values(aspect, benchmark).items():
                values.append(value)
                categories.append(category_of[prompt])
                seeds.append(run.seed)
                goals.append(goal_of(prompt))
        return seeds_lib.rate(values, categories, seeds, goals) if values else None

    def outcomes(self, row: Row, column: Column) -> dict[str, Estimate]:
        """A cell's shares of `outcomes.OUTCOMES` over its scored harmful prompts; {} without any."""
        return self._once(self._outcomes, row, column)

    def _outcomes(self, row: Row, column: Column) -> dict[str, Estimate]:
        cases = [
            (found, case["category"], run.seed, goal_of(case["id"]))
            for run in self.cell(row, column)
            if (judge := run.headline.get(ATTACK, ""))
            for case in run.cases
            if case["harmful"] and (found := outcomes.outcome(case, judge)) is not None
        ]
        if not cases:
            return {}
        labels, categories, seeds, goals = zip(*cases, strict=True)
        return {
            name: seeds_lib.rate([label == name for label in labels], categories, seeds, goals)
            for name in outcomes.OUTCOMES
        }

    def _once(self, find: Callable[..., T], *key: Any) -> T:
        """The cached result of `find(*key)`, since tables and figures show the same ones."""
        if (find.__name__, *key) not in self._found:
            self._found[find.__name__, *key] = find(*key)
        return self._found[find.__name__, *key]

    def by_seed(self, row: Row, column: Column, aspect: str = ATTACK) -> dict[int, float]:
        """The rate of each seed."""
        found = {run.seed: list(run.values(aspect).values()) for run in self.cell(row, column)}
        return {seed: sum(values) / len(values) for seed, values in found.items() if values}

    def columns_with(self, aspect: str) -> list[Column]:
        """The columns in which any cell has a rate."""
        return [
            column for column in self.columns if any(run.values(aspect) for run in self.runs if run.column == column)
        ]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs of results files (`results.json`, or its folder).

    Raises FileNotFoundError if nothing is there, ValueError for another kind of file or a run that is in two files.
    """
    found: list[Run] = []
    for path in paths:
        file = pathlib.Path(path) / "results.json" if pathlib.Path(path).is_dir() else pathlib.Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"--results={path}: no results.json there")
        found += runs_of(records.read(file, "evaluate again"), str(path))
    for i, run in enumerate(found):
        same = next((o for o in found[:i] if (o.row, o.column, o.seed) == (run.row, run.column, run.seed)), None)
        if same is not None:
            raise ValueError(
                f"{same.source} and {run.source} both hold {run.row} at {run.column.stage or 'no stage'}, "
                f"suite {run.column.suite}, seed {run.seed}"
            )
    return found


def runs_of(results: Mapping[str, Any], source: str) -> list[Run]:
    """The runs of one results file. Raises ValueError naming it for an object of another form."""
    try:
        _check_form(results)
        return [
            Run(
                row=Row(model, run["method"]),
                column=Column(stage, results["suite"]),
                seed=seed,
                source=source,
                protocol=run["protocol"],
                cases=run["cases"],
                headline=results["headline"],
                judged=run.get("judged", {}),
                model=results.get("models", {}).get(run["checkpoint"], {}),
                checkpoint=run["checkpoint"],
            )
            for run in results["runs"]
            for model, stage, seed in [split_name(run["checkpoint"])]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: not results of safelm.evaluate, or of an older version (no {error})") from None


def _check_form(results: Mapping[str, Any]) -> None:
    """Raises KeyError or TypeError for results of another form."""
    objects = [results["headline"], results.get("models", {})]
    for run in results["runs"]:
        objects += [run["protocol"], run.get("judged", {}), *run["cases"], *(case["labels"] for case in run["cases"])]
    if not all(isinstance(each, Mapping) for each in objects):
        raise TypeError("a field of another kind")


def split_name(name: str) -> tuple[str, str, int]:
    """The parts of MODEL@STAGE#SEED; a missing stage is "", a missing seed 0."""
    rest, _, seed = name.partition("#")
    model, _, stage = rest.partition("@")
    return model, stage, int(seed or 0)


def compare(
    runs: Sequence[Run], *, stages: Sequence[str] = (), models: Sequence[str] = (), may_differ: Collection[str] = ()
) -> Comparison:
    """Orders the runs and checks that those of one column compare.

    Args:
      stages, models: their order; names left out follow in the order found.
      may_differ: protocol fields that may differ.

    Raises ProtocolError for runs that can't be compared, ValueError if there are no runs or no run has a name.
    """
    if not runs:
        raise ValueError("no runs to compare")
    columns = list(dict.fromkeys(run.column for run in runs))
    rows = list(dict.fromkeys(run.row for run in runs))
    for flag, wanted, known in (
        ("stages", stages, {column.stage for column in columns}),
        ("models", models, {row.model for row in rows}),
    ):
        unknown = next((name for name in wanted if name not in known), None)
        if unknown is not None:
            raise ValueError(f"--{flag}: no run is of {unknown!r}; there are {', '.join(sorted(known))}")
    columns.sort(key=lambda column: _place(stages, column.stage))
    rows.sort(key=lambda row: _place(models, row.model))
    for column in columns:
        of_column = [run for run in runs if run.column == column]
        for run in of_column[1:]:
            names = _label(of_column[0]), _label(run)
            check_comparable(of_column[0].protocol, run.protocol, names=names, may_differ=may_differ)
    return Comparison(runs, rows, columns, may_differ)


def _label(run: Run) -> str:
    return f"{run} ({run.source})"


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
