"""Makes the figures of the scaling law in docs/results/ladder.md of the kept records, then all tables and pictures.

    python scripts/studies/scaling_results.py

The records are those of docs/results/data/ladder_scaling; docs/results/data/scaling.json and scaling_held_out.json are
written anew.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import kept_records

from safelm import cli
from safelm.ladder import report, scaling

NAMES = {report.HARMFUL: "harmful", report.OVER_REFUSED: "safe refused", scaling.AUROC: "P(tag) AUROC"}


def laws(summary: Mapping[str, Any], about: Mapping[str, str]) -> dict[str, Any]:
    """The slopes of every law, and what its intervals cover."""
    rows = []
    for measure, entry in summary["laws"].items():
        slopes = [[round(value, 2) for value in entry["slopes"][name]] for name in ("by_size", "by_tokens")]
        covered = [round(100 * entry["coverage"][part]) for part in ("value", "low", "high")]
        told = f"{entry['held_out_covered']} of {len(entry['held_out'])}"
        rows.append({"name": NAMES[measure], "values": [*slopes, round(entry["spread"], 2), covered, told]})
    return {
        "title": "What a tenfold size and a tenfold budget do, in logits",
        **about,
        "axis": "logits (95% interval)",
        "head": "measure",
        "columns": [
            {"head": "a tenfold size", "drawn": True, "digits": 2},
            {"head": "a tenfold budget", "drawn": True, "digits": 2},
            {"head": "spread, a run", "digits": 2},
            {"head": "covered, a size left out, %", "digits": 0},
            {"head": "covered, the fifth size"},
        ],
        "rows": rows,
    }


def held_out(summary: Mapping[str, Any], about: Mapping[str, str]) -> dict[str, Any]:
    """The fifth size: what was predicted, and what was found."""
    rows = []
    for measure, entry in summary["laws"].items():
        for tokens in sorted({run["tokens"] for run in entry["held_out"]}):
            runs = [run for run in entry["held_out"] if run["tokens"] == tokens]
            predicted = [round(100 * value, 1) for value in runs[0]["predicted"]]
            cells = [predicted, _percents([run["value"] for run in runs])]
            rows.append({"name": f"{NAMES[measure]}, {tokens:,} tokens", "values": cells})
    return {
        "title": "The fifth size, 1.63M parameters, before and after, %",
        **about,
        "axis": "% (AUROC: hundredths), 95% prediction interval",
        "head": "measure, budget",
        "columns": [{"head": "predicted", "drawn": True, "digits": 1}, {"head": "found, two seeds"}],
        "rows": rows,
    }


def _percents(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)


def main(arguments: argparse.Namespace) -> None:
    with kept_records.opened("scaling") as study:
        summary = scaling.summarize(study.config, study.output, report.collect(study.config, study.output))
    kept_records.write({"scaling": laws(summary, study.about), "scaling_held_out": held_out(summary, study.about)})
    print(scaling.to_markdown(summary))


if __name__ == "__main__":
    cli.run(main, cli.parser("scripts.studies.scaling_results", __doc__))
