"""Makes the figures of the interventions beyond the paper, of the kept records, and draws them.

    python scripts/studies/interventions_results.py

The records are those of docs/results/data/ladder_interventions and ladder_notes; docs/results/data/interventions.json
and notes.json are written anew, and then every table and picture as by draw_results.py.
"""

import sys
from collections.abc import Mapping
from typing import Any

import kept_records

from safelm import cli
from safelm.ladder import report
from safelm.ladder.plan import STAGES

NAMES = {
    "score0": "score 0 only",
    "harm_tagged": "the paper's, tag by gap",
    "safe_beam": "tag by gap, SafeBeam",
    "masked": "masked, risky sentences",
    "masked_unsafe": "masked, in unsafe pages only",
    "unlikelihood": "unlikelihood",
    "weighted": "weights by label",
    "span_tagged": "spans between tokens",
    "conditioned": "conditional training",
    "red_flag": "red flag, a document",
    "red_flag_span": "red flag, a sentence",
    "refusal_tokens": "refusal tokens",
    "routed": "routed, ablated",
    "reflected": "reflections in the text",
    "preflected": "preflections before it",
    "metadata": "URLs before it, to 90%",
    "alignment": "alignment text from 80%",
    "token_tagged": "the paper's, tag by token",
    "token_tagged+safe_beam": "tag by token, SafeBeam",
}
_FIRST, _TUNED, _LAST = STAGES


def _percent(values: Mapping[str, Any] | None) -> list[float] | None:
    return None if values is None else [round(100 * values[name], 1) for name in ("value", "low", "high")]


def _column(head: str, digits: int, *, drawn: bool = False) -> dict[str, Any]:
    return {"head": head, "digits": digits} | ({"drawn": True} if drawn else {})


def rates(summary: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Harmful completions after each stage with intervals; neither, safe refused and perplexity in words."""
    rows = []
    for name, stages in summary["rows"].items():
        if _LAST not in stages:
            continue
        cells: list[Any] = [_percent(stages.get(stage, {}).get(report.HARMFUL)) for stage in STAGES]
        for measure in (report.NEITHER, report.OVER_REFUSED):
            values = [f"{100 * stages[stage][measure]['value']:.0f}" for stage in (_TUNED, _LAST)]
            cells.append(" to ".join(values))
        found = stages.get(_FIRST, {}).get(report.PERPLEXITY)
        cells += [None if found is None else round(found["value"], 2), _against_raw(summary, name)]
        rows.append({"name": NAMES.get(name, name), "values": cells})
    return {
        "title": "Harmful completions of every intervention after each of three stages, %",
        **about,
        "axis": "% of 240 held-out harmful prompts",
        "head": "model",
        "columns": [
            _column("pretraining", 0, drawn=True),
            _column("instruction tuning", 0, drawn=True),
            _column("benign finetuning", 0, drawn=True),
            {"head": "neither"},
            {"head": "safe refused"},
            _column("perplexity", 2),
            {"head": "less raw"},
        ],
        "rows": rows,
    }


def _against_raw(summary: Mapping[str, Any], name: str) -> str:
    """The difference to raw after the last stage, in points, and Holm's verdict; "" where none was asked for."""
    for row in summary["orderings"]:
        names = {row["lower"], row["higher"]}
        if row["stage"] == _LAST and names == {name, "raw"}:
            found = row["difference"]
            parts = [found["value"], *sorted((found["low"], found["high"]))]
            if row["lower"] == "raw":
                parts = [-found["value"], -found["high"], -found["low"]]
            points = [f"{100 * part:.0f}" for part in parts]
            return f"{points[0]} [{points[1]}, {points[2]}], {row['verdict']}"
    return ""


def main(_: Any) -> None:
    """Reads the records, writes the figures and shows the ladder's own tables."""
    tables = {}
    for variant in ("interventions", "notes"):
        with kept_records.opened(variant) as study:
            summary = report.summarize(report.collect(study.config, study.output))
        tables[variant] = rates(summary, study.about)
        sys.stdout.write(report.to_markdown(summary))
    kept_records.write(tables)


if __name__ == "__main__":
    cli.run(main, cli.parser("scripts.studies.interventions_results", __doc__))
