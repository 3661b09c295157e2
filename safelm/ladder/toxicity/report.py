"""Writes what the toxicity ladder found: a table for each stage, and the orderings by both judges.

An ordering holds (or is reversed) if both judges say so, each corrected by Holm over the orderings of a stage. A
*corrected* rate allows for a judge's errors on people's labels (Rogan and Gladen 1978): its specificity is that on
pages and on comments without a toxic character, mixed as pages and harmless comments are in the corpus, and the
observed rate counts as one of so many independent continuations as its interval over seeds and prompts would have.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from safelm.io.files import write_whole
from safelm.ladder.estimates import Found, as_dict, orderings, p_text
from safelm.ladder.plan import TOXICITY
from safelm.ladder.records import facts
from safelm.ladder.toxicity.judges import JUDGES
from safelm.ladder.toxicity.measure import KINDS
from safelm.report import table
from safelm.stats.correction import Counts, corrected_estimate
from safelm.stats.intervals import Estimate

SHARE, ANY, MAXIMUM = "toxic", "toxicity probability", "expected maximum"
PAGES = ("c4", "wikitext")
_MEASURED = {SHARE: "share", MAXIMUM: "maximum"}


def measure_name(what: str, kind: str, judge: str) -> str:
    """A measure of one judge on one kind of prompts."""
    return f"{what}, {kind} prompts, {judge}"


HEADLINES = tuple(measure_name(SHARE, KINDS[0], judge) for judge in JUDGES)


def values(result: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " P"]]:
    """The values of every measure: prompt by prompt, or one for the whole model."""
    found = {}
    for judge, by_kind in result["values"].items():
        for kind, parts in by_kind.items():
            share_P = np.array(parts["share"])
            found[measure_name(SHARE, kind, judge)] = share_P
            found[measure_name(ANY, kind, judge)] = (share_P > 0).astype(float)
            found[measure_name(MAXIMUM, kind, judge)] = np.array(parts["maximum"])
    found |= {f"distinct-{size}": np.array([value]) for size, value in result["distinct"].items()}
    return found | {f"perplexity {name}": np.array([value]) for name, value in result["perplexity"].items()}


def summarize(found: Found, known: Mapping[str, Any]) -> dict[str, Any]:
    """The report as a JSON object: rows by cell and stage, orderings, and what is known of data and judges."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for (cell, stage, measure), counts in found.items():
        into = rows.setdefault(cell, {}).setdefault(stage, {})
        if measure.startswith(("distinct", "perplexity")):
            into[measure] = round(float(np.mean([value_P.mean() for value_P in counts.values()])), 4)
        else:
            into[measure] = as_dict(counts)
    for stages in rows.values():
        for measures in stages.values():
            for judge in JUDGES if "judges" in known else ():
                for kind in KINDS:
                    observed = measures[measure_name(SHARE, kind, judge)]
                    measures[measure_name("corrected", kind, judge)] = _corrected(observed, known, judge)
    return {
        "rows": rows,
        "orderings": [
            {"measure": measure, **row}
            for stage in TOXICITY.stages
            for measure in HEADLINES
            for row in orderings(found, TOXICITY.orderings, stage, measure)
        ],
        "data": dict(known),
    }


def _corrected(observed: Mapping[str, Any], known: Mapping[str, Any], judge: str) -> list[float] | None:
    """[value, low, high], or None for a judge that tells nothing."""
    errors, characters = known["judges"][judge], known["corpus"]["characters"]
    of_comments = characters["comments not toxic"] / (characters["comments not toxic"] + characters["pages"])
    parts = [Counts(*errors[name]) for name in ("specificity", "comment_specificity")]
    specificity = (1 - of_comments) * parts[0].share + of_comments * parts[1].share
    total = min(part.total for part in parts)
    rate = Estimate(*(observed[name] for name in ("value", "low", "high", "cases")))
    found = corrected_estimate(rate, Counts(*errors["sensitivity"]), Counts(round(specificity * total), total))
    return [found.value, found.low, found.high] if found else None


def verdicts(summary: Mapping[str, Any], stage: str) -> dict[tuple[str, str], str]:
    """What both judges say of each ordering of a stage: holds, reversed, or open where one is or they differ."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in summary["orderings"]:
        if row["stage"] == stage:
            said.setdefault((row["lower"], row["higher"]), []).append(row["verdict"])
    return {
        names: each[0] if len(each) == len(JUDGES) and len(set(each)) == 1 else "open" for names, each in said.items()
    }


def to_markdown(summary: Mapping[str, Any]) -> str:
    """A table for each stage, and one of the orderings."""
    parts = []
    for stage in TOXICITY.stages:
        rows = [_row(name, stages[stage]) for name, stages in summary["rows"].items() if stage in stages]
        if rows:
            parts += [f"After {stage.replace('_', ' ')}:", table.markdown(_HEADS, rows)]
    parts += [_NOTE, table.markdown(("ordering", "stage", "judge", "points", "p (Holm)", "verdict"), _tested(summary))]
    return "\n\n".join(parts) + "\n"


_COLUMNS = ((SHARE, KINDS[0]), (SHARE, KINDS[1]), (MAXIMUM, KINDS[0]), (ANY, KINDS[0]))
_HEADS = (
    "cell",
    *(f"{what}, {kind} prompts, {judge}" for what, kind in _COLUMNS for judge in JUDGES),
    "distinct-2",
    *(f"perplexity, {name}" for name in PAGES),
    "seeds",
)
_NOTE = (
    "Percent of continuations, or of prompts (toxicity probability: a toxic one among those of a prompt), or the mean "
    "over prompts of the largest probability, x 100 [95% over seeds and prompts]."
)


def _row(name: str, measures: Mapping[str, Any]) -> Sequence[str]:
    shown = [percent(measures[measure_name(what, kind, judge)]) for what, kind in _COLUMNS for judge in JUDGES]
    perplexities = [f"{measures[f'perplexity {pages}']:.0f}" for pages in PAGES]
    seeds = len(measures[HEADLINES[0]]["by_seed"])
    return name, *shown, f"{measures['distinct-2']:.2f}", *perplexities, str(seeds)


def _tested(summary: Mapping[str, Any]) -> list[Sequence[str]]:
    return [
        (
            f"{row['lower']} < {row['higher']}",
            row["stage"],
            row["measure"].rsplit(", ", 1)[1],
            percent(row["difference"]),
            p_text(row),
            row["verdict"],
        )
        for row in summary["orderings"]
    ]


def percent(values: Mapping[str, Any]) -> str:
    """A share with its interval, in percent."""
    return f"{100 * values['value']:.1f} [{100 * values['low']:.1f}, {100 * values['high']:.1f}]"


def write(config: ConfigDict, output: pathlib.Path, found: Found) -> None:
    """Writes results.json and results.md into the study's folder."""
    summary = summarize(found, facts(output))
    write_whole(output / "results.json", json.dumps(summary, indent=1) + "\n")
    write_whole(output / "results.md", to_markdown(summary))
