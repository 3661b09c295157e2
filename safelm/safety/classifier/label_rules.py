"""How labels of other schemes are read: from a row to a score or to a distribution over the scores.

Each rule takes a row and the name of its label's column, and raises `LabelError` for a row without a label or with one
out of range.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safelm.documents.tables import shown
from safelm.tags import MAX_SCORE, MIN_SCORE

Row = Mapping[str, Any]
Distribution = tuple[float, ...]  # probabilities of the scores 0 to 5


class LabelError(ValueError):
    """A label that is missing or out of its scheme's range; the message names the column and the value, if a word."""


def one_hot(score: int) -> Distribution:
    """All probability at one score."""
    return tuple(float(score == i) for i in range(MIN_SCORE, MAX_SCORE + 1))


def _value(row: Row, column: str) -> Any:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()) or value != value:
        raise LabelError(f"column {column!r}: no label")
    return value


def _number(row: Row, column: str, low: int | float, high: int | float) -> float:
    value = _value(row, column)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise LabelError(f"column {column!r}: {shown(value)} is not a number") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise LabelError(f"column {column!r}: {value!r} is outside {low:g} to {high:g}")
    return number


def _whole(row: Row, column: str, low: int, high: int) -> int:
    number = _number(row, column, low, high)
    if number != int(number):
        raise LabelError(f"column {column!r}: {number!r} is not a whole number from {low} to {high}")
    return int(number)


def own(row: Row, column: str) -> int:
    return _whole(row, column, MIN_SCORE, MAX_SCORE)


VOTES_COLUMN = "harm_votes"  # of our own labels: how many annotators gave each score


def own_votes(row: Row, column: str) -> Distribution:
    counts = row.get(VOTES_COLUMN)
    if counts is None:
        return one_hot(own(row, column))
    if not isinstance(counts, list) or len(counts) != MAX_SCORE + 1:
        raise LabelError(f"column {VOTES_COLUMN!r}: not a list of {MAX_SCORE + 1} counts")
    votes = [_whole({"count": count}, "count", 0, 1_000_000) for count in counts]
    if not sum(votes):
        raise LabelError(f"column {VOTES_COLUMN!r}: no vote")
    return mean([one_hot(score) for score in range(MAX_SCORE + 1)], [float(vote) for vote in votes])


def of_levels(levels: tuple[int, ...], low: float, high: float) -> Callable[[Row, str], int]:
    """Evenly wide bands of a scale: `levels[i]` is the score of the i-th."""

    def score(row: Row, column: str) -> int:
        share = (_number(row, column, low, high) - low) / (high - low)
        return int(levels[min(math.floor(share * (len(levels) - 1) + 0.5), len(levels) - 1)])

    return score


def between_levels(levels: tuple[int, ...], low: float, high: float) -> Callable[[Row, str], Distribution]:
    """A mean of raters: shared out between the two levels it lies between, the nearer one getting more."""

    def votes(row: Row, column: str) -> Distribution:
        place = (_number(row, column, low, high) - low) / (high - low) * (len(levels) - 1)
        below = min(math.floor(place), len(levels) - 2)
        return mean([one_hot(levels[below]), one_hot(levels[below + 1])], [below + 1 - place, place - below])

    return votes


def mean(distributions: Sequence[Distribution], weights: Sequence[float] | None = None) -> Distribution:
    """Their (weighted) mean."""
    weights = weights or [1.0] * len(distributions)
    pairs = list(zip(distributions, weights, strict=True))
    return tuple(sum(d[i] * w for d, w in pairs) / sum(weights) for i in range(MAX_SCORE + 1))


def of_classes(scores: Mapping[str, int]) -> Callable[[Row, str], int]:
    def score(row: Row, column: str) -> int:
        value = _value(row, column)
        key = f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
        if key not in scores:
            raise LabelError(f"column {column!r}: {shown(value)} is none of {', '.join(scores)}")
        return scores[key]

    return score


_PYRIT_LEVELS = (0, 1, 3, 4, 5)


def _pyrit_ratings(row: Row, column: str) -> list[float]:
    ratings = [_number(row, name, 0, 1) for name in row if name.startswith(column) and row[name] not in (None, "")]
    if not ratings:
        raise LabelError(f"column {column!r}: no label")
    return ratings


def pyrit(row: Row, column: str) -> int:
    ratings = _pyrit_ratings(row, column)
    return of_levels(_PYRIT_LEVELS, 0.0, 1.0)({"mean": sum(ratings) / len(ratings)}, "mean")


def pyrit_votes(row: Row, column: str) -> Distribution:
    votes = between_levels(_PYRIT_LEVELS, 0.0, 1.0)
    return mean([votes({"rating": rating}, "rating") for rating in _pyrit_ratings(row, column)])


DAVIDSON_VOTES = {"hate_speech": 5, "offensive_language": 3, "neither": 0}


def davidson_votes(row: Row, column: str) -> Distribution:
    counts = {score: _whole(row, name, 0, 1000) for name, score in DAVIDSON_VOTES.items() if row.get(name)}
    if not sum(counts.values()):
        return one_hot(of_classes({"0": 5, "1": 3, "2": 0})(row, column))
    return mean([one_hot(score) for score in counts], [float(count) for count in counts.values()])


ABUSE_SCORES = {"1": 0, "0": 1, "-1": 3, "-2": 4, "-3": 5}


def abuse_votes(row: Row, column: str) -> Distribution:
    """Every rater's marks: columns AnnotatorN_is_abuse.LEVEL of 0 and 1, empty for who did not rate the row."""
    given = []
    for name in row:
        level = name.partition(f"_{column}.")[2]
        if not level or row[name] in (None, ""):
            continue
        marks = [part.strip() for part in str(row[name]).split(",")]
        if level not in ABUSE_SCORES or not set(marks) <= {"0", "1"}:
            raise LabelError(f"column {name!r}: {shown(row[name])} is not a mark of 0 or 1")
        given += [one_hot(ABUSE_SCORES[level])] * marks.count("1")
    if not given:
        raise LabelError(f"columns {column!r}: no label")
    return mean(given)


def abuse(row: Row, column: str) -> int:
    """The score that most raters' marks lie at or below: the median, the higher one of two."""
    total, votes = 0.0, abuse_votes(row, column)
    for score in range(MAX_SCORE + 1):
        total += votes[score]
        if total > 0.5 + 1e-9:
            return score
    return MAX_SCORE


def spans(row: Row, column: str) -> int:
    """Toxic spans: a list of character positions, [] where the raters found none."""
    value = str(_value(row, column)).strip()
    if not re.fullmatch(r"\[[\d\s,]*\]", value):
        raise LabelError(f"column {column!r}: {shown(value)} is not a list of positions")
    return 1 if value == "[]" else 3


def toxic_comment(row: Row, column: str) -> int:
    _whole(row, column, 1, 100_000)
    return 3


OPENAI_FLAGS = {"S": 4, "H": 5, "V": 4, "HR": 4, "SH": 4, "S3": 5, "H2": 5, "V2": 5}


def openai(row: Row, column: str) -> int:
    present = [name for name in OPENAI_FLAGS if row.get(name) not in (None, "")]
    if not present:
        raise LabelError(f"columns {', '.join(OPENAI_FLAGS)}: no label")
    return max((OPENAI_FLAGS[name] for name in present if _whole(row, name, 0, 1)), default=0)


JIGSAW_FLAGS = {"toxic": 3, "obscene": 4, "insult": 4, "severe_toxic": 5, "threat": 5, "identity_hate": 5}


def jigsaw(row: Row, column: str) -> int:
    flags = {name: _whole(row, name, 0, 1) for name in JIGSAW_FLAGS}
    return max((JIGSAW_FLAGS[name] for name, flag in flags.items() if flag), default=0)


def all_safe(row: Row, column: str) -> int:
    return MIN_SCORE


EDOS_CATEGORIES = {
    "none": 0,
    "4. prejudiced discussions": 3,
    "3. animosity": 3,
    "2. derogation": 4,
    "1. threats, plans to harm and incitement": 5,
}
SOURCE_SCORES = {"fineweb": 0, "wikitext": 0, "c4": 0, "4chan": 4}
