"""Tables of a comparison in the paper's form: rows are models, columns stages or benchmarks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from safelm.evaluate.comparing.differences import contrasts, stage_deltas
from safelm.evaluate.comparing.results import ATTACK, REFUSAL, Column, Comparison, Row, Run
from safelm.evaluate.suites import attempts
from safelm.report.table import NOTHING, Cell, Table, count, estimate, points, share, words
from safelm.stats.intervals import Estimate

NAMES = {ATTACK: "attack success", REFUSAL: "refused safe prompts"}


def by_stage(comparison: Comparison, aspect: str = ATTACK) -> Table:
    """Rates by model and stage."""
    columns = comparison.columns_with(aspect)
    rows = [
        [words(row), *(_share(comparison.rate(row, column, aspect)) for column in columns)]
        for row in comparison.rows
        if any(comparison.cell(row, column) for column in columns)
    ]
    heads = ["model", *(name_of(comparison, column) for column in columns)]
    return Table(f"{NAMES[aspect].capitalize()}, % of prompts [95% interval]", heads, rows)


def by_benchmark(comparison: Comparison, column: Column) -> Table:
    """Attack success by model and benchmark; the last column counts every prompt once."""
    runs = [run for run in comparison.runs if run.column == column]
    benchmarks = sorted({name for run in runs for name in run.benchmarks})
    rows = [
        [words(row), *(_share(comparison.rate(row, column, ATTACK, name)) for name in (*benchmarks, ""))]
        for row in comparison.rows
        if comparison.cell(row, column)
    ]
    return Table("Attack success, % of prompts [95% interval]", ["model", *benchmarks, "all, each prompt once"], rows)


def harmful_outcomes(comparison: Comparison) -> Table:
    """Outcomes of harmful prompts, one row per model, decoding and stage; shares sum to 100%."""
    found = [(run, comparison.outcomes(run.row, run.column)) for run in _first_seeds(comparison)]
    names = list(dict.fromkeys(name for _, shares in found for name in shares))
    rows = [
        [words(label(comparison, run.row, run.column)), *(_share(shares.get(name)) for name in names)]
        for run, shares in found
        if shares
    ]
    return Table("% of harmful prompts [95% interval], by the judge of the headline", ["model", *names], rows)


def deltas(comparison: Comparison, aspect: str = ATTACK) -> Table:
    """The change at each stage, the headline table."""
    rows = []
    for delta in stage_deltas(comparison, aspect):
        ends = [words(name_of(comparison, column)) for column in (delta.first, delta.second)]
        change = words("not compared") if delta.estimate is None else points(dataclasses.asdict(delta.estimate))
        rows.append([words(delta.row), *ends, change, words(delta.reason)])
    heads = ["model", "from", "to", f"change of {NAMES[aspect]}, points", "why not"]
    if not any(row[-1].text for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return Table("Differences in points [95% interval]", heads, rows)


def against_baseline(comparison: Comparison, baseline: Row | None = None) -> Table:
    """Each model against the baseline over the same prompts."""
    rows = []
    for each in contrasts(comparison, baseline):
        names = [str(each.row), str(each.baseline), name_of(comparison, each.column), each.benchmark or "all"]
        counts = [count(each.only_row), count(each.only_baseline)]
        values = [p_value(each.p_value), p_value(each.holm_p_value)]
        rows.append([*map(words, names), points(dataclasses.asdict(each.estimate)), *counts, *values])
    heads = [
        "model",
        "against",
        "stage",
        "benchmark",
        "difference, points",
        "only model harmful",
        "only baseline harmful",
        "p",
        "Holm p",
    ]
    return Table("Same prompts, in points [95% interval]", heads, rows)


def judges(comparison: Comparison) -> Table:
    """Every judge's rates for every run: observed, corrected, and neither harmful nor safe."""
    heads = [
        "run",
        "judge",
        "attack success, observed",
        "corrected",
        "harmful and coherent",
        "not coherent",
        "empty",
        "short circuit",
        "unscored",
        "worst of a goal's attempts",
        "safe refused, observed",
        "safe refused, corrected",
    ]
    rows = []
    for run in comparison.runs:
        for name, found in run.judged.items():
            shown = _judged(found.get(ATTACK, {}), found.get(REFUSAL, {}))
            rows.append([words(f"{run}, {run.column.suite}"), words(name), *shown])
    return Table("% of prompts [95% interval]; unscored ones are counted", heads, rows)


def _judged(attack: dict[str, Any], refusal: dict[str, Any]) -> list[Cell]:
    shares = attack.get("shares", {})
    broken = [shares[key]["value"] for key in ("harmful_incoherent", "harmless_incoherent") if key in shares]
    return [
        share(attack.get("observed")),
        share(attack.get("corrected")),
        share(shares.get("harmful_coherent")),
        Cell(f"{100 * sum(broken):.1f}", sum(broken)) if broken else NOTHING,
        share(shares.get("empty")),
        share(shares.get("short_circuit")),
        count(attack.get("unscored", 0) + refusal.get("unscored", 0)),
        _worst_of(attack.get("worst_of", {})),
        share(refusal.get("observed")),
        share(refusal.get("corrected")),
    ]


def _worst_of(worst: Mapping[str, Any]) -> Cell:
    """The share of goals with a harmful answer among all attempts, and how many those are."""
    most, found = attempts.last_of(worst)
    shown = share(found)
    return dataclasses.replace(shown, note=f"of {most}") if found else shown


def five_classes(comparison: Comparison) -> Table:
    """Over-refusal in the paper's five classes by the headline judge, with empty answers separate."""
    runs = [run for run in comparison.runs if run.values(REFUSAL)]
    classes = [run.judged.get(run.headline[REFUSAL], {}).get(REFUSAL, {}).get("classes", {}) for run in runs]
    names = list(next((found for found in classes if found), ()))
    rows = [
        [words(run), *(share(found[name]) for name in names)] for run, found in zip(runs, classes, strict=True) if found
    ]
    return Table("% of safe prompts [95% interval]", ["run", *(name.replace("_", " ") for name in names)], rows)


def models(comparison: Comparison) -> Table:
    """Measures of each checkpoint without decoding: perplexity, and how well P(tag) separates harmful prompts."""
    rows = []
    for run in {(run.row.model, run.column, run.seed): run for run in comparison.runs}.values():
        if run.model:
            label = f"{run.row.model}@{run.column.stage}#{run.seed}" if run.column.stage else run.row.model
            rows.append([words(label), *read_off(run.model)])
    heads = ["model", "perplexity of safe text", "AUROC of P(tag), mean", "AUROC of P(tag), last token"]
    return Table("AUROC of P(tag): harmful against safe prompts [95% interval]", heads, rows)


def read_off(model: Mapping[str, Any]) -> list[Cell]:
    """Perplexity and AUROC of P(tag) (mean, last token); no AUROC if the model never saw the tag."""
    held_out, found = model.get("perplexity"), model.get("tag_separation", {})
    perplexity = Cell(f"{held_out['perplexity']:.2f}", held_out["perplexity"]) if held_out else NOTHING
    if model.get("saw_tag") is False:  # its P(tag) means nothing
        return [perplexity, NO_TAG, NO_TAG]
    return [perplexity, *(estimate(found.get(where)) for where in ("mean", "last"))]


NO_TAG = Cell("no tag seen")


def name_of(comparison: Comparison, column: Column) -> str:
    """A column's heading: the stage, and the suite if a stage has several."""
    suites = {other.suite for other in comparison.columns if other.stage == column.stage}
    if len(suites) == 1 and column.stage:
        return column.stage
    return f"{column.stage}, {column.suite}" if column.stage else column.suite


def label(comparison: Comparison, row: Row, column: Column) -> str:
    """A row's name, with the stage if there are several."""
    several = len(comparison.columns) > 1 and column.stage
    return f"{name_of(comparison, column)}: {row}" if several else str(row)


def p_value(value: int | float) -> Cell:
    """A cell with a p-value, or its upper bound if it is very small."""
    return Cell("< 0.0001" if value < 1e-4 else f"{value:.4f}", value)


def _share(found: Estimate | None) -> Cell:
    return share(dataclasses.asdict(found) if found else None)


def _first_seeds(comparison: Comparison) -> list[Run]:
    """One run per cell, in the order of rows and columns."""
    cells = [comparison.cell(row, column) for column in comparison.columns_with(ATTACK) for row in comparison.rows]
    return [runs[0] for runs in cells if runs]
