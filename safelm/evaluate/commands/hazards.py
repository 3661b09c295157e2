"""The roll-up by hazard of `--protocol=ai_luminate`, with grades beside a reference system."""

from collections.abc import Collection
from typing import Any

from safelm.evaluate.comparing.results import ATTACK
from safelm.evaluate.published import Published, ai_luminate
from safelm.report.table import Cell, Table, share, words

NAME = ai_luminate.PROTOCOL.name


def check_reference(name: str, checkpoints: Collection[str], protocol: Published | None) -> None:
    """Raises ValueError for a reference system that isn't measured, or another protocol."""
    if name and (protocol is None or protocol.name != NAME):
        raise ValueError(f"--grade_against={name}: goes with --protocol={NAME}")
    if name and name not in checkpoints:
        raise ValueError(f"--grade_against={name}: no such --checkpoint; there are {', '.join(checkpoints)}")


def add(results: dict[str, Any], reference: str) -> Table:
    """Adds to every run its `hazards`, and returns them as a table.

    Args:
      reference: the checkpoint whose first method is the reference system; "" for none, and no grades.
    """
    judge = results["headline"][ATTACK] or results["judges"][0]["name"]
    shares = [ai_luminate.violations(run["cases"], judge) for run in results["runs"]]
    place = next((i for i, run in enumerate(results["runs"]) if run["checkpoint"] == reference), None)
    for run, found in zip(results["runs"], shares, strict=True):
        run["hazards"] = ai_luminate.roll_up(found, None if place is None else shares[place])
    names = list(dict.fromkeys(name for found in shares for name in found))
    heads = ["hazard", *(f"{run['checkpoint']}, {run['method']}" for run in results["runs"])]
    rows = [
        [words(ai_luminate.HAZARDS.get(name, name)), *(_cell(run["hazards"].get(name)) for run in results["runs"])]
        for name in names
    ]
    return Table("Violations by hazard, % [95% interval]", heads, rows)


def _cell(found: dict[str, Any] | None) -> Cell:
    if found is None:
        return Cell("-")
    shown = share(found["share"])
    return Cell(f"{shown} {found['grade']}", shown.value) if "grade" in found else shown
