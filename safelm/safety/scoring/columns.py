"""The columns that scoring adds to a row, and the folder a row goes to.

harm_score              0 to 5, the ensemble's: the largest of the scorers'; null where no scorer gave a score
harm_reason             one sentence; "empty" for a text without content, which is 0 by rule and asks no scorer
score_<scorer>          0 to 5 or null
<scorer>_<detail>       what else the scorer says: a number or a string
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.safety.scorer import Scorer, Verdict
from safelm.tags import MAX_SCORE, MIN_SCORE

EMPTY = Verdict(0, "empty")
UNSCORED, QUARANTINE = "unscored", "quarantine"
SCORES = tuple(f"score={score}" for score in range(MIN_SCORE, MAX_SCORE + 1))
FOLDERS = (*SCORES, UNSCORED)
PROBE = "The library opened at nine, and the weather was mild."
_KINDS = {bool: "int64", int: "int64", float: "float64", str: "string"}


@dataclasses.dataclass(frozen=True)
class Columns:
    """The added columns: their names and Arrow types, and for each scorer's name its details' names."""

    types: Mapping[str, str]
    details: Mapping[str, Sequence[str]]

    def values(self, decision: Verdict, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
        """One row's values from the verdict of every scorer by name, none where none was asked.

        Raises ValueError for a detail that the scorer did not give for the first text, or of another type.
        """
        row: dict[str, Any] = {"harm_score": decision.score, "harm_reason": decision.reason}
        for name, details in self.details.items():
            verdict = verdicts.get(name, Verdict(None))
            row[f"score_{name}"] = verdict.score
            for detail in details:
                row[f"{name}_{detail}"] = self.typed(f"{name}_{detail}", verdict.details.get(detail))
            if unknown := verdict.details.keys() - set(details):
                raise ValueError(f"scorer {name}: detail {min(unknown)!r} is not among those of its first answer")
        return row

    def typed(self, column: str, value: Any) -> Any:
        """A value as its column has it, None for what is not finite. Raises ValueError for one of another type."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        kind = _kind(column, value)
        if kind == self.types[column]:
            return value
        if kind == "int64" and self.types[column] == "float64":
            return float(value)
        raise ValueError(f"column {column!r}: {kind} here, {self.types[column]} in the scorer's first answer")


def probe(scorers: Sequence[Scorer]) -> Columns:
    """The columns these scorers add, from what they say of one harmless sentence. Raises what a scorer raises."""
    types = {"harm_score": "int64", "harm_reason": "string"}
    details = {}
    for scorer in scorers:
        (verdict,) = scorer.score([PROBE])
        details[scorer.name] = tuple(verdict.details)
        added = {f"score_{scorer.name}": "int64"}
        added |= {f"{scorer.name}_{key}": _kind(key, value) for key, value in verdict.details.items()}
        if twice := types.keys() & added.keys():
            raise ValueError(f"scorers: two columns would be named {min(twice)!r}; name one by NAME=KIND:PLACE")
        types |= added
    return Columns(types, details)


def folder(score: int | None) -> str:
    """Where a row of this score goes."""
    return UNSCORED if score is None else SCORES[score]


def check_free(path: str, names: Any, columns: Columns) -> None:
    """Raises ValueError where the input already has a column that scoring adds."""
    if taken := set(names) & columns.types.keys():
        raise ValueError(f"{path}: it already has a column {min(taken)!r}, which scoring would add; rename it there")


def _kind(name: str, value: Any) -> str:
    for kind, arrow in _KINDS.items():
        if isinstance(value, kind):
            return arrow
    raise ValueError(f"detail {name!r} is {type(value).__name__}, not a number or a string")
