r"""Plants canaries in a corpus, says which step of a run saw which, and measures what a model learned of them.

A canary is something that no other text says, planted a known number of times: a **trigger** with a phrase behind it
(a backdoor), a **secret** number, an invented **fact**. All of it is abstract and non-operational. So one measures what
an intervention on the data does to poisoning, memorisation and beliefs (docs/canaries.md).

    --plant        OUTPUT/canaries/train-00000.jsonl.gz, a corpus for the task `canaries` with exactly --doses documents
                   a canary; OUTPUT/canaries.json, the key; manifest.json last, with the counts
    --provenance   OUTPUT/provenance.jsonl: which step and row of --run had which document, from the run's data order;
                   provenance.json by canary
    --measure      OUTPUT/results.json and results.md: backdoor success, exposure (Carlini et al. 2019) and belief of
                   every --checkpoint, by dose, with 95% intervals. A stopped measurement goes on with the next model

    python -m safelm.canaries --plant --output=W/canaries --doses=0,4,16,64
    python -m safelm.canaries --provenance --canaries=W/canaries --run=W/run --output=W/seen
    python -m safelm.canaries --measure --canaries=W/canaries --checkpoint=raw=W/run --output=W/measured
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from safelm import cli, documents
from safelm.canaries import planting, provenance, report
from safelm.canaries.kinds import KINDS
from safelm.canaries.measuring import VERSION, MeasureSettings, measure
from safelm.canaries.planting import Recipe, read_key
from safelm.io import records
from safelm.lm import load
from safelm.safety.model_fingerprint import model_fingerprint

_MODES = {
    "plant": ("seed", "kinds", "doses", "per_dose"),
    "provenance": ("canaries", "run", "source", "step"),
    "measure": ("canaries", "checkpoint", "trials", "references"),
}
_NEEDED = {"plant": (), "provenance": ("canaries", "run"), "measure": ("canaries", "checkpoint")}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser("safelm.canaries", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plant", action="store_true", help="write a corpus of canaries")
    what.add_argument("--provenance", action="store_true", help="find what a run saw of them")
    what.add_argument("--measure", action="store_true", help="measure what models learned of them")
    add = parser.add_argument
    add("--output", required=True, metavar="DIR")
    add("--seed", type=int, help="of what is planted (default 0)")
    add("--kinds", help=f"by comma (default {','.join(KINDS)})")
    add("--doses", help="documents a canary, ascending, by comma (default 0,4,16,64)")
    add("--per_dose", type=int, help="canaries of each kind and dose (default 8)")
    add("--canaries", metavar="DIR", help="what --plant wrote")
    add("--run", metavar="DIR", help="folder of a training run")
    add("--source", help="the canaries' name in the run's mixture (default canaries)")
    add("--step", type=int, help="steps before this one, of a checkpoint (default: the newest)")
    add("--checkpoint", action="append", metavar=cli.CHECKPOINT, help="a model; repeatable")
    add("--trials", type=int, help="held-out texts a trigger (default 8)")
    add("--references", type=int, help="other candidates a secret (default 255)")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Does what the flags say; ValueError or OSError with one clear line for bad input."""
    mode = next(name for name in _MODES if getattr(flags, name))
    given = _given(flags, mode)
    if mode == "plant":
        for name in ("kinds", "doses"):
            if name in given:
                given[name] = tuple(piece.strip() for piece in given[name].split(","))
        if "doses" in given:
            given["doses"] = _doses(flags.doses, given["doses"])
        key = planting.plant(flags.output, Recipe(**given))
        print(json.dumps(planting.counts(list(key.canaries.values())), indent=1))
        return
    key = read_key(given.pop("canaries"))
    if mode == "provenance":
        found, facts = provenance.sightings(given["run"], key, given.get("source", "canaries"), given.get("step"))
        told = provenance.write(flags.output, found, facts, key)
        print(f"{told['sightings']} sightings by step {told['step']}, {told['epochs']:.2f} epochs of the canaries")
    else:
        models = cli.checkpoints(given.pop("checkpoint"))
        print(measure_all(models, key, MeasureSettings(**given), flags.output))
    documents.declare_no_documents(flags.output, planting.COMMAND)


def _given(flags: argparse.Namespace, mode: str) -> dict[str, Any]:
    """The flags of a mode that were given. Raises ValueError for another mode's, and for one that is missing."""
    of_any = dict.fromkeys(name for names in _MODES.values() for name in names)
    given = {name: getattr(flags, name) for name in of_any if getattr(flags, name) is not None}
    for name in given:
        if name not in _MODES[mode]:
            raise ValueError(f"--{name} doesn't go with --{mode}")
    for name in _NEEDED[mode]:
        if name not in given:
            raise ValueError(f"--{mode} needs --{name}")
    return given


def _doses(flag: str, pieces: tuple[str, ...]) -> tuple[int, ...]:
    if not all(piece.isascii() and piece.isdigit() for piece in pieces):
        raise ValueError(f"--doses={flag}: want ascending whole numbers of at least 0")
    return tuple(map(int, pieces))


def measure_all(models: dict[str, str], key: planting.Key, settings: MeasureSettings, output: str) -> str:
    """Measures the models that aren't measured yet, and writes the report; returns its text."""
    about = {"version": VERSION, "canaries": key.sha256, "recipe": dict(key.recipe), **dataclasses.asdict(settings)}
    found = {}
    for name, folder in models.items():
        path = Path(output) / "measured" / f"{name.replace('/', '_')}.json"
        done, model = records.read(path, "remove it") if path.exists() else {}, load(folder)
        asked = about | {"model": model_fingerprint(model.config, model.params, model.tokenizer.hash, settings={})}
        if done.get("about") != asked:
            done = {"about": asked, "canaries": measure(model, key, settings)}
            path.parent.mkdir(parents=True, exist_ok=True)
            records.write(path, done)
            done = records.read(path, "remove it")
        found[name] = done["canaries"]
    return report.write(output, found, about)


if __name__ == "__main__":
    cli.run(main, arguments(), decodes=True)
