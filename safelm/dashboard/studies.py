"""Results of `safelm.release_gate` and `safelm.ladder`. Neither names its prompts, so two files never compare."""

from collections.abc import Mapping
from typing import Any

from safelm.dashboard.measures import HIGH, LOW, Board, Column, Protocol, Row, cell_of
from safelm.evaluate.comparing.results import split_name
from safelm.io import records

GATE, LADDER = "safelm.release_gate", "safelm.ladder"
UNDER_ATTACK = "gate"  # in place of a decoding method: attacks have their own
_LADDER_MEASURES = {  # name in the ladder's results: which end is better, whether the matrix shows it at once
    "harmful completions": (LOW, True),
    "refused or redirected": (HIGH, False),
    "neither": (LOW, False),
    "wrongly refused safe": (LOW, False),
}


def is_gate(values: Mapping[str, Any]) -> bool:
    """Whether an object is the results of the release gate."""
    about = values.get("about")
    return isinstance(about, Mapping) and "profile" in about and isinstance(values.get("models"), Mapping)


def is_ladder(values: Mapping[str, Any]) -> bool:
    """Whether an object is the results of the ladder."""
    return isinstance(values.get("rows"), Mapping) and "orderings" in values


def add_gate(board: Board, values: Mapping[str, Any], prefix: str, source: str) -> None:
    """Adds the rate of every criterion that was measured, and of harmful answers under every attack."""
    key = _protocol(board, GATE, f"gate, {values['about']['profile']}", {**values["about"], "results": source})
    try:
        for name, found in values["models"].items():
            model, stage, seed = split_name(name)
            row = Row(prefix + model, stage, UNDER_ATTACK)
            for each in found["criteria"]:
                if each["rate"] is None:
                    continue  # not measured
                column = Column(key, "Criteria", f"{each['says']} (limit {100 * each['limit']:g}%)", LOW, shown=True)
                board.add(column, row, cell_of(each["rate"]), source=source, seed=seed)
            for each in found["attacks"]:
                title = f"harmful answers, {each['name'] if each['name'] != 'none' else 'nobody attacks'}"
                cell = cell_of(each["rate"])
                board.add(Column(key, "By attack", title, LOW), row, cell, source=source, seed=seed)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}: not results of {GATE}, or of another version (no {error})") from None


def add_ladder(board: Board, values: Mapping[str, Any], prefix: str, source: str) -> None:
    """Adds every cell of the ladder after every stage, over its seeds."""
    key = _protocol(board, LADDER, "ladder", {"results": source})
    try:
        for name, stages in values["rows"].items():
            for stage, measures in stages.items():
                for title, (better, shown) in _LADDER_MEASURES.items():
                    if title in measures:
                        column = Column(key, "Ladder", title, better, shown=shown)
                        board.add(column, Row(prefix + name, stage, ""), cell_of(measures[title]), source=source)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: not results of {LADDER}, or of another version (no {error})") from None


def _protocol(board: Board, tool: str, name: str, fields: Mapping[str, Any]) -> str:
    key = records.fingerprint([tool, fields])
    board.protocols[key] = Protocol(tool, name, fields)
    return key
