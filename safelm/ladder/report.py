"""Writes the ladder's table, orderings and figure from all measurements so far; `safelm.ladder.estimates` has how."""

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
from safelm.ladder import estimates, scaling
from safelm.ladder.answers import LEANING, SAFE_LEANING, leanings
from safelm.ladder.estimates import Found, as_dict, estimate, orderings, p_text
from safelm.ladder.plan import CELLS, ORDERINGS, SCALING, STAGES, TOXICITY, study_of
from safelm.ladder.toxicity import report as toxicity_report
from safelm.report import charts, table

HARMFUL, REFUSED, NEITHER = "harmful completions", "refused or redirected", "neither"
OVER_REFUSED, CHANGE = "wrongly refused safe", "change by benign finetuning"
PERPLEXITY = "perplexity"  # of harmless held-out pages
_MEASURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    HARMFUL: ("harmful", (judge_lib.HARMFUL,)),
    REFUSED: ("harmful", judge_lib.DECLINES),
    NEITHER: ("harmful", (judge_lib.NEITHER,)),
    OVER_REFUSED: ("safe", judge_lib.DECLINES),
}


def values(result: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " P"]]:
    """For each measure, 1 for every prompt of which it holds and 0 for the others."""
    found = {
        name: np.array([float(label in labels) for _, label in sorted(result["labels"][kind].items())])
        for name, (kind, labels) in _MEASURES.items()
    }
    return found | leanings(result) | ({PERPLEXITY: np.array([result[PERPLEXITY]])} if PERPLEXITY in result else {})


def collect(config: ConfigDict, output: pathlib.Path) -> Found:
    """See `estimates.collect`; the measures are those of the config's study."""
    study = study_of(config)
    return estimates.collect(
        config, output, {TOXICITY: toxicity_report.values, SCALING: _scaling_values}.get(study, values)
    )


def _scaling_values(result: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " P"]]:
    found = values(result)
    return {name: found[name] for name in (HARMFUL, OVER_REFUSED)} | scaling.values(result)


def summarize(found: Found) -> dict[str, Any]:
    """The content of the report as a JSON object."""
    rows = {
        cell.name: {
            stage: {
                name: as_dict(found[cell.name, stage, name])
                for name in (*_MEASURES, PERPLEXITY, LEANING, SAFE_LEANING)
                if (cell.name, stage, name) in found
            }
            for stage in STAGES
            if (cell.name, stage, HARMFUL) in found
        }
        for cell in CELLS
    }
    for name, stages in rows.items():
        first, last = ((name, stage, HARMFUL) for stage in STAGES[1:])
        if found.get(first, {}).keys() & found.get(last, {}).keys():
            stages[STAGES[2]][CHANGE] = dataclasses.asdict(estimate(found[last], found[first]))
    rows_of_orderings = [row for stage in STAGES for row in orderings(found, ORDERINGS, stage, HARMFUL)]
    return {"rows": {name: stages for name, stages in rows.items() if stages}, "orderings": rows_of_orderings}


_COLUMNS = (  # what the table shows: heading, stage, measure
    *((f"harmful, {stage}", stage, HARMFUL) for stage in STAGES),
    ("change by benign", STAGES[2], CHANGE),
    ("refused, instruction", STAGES[1], REFUSED),
    ("refused, benign", STAGES[2], REFUSED),
    ("neither, benign", STAGES[2], NEITHER),
    ("safe refused, instruction", STAGES[1], OVER_REFUSED),
    ("safe refused, benign", STAGES[2], OVER_REFUSED),
    *((f"perplexity, {stage}", stage, PERPLEXITY) for stage in (STAGES[0], STAGES[2])),
)


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The table (percent) and the orderings after benign finetuning."""
    rows = []
    for name, stages in summary["rows"].items():
        cells = [_shown(measure, stages.get(stage, {}).get(measure)) for _, stage, measure in _COLUMNS]
        rows.append((name, *cells, min(len(stage[HARMFUL]["by_seed"]) for stage in stages.values())))
    cells_table = table.markdown(("cell", *(heading for heading, _, _ in _COLUMNS), "seeds"), rows)
    heads, rows = ("harmful completions of", "less than of", "says", *STAGES, "p (Holm)", "verdict"), []
    by_names: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in summary["orderings"]:
        by_names.setdefault((row["lower"], row["higher"], row["claim"]), {})[row["stage"]] = row
    for names, by_stage in by_names.items():
        differences = [_percent(by_stage.get(stage, {}).get("difference")) for stage in STAGES]
        last = by_stage.get(STAGES[2], {})
        rows.append((*names, *differences, p_text(last) if last else "", last.get("verdict", "")))
    return "\n\n".join([cells_table, _CELLS_NOTE, table.markdown(heads, rows), _NOTE]) + "\n"


_CELLS_NOTE = (
    "Percent of harmful prompts (safe refused: of safe ones) [95% interval over seeds and prompts]; perplexity of "
    "harmless held-out pages [lowest and highest seed]."
)
_NOTE = (
    "Differences in points [95%, not corrected]; p and verdict are of those after benign finetuning, corrected by Holm "
    "over its orderings."
)


def _shown(measure: str, values: Mapping[str, Any] | None) -> str:
    if values is None or measure != PERPLEXITY:
        return _percent(values)
    of_seeds = values["by_seed"].values()
    return f"{values['value']:.2f} [{min(of_seeds):.2f}, {max(of_seeds):.2f}]"


def _percent(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return ""
    return f"{100 * values['value']:.1f} [{100 * values['low']:.1f}, {100 * values['high']:.1f}]"


def write(config: ConfigDict, output: pathlib.Path) -> None:
    """Writes results.json, results.md and results.png, or nothing before the first measurement."""
    found = collect(config, output)
    if not found:
        return
    if study_of(config) is TOXICITY:
        toxicity_report.write(config, output, found)
        return
    if study_of(config) is SCALING:
        scaling.write(config, output, found)
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
