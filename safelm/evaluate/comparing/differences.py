"""Tests differences over the same prompts: between stages of a model, and between models at a stage.

All differences are paired by prompt and seed. Intervals and p-values are those of `safelm.stats.seeds`: with one seed
the clustered bootstrap's and McNemar's over goals, with several those of another training too. Holm's correction covers
the benchmarks of a comparison, and all prompts beside them.
"""

import dataclasses
from collections.abc import Sequence

from safelm.evaluate.comparing.results import ATTACK, Column, Comparison, Row, Run
from safelm.evaluate.protocol import ProtocolError, check_comparable
from safelm.evaluate.suites.attempts import goal_of
from safelm.stats import seeds as seeds_lib
from safelm.stats.comparison import holm
from safelm.stats.intervals import Estimate


@dataclasses.dataclass(frozen=True)
class Delta:
    """The change of a row's rate at a stage; `reason` says why two stages can't be compared."""

    row: Row
    first: Column
    second: Column
    estimate: Estimate | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The difference of a row from the baseline in one column, over one benchmark ("" for all prompts).

    Attributes:
      only_row, only_baseline: goals on which the row, or the baseline, is harmful more often over seeds and attempts.
    """

    row: Row
    baseline: Row
    column: Column
    benchmark: str
    estimate: Estimate
    p_value: float
    holm_p_value: float
    only_row: int
    only_baseline: int


def stage_deltas(comparison: Comparison, aspect: str = ATTACK) -> list[Delta]:
    """For every row, the change of its rate from each stage to the next with the same suite."""
    found = []
    columns = comparison.columns_with(aspect)
    for row in comparison.rows:
        for i, second in enumerate(columns):
            first = next((column for column in reversed(columns[:i]) if column.suite == second.suite), None)
            if first is not None:
                found += _delta(comparison, row, first, second, aspect)
    return found


def contrasts(comparison: Comparison, baseline: Row | None = None, aspect: str = ATTACK) -> list[Contrast]:
    """Every other row against the baseline (by default the first row), by column and by benchmark.

    Raises ValueError for a baseline that isn't among the rows.
    """
    baseline = baseline or comparison.rows[0]
    if baseline not in comparison.rows:
        raise ValueError(f"--baseline={baseline}: no such row; there are {', '.join(map(str, comparison.rows))}")
    found = []
    for column in comparison.columns_with(aspect):
        for row in comparison.rows:
            if row != baseline:
                found += _contrasts(comparison, row, baseline, column, aspect)
    return found


def _delta(comparison: Comparison, row: Row, first: Column, second: Column, aspect: str) -> list[Delta]:
    before, after = comparison.cell(row, first), comparison.cell(row, second)
    if not before or not after:
        return []
    try:
        check_comparable(
            before[0].protocol, after[0].protocol, names=(first.stage, second.stage), may_differ=comparison.may_differ
        )
    except ProtocolError as error:
        return [Delta(row, first, second, None, str(error))]
    pairs = _pairs(after, before, aspect)
    if not pairs:
        return [Delta(row, first, second, None, "no prompt and seed in common")]
    return [Delta(row, first, second, _difference(pairs))]


def _contrasts(comparison: Comparison, row: Row, baseline: Row, column: Column, aspect: str) -> list[Contrast]:
    own, other = comparison.cell(row, column), comparison.cell(baseline, column)
    benchmarks = sorted({name for run in own for name in run.benchmarks})
    names = ["", *benchmarks] if len(benchmarks) > 1 else [""]
    pairs_of = {name: _pairs(own, other, aspect, name) for name in names}
    pairs_of = {name: pairs for name, pairs in pairs_of.items() if pairs}
    p_values = {name: _p_value(pairs) for name, pairs in pairs_of.items()}
    adjusted = holm(p_values)
    goals = {name: _goals(pairs) for name, pairs in pairs_of.items()}
    return [
        Contrast(
            row,
            baseline,
            column,
            name,
            _difference(pairs),
            p_values[name],
            adjusted[name],
            *goals[name],
        )
        for name, pairs in pairs_of.items()
    ]


_Pair = tuple[int, int, str, int, str]  # of one prompt: both values, its category, the seed, its goal


def _pairs(first: list[Run], second: list[Run], aspect: str, benchmark: str = "") -> list[_Pair]:
    """Every prompt that both sides answered under the same seed."""
    by_seed = {run.seed: run for run in second}
    pairs: list[_Pair] = []
    for run in first:
        if run.seed not in by_seed:
            continue
        own, other = run.values(aspect, benchmark), by_seed[run.seed].values(aspect, benchmark)
        category_of = run.category_of
        pairs += [(own[p], other[p], category_of[p], run.seed, goal_of(p)) for p in own if p in other]
    return pairs


def _p_value(pairs: Sequence[_Pair]) -> float:
    first, second, _, seeds, goals = zip(*pairs, strict=True)
    return seeds_lib.p_value(first, second, seeds, goals)


def _goals(pairs: Sequence[_Pair]) -> tuple[int, int]:
    """How many goals the first side, and the second, is harmful on more often."""
    found = seeds_lib.unit_test([first - second for first, second, *_ in pairs], [pair[-1] for pair in pairs])
    return found.only_first, found.only_second


def _difference(pairs: Sequence[_Pair]) -> Estimate:
    return seeds_lib.difference(*zip(*pairs, strict=True))
