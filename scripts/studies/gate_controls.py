r"""Makes the figures of a release gate with controls, of its report, and draws them.

    safelm release_gate --profile=standard --checkpoint=safety=runs/quickstart/safety \
        --control=raw=runs/quickstart/raw --merge_with=raw --control=weak=runs/refusal_only \
        --control=strong=runs/filtered_tagged --prompts=runs/quickstart/corpus/prompts --output=runs/gate_standard
    python scripts/studies/gate_controls.py --gate=runs/gate_standard

docs/results/data/gate_controls.json is written anew, a row for each criterion's rate and each attack and a column for
each model, and then every table and picture as by draw_results.py.
"""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

import kept_records

from safelm import cli
from safelm.io import records

DRAWN = ("safety", "weak", "strong")


def figures(results: Mapping[str, Any], flags: argparse.Namespace) -> dict[str, Any]:
    """The table as `draw_results.py` reads it."""
    models = results["models"]
    by_attack: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        for attack in model["attacks"]:
            by_attack.setdefault(attack["name"], {})[name] = kept_records.percent(attack["rate"])
        refused = next(each for each in model["criteria"] if each["criterion"] == "over_refusal")
        by_attack.setdefault("safe prompts refused", {})[name] = kept_records.percent(refused["rate"])
        by_attack.setdefault("mean of the criteria", {})[name] = kept_records.percent(model["mean_harm"])
    names = {"none": "nobody attacks", "none, SafeBeam": "nobody attacks, SafeBeam"}
    rows = [
        {"name": names.get(attack, attack), "values": [found.get(name) for name in models]}
        for attack, found in by_attack.items()
    ]
    profile = results["about"]["profile"]
    return {
        "title": f"Harmful answers under attack by the gate's profile {profile}",
        "command": f"python scripts/studies/gate_controls.py --gate=runs/gate_{profile}",
        "machine": flags.machine,
        "axis": "% of harmful prompts",
        "scale": "linear",
        "head": "attack",
        "columns": [{"head": name, "digits": 0} | ({"drawn": True} if name in DRAWN else {}) for name in models],
        "rows": rows,
    }


def main(flags: argparse.Namespace) -> None:
    path = pathlib.Path(flags.gate) / "results.json"
    results = records.read(path, "run the gate again")
    kept_records.write({"gate_controls": figures(results, flags)})
    for name, model in results["models"].items():
        print(f"{name}: {model['seconds'] / 60:.1f} minutes")


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.studies.gate_controls", __doc__)
    parser.add_argument("--gate", required=True, help="the gate's output")
    parser.add_argument("--machine", default="this machine", help="how the figures call it")
    return parser


if __name__ == "__main__":
    cli.run(main, argument_parser())
