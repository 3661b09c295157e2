"""A comparison as tables: rows are models, columns stages or benchmarks, as the paper has them."""

from collections.abc import Sequence
from typing import Any

from safelm.evaluation.comparing.differences import contrasts, stage_deltas
from safelm.evaluation.comparing.results import ATTACK, REFUSAL, Column, Comparison, Row
from safelm.evaluation.intervals import Estimate

NAMES = {ATTACK: "attack success", REFUSAL: "refused safe prompts"}
Table = list[list[str]]


def by_stage(comparison: Comparison, aspect: str = ATTACK) -> Table:
    """Rates by model and stage, % with 95% intervals."""
    columns = comparison.columns_with(aspect)
    rows = [["model", *(name_of(comparison, column) for column in columns)]]
    return rows + [
        [str(row), *(percent(comparison.rate(row, column, aspect)) for column in columns)]
        for row in comparison.rows
        if any(comparison.cell(row, column) for column in columns)
    ]


def by_benchmark(comparison: Comparison, column: Column) -> Table:
    """Attack success by model and benchmark; the last column counts each prompt once."""
    runs = [run for run in comparison.runs if run.column == column]
    benchmarks = sorted({name for run in runs for name in run.benchmarks})
    rows = [["model", *benchmarks, "all, each prompt once"]]
    for row in comparison.rows:
        if comparison.cell(row, column):
            cells = [percent(comparison.rate(row, column, ATTACK, name)) for name in (*benchmarks, "")]
            rows.append([str(row), *cells])
    return rows


def deltas(comparison: Comparison, aspect: str = ATTACK) -> Table:
    """What each stage did: the headline."""
    rows = [["model", "from", "to", f"change of {NAMES[aspect]}, points", ""]]
    for delta in stage_deltas(comparison, aspect):
        first, second = (name_of(comparison, column) for column in (delta.first, delta.second))
        shown = "not compared" if delta.estimate is None else points(delta.estimate)
        rows.append([str(delta.row), first, second, shown, delta.reason])
    return rows


def against_baseline(comparison: Comparison, baseline: Row | None = None) -> Table:
    """Each model against the baseline on the same prompts."""
    rows = [["model", "against", "stage", "benchmark", "difference, points", "alone harmful", "baseline alone",
             "McNemar p", "Holm p"]]  # fmt: skip
    for each in contrasts(comparison, baseline):
        names = [str(each.row), str(each.baseline), name_of(comparison, each.column), each.benchmark or "all"]
        counts = [str(each.only_row), str(each.only_baseline)]
        rows.append([*names, points(each.estimate), *counts, p_value(each.p_value), p_value(each.holm_p_value)])
    return rows


def judges(comparison: Comparison) -> Table:
    """Every judge's rates of every run: observed and corrected, and what is neither harmful nor safe."""
    rows = [["run", "judge", "observed", "corrected", "harmful and coherent", "not coherent", "empty", "short circuit",
             "unscored", "safe refused", "corrected"]]  # fmt: skip
    for run in comparison.runs:
        for name, found in run.judged.items():
            label = f"{run.row}@{run.column.stage}#{run.seed}, {run.column.suite}"
            rows.append([label, name, *_judged(found.get(ATTACK, {}), found.get(REFUSAL, {}))])
    return rows


def _judged(attack: dict[str, Any], refusal: dict[str, Any]) -> list[str]:
    shares = attack.get("shares", {})
    broken = [shares[key]["value"] for key in ("harmful_incoherent", "harmless_incoherent") if key in shares]
    return [
        stored(attack.get("observed")),
        stored(attack.get("corrected")),
        stored(shares.get("harmful_coherent")),
        f"{100 * sum(broken):.1f}" if broken else "-",
        stored(shares.get("empty")),
        stored(shares.get("short_circuit")),
        str(attack.get("unscored", 0) + refusal.get("unscored", 0)),
        stored(refusal.get("observed")),
        stored(refusal.get("corrected")),
    ]


def five_classes(comparison: Comparison) -> Table:
    """Over-refusal in the paper's five classes, by the headline judge; empty answers apart."""
    runs = [run for run in comparison.runs if run.values(REFUSAL)]
    classes = [run.judged.get(run.headline[REFUSAL], {}).get(REFUSAL, {}).get("classes", {}) for run in runs]
    if not any(classes):
        return [["run"]]
    names = list(next(found for found in classes if found))
    rows = [["run", *(name.replace("_", " ") for name in names)]]
    for run, found in zip(runs, classes, strict=True):
        if found:
            label = f"{run.row}@{run.column.stage}#{run.seed}"
            rows.append([label, *(stored(found[name]) for name in names)])
    return rows


def name_of(comparison: Comparison, column: Column) -> str:
    """A column's heading: the stage, with the suite where a stage has several."""
    stage = column.stage or "-"
    suites = {other.suite for other in comparison.columns if other.stage == column.stage}
    if len(suites) == 1 and column.stage:
        return stage
    return f"{stage}, {column.suite}" if column.stage else column.suite


def percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def stored(found: dict[str, Any] | None) -> str:
    """A stored estimate as `percent` shows it."""
    if not found:
        return "-"
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def p_value(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def markdown(table: Sequence[Sequence[str]]) -> str:
    """As a Markdown table."""
    header, *body = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table)
    return "\n".join([header, "|" + " --- |" * len(table[0]), *body])
