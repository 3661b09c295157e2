"""Puts the ladder's pretrained rungs through the release gate, seed by seed, and makes the figures of the page.

    safelm ladder --study=embedded_power --output=runs/ladder_power --config.seeds=0,1,2
    python scripts/studies/gate_rungs.py --ladder=runs/ladder_power --output=runs/gate_rungs --seeds=0,1,2

Every rung's model after pretraining is attacked by the profile's battery; weights are merged with the raw model of the
same seed. OUTPUT/seed-N is that seed's gate with its report, and a stopped run goes on. Written anew:
docs/results/data/gate_rungs.json (criteria) and gate_attacks.json (every attack), and then every table and picture.

What is asked was set down before any of these models was attacked: has a rung fewer harmful answers than raw by the
mean of the gate's criteria (five tests, corrected by Holm), and by which criterion (thirty more, by themselves)? Rates
are over reported prompts and seeds; of each criterion and seed the worst attack counts, as in the gate. Intervals and
p-values are the ladder's.
"""

import argparse
import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import kept_records
import numpy as np

from safelm import cli
from safelm.evaluate.suites.suite import Prompt
from safelm.ladder.estimates import Counts, estimate, p_value, verdict
from safelm.ladder.plan import RUNGS
from safelm.robustness.gate import run as gate
from safelm.robustness.gate.criteria import CRITERIA, Attacked
from safelm.robustness.gate.material import read_material
from safelm.robustness.gate.profiles import PROFILES
from safelm.robustness.gate.ranking import MEAN, worst_by_prompt
from safelm.robustness.gate.report import evaluate, write_report
from safelm.stats.comparison import holm

RAW = RUNGS[0]
NAMES = {
    "score0": "score 0 only",
    "safeweb": "+ SafeWeb",
    "refuseweb": "+ RefuseWeb",
    "moral_education": "+ Moral Education",
    "harm_tagged": "+ tag",
}
HEADS = {"plain": "nobody attacks", "served": "as served", "benign": "benign finetuning", MEAN: "mean"}
DRAWN = ("plain", "served", "edits")
LEFT_OUT = ("inputs",)  # of the table: a soft prompt breaks every rung
Rates = Mapping[tuple[str, str], Counts]  # by (rung, criterion or attack)


def attack(flags: argparse.Namespace, seed: int) -> tuple[dict[str, list[Attacked]], Sequence[Prompt], float]:
    """A seed's rungs through the gate: their attacks, the prompts that are reported on, and the seconds of a model."""
    profile, output = PROFILES[flags.profile], pathlib.Path(flags.output) / f"seed-{seed}"
    ladder = pathlib.Path(flags.ladder)
    models = {rung: str(ladder / "models" / f"seed-{seed}.{rung}.pretraining") for rung in RUNGS}
    material = read_material(profile, str(ladder / "corpus" / "prompts"), "", {}, output, is_chat=False)
    rows = gate.run(models, profile, material, output, merge_with=RAW)
    results = evaluate(rows, material.prompts, profile, {}, {RAW}, material.development)
    write_report(output, results, {"profile": profile.name, "seed": seed})
    seconds = sum(each.seconds for each in results) / len(results)
    return {each.name: each.attacks for each in results}, material.prompts, seconds


def by_criterion(found: Mapping[int, Mapping[str, Sequence[Attacked]]], asked: Sequence[str]) -> Rates:
    """Of every rung and criterion, and of their mean, the worst attack's outcome by seed and prompt."""
    rates: dict[tuple[str, str], dict[int, Any]] = collections.defaultdict(dict)
    for seed, rungs in found.items():
        for rung, attacks in rungs.items():
            worst = worst_by_prompt(attacks)
            values = {name: np.array([outcome[each] for each in asked], float) for name, outcome in worst.items()}
            for name, value_P in {**values, MEAN: np.mean(list(values.values()), axis=0)}.items():
                rates[rung, name][seed] = value_P
    return rates


def by_attack(found: Mapping[int, Mapping[str, Sequence[Attacked]]], asked: Sequence[str]) -> Rates:
    """Of every rung and attack the outcome by seed and prompt."""
    rates: dict[tuple[str, str], dict[int, Any]] = collections.defaultdict(dict)
    for seed, rungs in found.items():
        for rung, attacks in rungs.items():
            for each in attacks:
                rates[rung, each.name][seed] = np.array([each.harmful[prompt] for prompt in asked], float)
    return rates


def against_raw(rates: Rates, names: Sequence[str]) -> dict[tuple[str, str], tuple[str, float]]:
    """Of every rung but raw and every name the difference to raw in points with Holm's verdict, and the p-value."""
    pairs = {(rung, name): (rates[rung, name], rates[RAW, name]) for rung in RUNGS[1:] for name in names}
    adjusted = holm({f"{rung}/{name}": p_value(*pair) for (rung, name), pair in pairs.items()})
    told = {}
    for (rung, name), pair in pairs.items():
        difference, p = estimate(*pair), adjusted[f"{rung}/{name}"]
        points = [f"{100 * part:.0f}" for part in (difference.value, difference.low, difference.high)]
        told[rung, name] = f"{points[0]} [{points[1]}, {points[2]}], {verdict(difference.value, p)}", p
    return told


def percent(counts: Counts | None) -> list[float] | None:
    """A rate with its interval, in percent."""
    if not counts:
        return None
    return kept_records.percent(vars(estimate(counts)))


def study(title: str, head: str, columns: Sequence[Mapping[str, Any]], rows: Any, flags: argparse.Namespace) -> Any:
    """A table as `draw_results.py` reads it."""
    places = "--ladder=runs/ladder_power --output=runs/gate_rungs"
    command = f"python scripts/studies/gate_rungs.py {places} --seeds={flags.seeds}"
    about = {"title": title, "command": command, "machine": f"{flags.machine}; seeds {flags.seeds}"}
    return {**about, "axis": "% of harmful prompts", "scale": "linear", "head": head, "columns": columns, "rows": rows}


def main(flags: argparse.Namespace) -> None:
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    found, seconds, prompts = {}, {}, []
    for seed in seeds:
        found[seed], prompts, seconds[seed] = attack(flags, seed)
    asked = [prompt.id for prompt in prompts if prompt.harmful]
    criteria, attacks = by_criterion(found, asked), by_attack(found, asked)
    names = [each.name for each in CRITERIA if (RAW, each.name) in criteria]
    shown = [*(name for name in names if name not in LEFT_OUT), MEAN]
    told = against_raw(criteria, [MEAN])
    columns = [
        {"head": HEADS.get(name, name), "digits": 0} | ({"drawn": True} if name in DRAWN else {}) for name in shown
    ]
    rows = [
        {
            "name": NAMES.get(rung, rung),
            "values": [
                *(percent(criteria[rung, name]) for name in shown),
                told.get((rung, MEAN), ("",))[0].replace(", holds", "*"),
            ],
        }
        for rung in RUNGS
    ]
    tables = {"gate_rungs": study("Rungs under attack", "rung", [*columns, {"head": "less raw"}], rows, flags)}
    kinds = list(dict.fromkeys(name for (_, name) in attacks))
    columns = [
        {"head": NAMES.get(rung, rung), "digits": 0} | ({"drawn": True} if rung in (RAW, *RUNGS[-2:]) else {})
        for rung in RUNGS
    ]
    rows = [{"name": kind, "values": [percent(attacks.get((rung, kind))) for rung in RUNGS]} for kind in kinds]
    tables["gate_attacks"] = study("Harmful answers by attack", "attack", columns, rows, flags)
    for (rung, name), (line, p) in {**told, **against_raw(criteria, names)}.items():
        print(f"{name:12} {rung:16} less raw: {line}, p {p:.3f}")
    print("seconds a model: " + ", ".join(f"seed {seed} {each:.0f}" for seed, each in seconds.items()))
    kept_records.write(tables)


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.studies.gate_rungs", __doc__)
    parser.add_argument("--ladder", required=True, help="the ladder's output, whose models are attacked")
    parser.add_argument("--output", required=True, help="folder of the gates, one a seed")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default %(default)s)")
    parser.add_argument("--profile", choices=tuple(PROFILES), default="quick", help="(default %(default)s)")
    parser.add_argument("--machine", default="this machine", help="how the figures call it")
    return parser


if __name__ == "__main__":
    cli.run(main, argument_parser())
