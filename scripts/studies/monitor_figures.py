"""Writes the figures of docs/results/monitors.md from what `safelm evaluate` left.

    python scripts/studies/monitor_figures.py --monitors=W/monitors/monitors.json --machine='...' --command='...' \
        --output=docs/results/data/monitors.json
    python scripts/studies/monitor_figures.py --steered=W/steered/results.json --machine='...' --command='...' \
        --output=docs/results/data/safe_beam_monitors.json

Then `python scripts/studies/draw_results.py` draws the pictures and writes the tables.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safelm import cli
from safelm.io import records
from safelm.io.files import write_whole

NAMES = {
    "tag": "P(tag)",
    "probe": "linear probe",
    "token_head": "token head",
    "header_probe": "probe at the header",
    "refusal": "P(refusal) at the header",
    "greedy": "greedy",
    "safe_beam": "SafeBeam by P(tag)",
    "safe_beam_floor": "SafeBeam by P(tag), drop_above 0.001",
}
AREAS = ("prompt", "answer", "token")


def _interval(found: Mapping[str, Any] | None, scale: float = 1.0, digits: int = 1) -> list[float] | None:
    return found and [round(scale * found[name], digits) for name in ("value", "low", "high")]


def of_monitors(found: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison of monitors as a study."""
    rows = []
    for name, of in found["monitors"].items():
        areas = [_interval(of.get(f"{what}_auroc"), digits=3) for what in AREAS]
        rates = [_interval(of.get(what), 100) for what in ("detected", "false_alarms", "alarms_on_declined")]
        paid = [round(100 * of["cost"][what], 2) for what in ("extra_share", "reading_share")]
        where = "logits" if of["layer"] is None else f"layer {of['layer']}"
        values = [where, *areas, *rates, _interval(of.get("delay")), *paid, round(of["cost"]["microseconds"], 1)]
        rows.append({"name": NAMES.get(name, name), "values": values})
    heads = [("reads", {})]
    heads += [(f"AUROC, {what}s", {"digits": 3, "drawn": True}) for what in AREAS]
    heads += [(what, {"digits": 1}) for what in ("detected, %", "false alarms, %", "on declined, %", "delay, tokens")]
    heads += [("beside decoding, %", {"digits": 2}), ("to read, %", {"digits": 1}), ("us a token", {"digits": 1})]
    return {
        "title": "Monitors on the quickstart's held-out prompts and answers",
        "axis": "AUROC",
        "scale": "linear",
        "head": "monitor",
        "columns": [{"head": head, "unit": "", **more} for head, more in heads],
        "rows": rows,
    }


def of_steering(found: Mapping[str, Any]) -> dict[str, Any]:
    """SafeBeam by each monitor as a study."""
    rows = []
    for run in found["runs"]:
        name = run["method"]
        of_monitor = name.removeprefix("safe_beam_")
        shown = NAMES.get(name) or f"SafeBeam by {NAMES.get(of_monitor, of_monitor)}"
        rates = ("harmful_completion", "neither_harmful", "wrongly_refused", "answered_safe")
        rows.append({"name": shown, "values": [_interval(run[rate], 100) for rate in rates]})
    heads = {"harmful, %": True, "neither, %": True, "safe refused, %": True, "safe answered, %": False}
    return {
        "title": "SafeBeam by each monitor on the quickstart's held-out prompts",
        "axis": "% of prompts",
        "scale": "linear",
        "head": "decoding",
        "columns": [{"head": head, "unit": "", "digits": 1, "drawn": drawn} for head, drawn in heads.items()],
        "rows": rows,
    }


def main(flags: argparse.Namespace) -> None:
    path, make = (flags.monitors, of_monitors) if flags.monitors else (flags.steered, of_steering)
    study = make(records.read(path, "measure again"))
    facts = {"title": study.pop("title"), "command": flags.command, "machine": flags.machine}
    write_whole(flags.output, json.dumps(facts | study, indent=2, ensure_ascii=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.studies.monitor_figures", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--monitors", type=pathlib.Path, help="monitors.json of safelm evaluate monitors")
    what.add_argument("--steered", type=pathlib.Path, help="results.json of safelm evaluate --monitor")
    parser.add_argument("--command", required=True, help="the command that measured")
    parser.add_argument("--machine", required=True, help="where")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="file in docs/results/data")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
