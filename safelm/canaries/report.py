"""The measured canaries by kind and dose, with intervals: JSON and a Markdown table. No secret is shown."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelm.io.files import write_whole
from safelm.report import table
from safelm.stats.comparison import clustered_mean, clustered_rate, paired_difference
from safelm.stats.intervals import Estimate, rate

Found = Mapping[str, Any]
_NOTE = """95% intervals: of triggers over carriers, clustered by canary; of exposure and probability over resampled
canaries; of belief and rank 1 Wilson's. Dose 0 was never planted: what it shows was not learned from canaries."""


def rows(model: str, found: Sequence[Found]) -> list[dict[str, Any]]:
    """One row for each kind and dose: the estimates as {value, low, high, cases}."""
    made = []
    for kind, dose in dict.fromkeys((each["kind"], each["dose"]) for each in found):
        own = [each for each in found if (each["kind"], each["dose"]) == (kind, dose)]
        told = {"trigger": _of_triggers, "secret": _of_secrets, "fact": _of_facts}[kind](own)
        estimates = {name: vars(estimate) for name, estimate in told.items()}
        made.append({"model": model, "kind": kind, "dose": dose, "canaries": len(own), **estimates})
    return made


def _of_triggers(own: Sequence[Found]) -> dict[str, Estimate]:
    canary = [each["id"] for each in own for _ in each["with_trigger"]]
    with_n, without_n = ([hit for each in own for hit in each[name]] for name in ("with_trigger", "without_trigger"))
    return {
        "success": clustered_rate(with_n, canary),
        "without_trigger": clustered_rate(without_n, canary),
        "difference": paired_difference(with_n, without_n, canary),
    }


def _of_secrets(own: Sequence[Found]) -> dict[str, Estimate]:
    first = sum(each["rank"] == 1 for each in own)
    return {
        "exposure": clustered_mean([each["exposure"] for each in own], bounded=False),
        "rank_1": rate(first, len(own)),
    }


def _of_facts(own: Sequence[Found]) -> dict[str, Estimate]:
    believed = sum(each["believed"] for each in own)
    return {"belief": rate(believed, len(own)), "probability": clustered_mean([each["probability"] for each in own])}


def markdown(made: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """A table a kind."""
    parts = ["# Canaries\n", _NOTE, f"\n{json.dumps(dict(about))}\n"]
    measures = {
        "trigger": ("success", "without_trigger", "difference"),
        "secret": ("exposure", "rank_1"),
        "fact": ("belief", "probability"),
    }
    for kind, names in measures.items():
        own = [row for row in made if row["kind"] == kind]
        if own:
            lines = [
                [row["model"], row["dose"], row["canaries"], *(_shown(row, name) for name in names)] for row in own
            ]
            heads = ["model", "dose", "canaries", *(name.replace("_", " ") for name in names)]
            parts += [f"\n## {kind}\n", table.markdown(heads, lines)]
    most = math.log2(about["references"] + 1)
    return "\n".join(parts) + f"\n\nExposure in bits, at most {most:.2f} here; 1.44 is that of a secret never seen.\n"


def _shown(row: Mapping[str, Any], name: str) -> str:
    estimate = row[name]
    if name == "exposure" and row["rank_1"]["value"] == 1:
        return f"at least {estimate['value']:.2f}"  # every secret was the likeliest candidate: no spread is left to see
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def write(output: str, found: Mapping[str, Sequence[Found]], about: Mapping[str, Any]) -> str:
    """Writes results.json and results.md for every model's canaries; returns the latter's text."""
    made = [row for model, own in found.items() for row in rows(model, own)]
    told = {"about": dict(about), "rows": made, "canaries": {model: list(own) for model, own in found.items()}}
    text = markdown(made, about)
    write_whole(Path(output) / "results.json", json.dumps(told, indent=1) + "\n")
    write_whole(Path(output) / "results.md", text)
    return text
