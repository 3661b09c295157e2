"""Writes the ladder's table, orderings and figure from all measurements so far.

A rate is the mean over seeds and prompts. Its interval, and that of a difference of two rows, comes from a bootstrap
that draws seeds and prompts independently, both with replacement, 2,000 times (Owen 2007, the pigeonhole bootstrap):
models answer the same prompts, so differences are paired, and both another training and another prompt would change a
rate. The interval is conservative and, with three seeds, rough. All orderings of the paper are tested on the same
models, so verdicts use p-values from the same draws, corrected by Holm over the orderings of a stage.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from safelm.evaluate.judges import word_lists as judge_lib
from safelm.io.files import write_whole
from safelm.ladder.jobs import read_done
from safelm.ladder.plan import CELLS, ORDERINGS, STAGES, chosen_models, measured
from safelm.report import charts, table
from safelm.stats.bootstrap import crossed_means, percentile_interval
from safelm.stats.comparison import holm
from safelm.stats.intervals import Estimate, rate

_DRAWS, _ALPHA = 2000, 0.05
HARMFUL, REFUSED, NEITHER = "harmful completions", "refused or redirected", "neither"
OVER_REFUSED, CHANGE = "wrongly refused safe", "change by benign finetuning"
_MEASURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    HARMFUL: ("harmful", (judge_lib.HARMFUL,)),
    REFUSED: ("harmful", judge_lib.DECLINES),
    NEITHER: ("harmful", (judge_lib.NEITHER,)),
    OVER_REFUSED: ("safe", judge_lib.DECLINES),
}
Counts = Mapping[int, Float[np.ndarray, " P"]]  # of every seed, a number a prompt: 1 where the measure holds


def collect(config: ConfigDict, output: pathlib.Path) -> dict[tuple[str, str, str], Counts]:
    """(cell, stage, measure) -> 0 or 1 for every finished seed and every prompt."""
    names = {model.name for model in chosen_models(config.models)}
    found = {}
    for cell in (cell for cell in CELLS if cell.model in names and cell.method in config.methods):
        for stage in STAGES:
            jobs = {seed: measured(seed, cell.model, stage, cell.method) for seed in config.seeds}
            results = {
                seed: result for seed, job in jobs.items() if job is not None and (result := read_done(output, job))
            }
            if len({(result["prompts_sha256"], result["judge"]) for result in results.values()}) > 1:
                raise ValueError(f"{output}: {cell.name} at {stage} was measured with different prompts or judges")
            for name, (kind, labels) in _MEASURES.items() if results else ():
                found[cell.name, stage, name] = {
                    seed: np.array([float(label in labels) for _, label in sorted(result["labels"][kind].items())])
                    for seed, result in results.items()
                }
    return found


def estimate(counts: Counts, less: Counts | None = None) -> Estimate:
    """The mean, or the mean difference of two rows over their common seeds, with a 95% interval over seeds and prompts.

    A single seed has no spread, so its interval covers prompts only (Wilson's for a rate).
    """
    values_SP = differences(counts, less)
    if less is None and len(values_SP) == 1:
        return rate(round(values_SP.sum()), values_SP.size)
    prompts = values_SP.shape[1]
    low, high = percentile_interval(crossed_means(values_SP, _DRAWS))
    if less is not None and not values_SP.any():  # no pair differs, which with more prompts some would
        high = rate(0, prompts).high
        low = -high
    if less is None:  # never narrower than Wilson's over prompts: at 0 or 1 a bootstrap sees no spread
        wilson = rate(round(values_SP.mean(0).sum()), prompts)
        low, high = min(low, wilson.low), max(high, wilson.high)
    return Estimate(float(values_SP.mean()), low, high, values_SP.size)


def p_value(counts: Counts, less: Counts) -> float:
    """Two-sided p-value of no difference: twice the share of `estimate`'s draws beyond 0, at least one draw."""
    means_D = crossed_means(differences(counts, less), _DRAWS)
    return min(1.0, 2 * (int(min((means_D <= 0).sum(), (means_D >= 0).sum())) + 1) / (_DRAWS + 1))


def differences(counts: Counts, less: Counts | None) -> Float[np.ndarray, "S P"]:
    """A row's values, or the paired differences of two rows, over their common seeds and all prompts."""
    common = [seed for seed in counts if less is None or seed in less]
    return np.stack([counts[seed] - (0.0 if less is None else less[seed]) for seed in common])


def verdict(difference: float, holm_p_value: float) -> str:
    """The verdict on an ordering, from (should be lower - should be higher) and its corrected p-value."""
    if holm_p_value >= _ALPHA:
        return "open"
    return "holds" if difference < 0 else "reversed"


def summarize(found: Mapping[tuple[str, str, str], Counts]) -> dict[str, Any]:
    """The content of the report as a JSON object."""
    rows = {
        cell.name: {
            stage: {name: _as_dict(found[cell.name, stage, name]) for name in _MEASURES}
            for stage in STAGES
            if (cell.name, stage, HARMFUL) in found
        }
        for cell in CELLS
    }
    for name, stages in rows.items():
        first, last = ((name, stage, HARMFUL) for stage in STAGES[1:])
        if found.get(first, {}).keys() & found.get(last, {}).keys():
            stages[STAGES[2]][CHANGE] = dataclasses.asdict(estimate(found[last], found[first]))
    orderings = [row for stage in STAGES for row in _orderings(found, stage)]
    return {"rows": {name: stages for name, stages in rows.items() if stages}, "orderings": orderings}


def _orderings(found: Mapping[tuple[str, str, str], Counts], stage: str) -> list[dict[str, Any]]:
    """The paper's orderings that a stage can test, with p-values corrected for their number."""
    pairs = {}
    for low, high, claim in ORDERINGS:
        lower, higher = (found.get((name, stage, HARMFUL), {}) for name in (low, high))
        if lower.keys() & higher.keys():
            pairs[low, high, claim] = lower, higher
    p_values = {" < ".join(names[:2]): p_value(*pair) for names, pair in pairs.items()}
    adjusted = holm(p_values)
    rows = []
    for names, pair in pairs.items():
        difference, ordering = estimate(*pair), " < ".join(names[:2])
        rows.append(
            dict(zip(("lower", "higher", "claim"), names, strict=True))
            | {"stage": stage, "difference": dataclasses.asdict(difference)}
            | {"p_value": p_values[ordering], "holm_p_value": adjusted[ordering]}
            | {"verdict": verdict(difference.value, adjusted[ordering])}
        )
    return rows


def _as_dict(counts: Counts) -> dict[str, Any]:
    by_seed = {str(seed): round(float(values.mean()), 4) for seed, values in counts.items()}
    return dataclasses.asdict(estimate(counts)) | {"by_seed": by_seed}


_COLUMNS = (  # what the table shows: heading, stage, measure
    *((f"harmful, {stage}", stage, HARMFUL) for stage in STAGES),
    ("change by benign", STAGES[2], CHANGE),
    ("refused, instruction", STAGES[1], REFUSED),
    ("refused, benign", STAGES[2], REFUSED),
    ("neither, benign", STAGES[2], NEITHER),
    ("safe refused, instruction", STAGES[1], OVER_REFUSED),
    ("safe refused, benign", STAGES[2], OVER_REFUSED),
)


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The table (percent) and the orderings after benign finetuning."""
    rows = []
    for name, stages in summary["rows"].items():
        cells = [_percent(stages.get(stage, {}).get(measure)) for _, stage, measure in _COLUMNS]
        rows.append((name, *cells, min(len(stage[HARMFUL]["by_seed"]) for stage in stages.values())))
    cells_table = table.markdown(("cell", *(heading for heading, _, _ in _COLUMNS), "seeds"), rows)
    heads, rows = ("harmful completions of", "less than of", "says", *STAGES, "p (Holm)", "verdict"), []
    orderings: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in summary["orderings"]:
        orderings.setdefault((row["lower"], row["higher"], row["claim"]), {})[row["stage"]] = row
    for names, by_stage in orderings.items():
        differences = [_percent(by_stage.get(stage, {}).get("difference")) for stage in STAGES]
        last = by_stage.get(STAGES[2], {})
        p_text = f"{last['holm_p_value']:.3f}" if last else ""
        rows.append((*names, *differences, p_text, last.get("verdict", "")))
    return "\n\n".join([cells_table, _CELLS_NOTE, table.markdown(heads, rows), _NOTE]) + "\n"


_CELLS_NOTE = "Percent of harmful prompts (safe refused: of safe ones) [95% interval over seeds and prompts]."
_NOTE = (
    "Differences in points [95%, not corrected]; p and verdict are of those after benign finetuning, corrected by Holm "
    "over its orderings."
)


def _percent(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return ""
    return f"{100 * values['value']:.1f} [{100 * values['low']:.1f}, {100 * values['high']:.1f}]"


def write(config: ConfigDict, output: pathlib.Path) -> None:
    """Writes results.json, results.md and results.png, or nothing before the first measurement."""
    found = collect(config, output)
    if not found:
        return
    summary = summarize(found)
    # Each under a temporary name of its own: several workers may be writing at once.
    write_whole(output / "results.json", json.dumps(summary, indent=1) + "\n")
    write_whole(output / "results.md", to_markdown(summary))
    width = 1.5 + 0.8 * len(summary["rows"])
    write_whole(
        output / "results.png", lambda path: charts.save_png(path, lambda figure: _draw(figure, summary), width, 4.5)
    )


def _draw(figure: Any, summary: Mapping[str, Any]) -> None:
    names, axes = list(summary["rows"]), figure.subplots()
    for offset, stage in zip((-0.25, 0.0, 0.25), STAGES, strict=True):
        places = [i for i, name in enumerate(names) if stage in summary["rows"][name]]
        values = [summary["rows"][names[i]][stage][HARMFUL] for i in places]
        mean = np.array([100 * value["value"] for value in values])
        spread = np.array(
            [[100 * (v["value"] - v["low"]) for v in values], [100 * (v["high"] - v["value"]) for v in values]]
        )
        x = np.array(places) + offset
        axes.bar(x, mean, 0.24, label=stage)
        axes.errorbar(x, mean, spread.clip(0), fmt="none", ecolor="black", capsize=2, linewidth=0.8)
        by_seed = [(at, 100 * seed) for at, value in zip(x, values, strict=True) for seed in value["by_seed"].values()]
        axes.plot([at for at, _ in by_seed], [seed for _, seed in by_seed], ".", color="black", markersize=3)
    axes.set_xticks(
        range(len(names)), [name.replace("+", "\n+") for name in names], rotation=45, ha="right", fontsize=8
    )
    axes.set_ylabel("harmful completions, %")
    axes.set_ylim(0, 100)
    axes.legend(title="after")
