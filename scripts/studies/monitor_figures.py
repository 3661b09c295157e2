"""Writes the figures of docs/results/monitors.md from what `safelm evaluate` left.

    python scripts/studies/monitor_figures.py --monitors=W/monitors/monitors.json --machine='...' --command='...' \
        --output=docs/results/data
    python scripts/studies/monitor_figures.py --steered=W/steered/results.json --machine='...' --command='...' \
        --output=docs/results/data

Then `python scripts/studies/draw_results.py` draws the pictures and writes the tables.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
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
ORDER = ("greedy", "safe_beam")  # then the others
AREAS = ("prompt", "answer", "token")


def _interval(found: Mapping[str, Any] | None, scale: float = 1.0, digits: int = 1) -> list[float] | None:
    return found and [round(scale * found[name], digits) for name in ("value", "low", "high")]


def of_monitors(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The comparison of monitors as three studies, by file: what they tell, their alarms, their costs."""
    rows: dict[str, list[dict[str, Any]]] = {"monitors": [], "monitor_alarms": [], "monitor_costs": []}
    for name, of in found.items():
        shown = NAMES.get(name, name) + f", every {of['every']}" * (of["every"] > 1)
        alarms = [_interval(of.get(what), 100) for what in ("detected", "false_alarms", "alarms_on_declined")]
        paid = [round(100 * of["cost"][what], 2) for what in ("extra_share", "reading_share")]
        where = "logits" if of["layer"] is None else f"layer {of['layer']}"
        values = {
            "monitors": [_interval(of.get(f"{what}_auroc"), digits=3) for what in AREAS],
            "monitor_alarms": [*alarms, _interval(of.get("delay"))],
            "monitor_costs": [where, *paid, round(of["cost"]["microseconds"], 1)],
        }
        for file, row in values.items():
            rows[file].append({"name": shown, "values": row})
    return {
        "monitors": _study(
            "What monitors tell of prompts, answers and tokens",
            "AUROC",
            "monitor",
            {f"AUROC, {what}s": {"digits": 3, "drawn": True} for what in AREAS},
            rows["monitors"],
        ),
        "monitor_alarms": _study(
            "Alarms at thresholds set on development's safe chats",
            "% of answers with an alarm",
            "monitor",
            {
                "detected, %": {"digits": 1, "drawn": True},
                "false alarms, %": {"digits": 1, "drawn": True},
                "on refusals, %": {"digits": 1, "drawn": True},
                "delay, tokens": {"digits": 1},
            },
            rows["monitor_alarms"],
        ),
        "monitor_costs": _study(
            "What monitors cost a token, of the model's forward",
            "FLOPs of a token, % of a forward",
            "monitor",
            {
                "reads": {},
                "beside decoding, %": {"digits": 2, "drawn": True},
                "to read a text, %": {"digits": 1, "drawn": True},
                "us a token": {"digits": 1},
            },
            rows["monitor_costs"],
        ),
    }


def _study(
    title: str, axis: str, head: str, columns: Mapping[str, Mapping[str, Any]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    shown = [{"head": name, "unit": "", **more} for name, more in columns.items()]
    return {"title": title, "axis": axis, "scale": "linear", "head": head, "columns": shown, "rows": rows}


def of_steering(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """SafeBeam by each monitor as a study, by file."""
    rows = []
    for run in sorted(runs, key=lambda run: (*ORDER, run["method"]).index(run["method"])):
        of_monitor = run["method"].removeprefix("safe_beam_")
        shown = NAMES.get(run["method"]) or f"SafeBeam by {NAMES.get(of_monitor, of_monitor)}"
        rates = ("harmful_completion", "neither_harmful", "wrongly_refused", "answered_safe")
        rows.append({"name": shown, "values": [_interval(run[rate], 100) for rate in rates]})
    heads = {"harmful, %": True, "neither, %": True, "safe refused, %": True, "safe answered, %": False}
    columns = {head: {"digits": 1, "drawn": drawn} for head, drawn in heads.items()}
    title = "SafeBeam by each monitor on the quickstart's held-out prompts"
    return {"safe_beam_monitors": _study(title, "% of prompts", "decoding", columns, rows)}


def main(flags: argparse.Namespace) -> None:
    """Writes the studies' files."""
    read = [records.read(path, "measure again") for path in flags.monitors or flags.steered]
    if flags.monitors:
        studies = of_monitors({name: of for each in read for name, of in each["monitors"].items()})
    else:
        studies = of_steering([run for each in read for run in each["runs"]])
    for name, study in studies.items():
        facts = {"title": study.pop("title"), "command": flags.command, "machine": flags.machine}
        text = json.dumps(facts | study, indent=2, ensure_ascii=False) + "\n"
        print(write_whole(flags.output / f"{name}.json", text))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.studies.monitor_figures", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--monitors", action="append", type=pathlib.Path, help="monitors.json; repeatable")
    what.add_argument("--steered", action="append", type=pathlib.Path, help="results.json; repeatable")
    parser.add_argument("--command", required=True, help="the command that measured")
    parser.add_argument("--machine", required=True, help="where")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder, docs/results/data")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
