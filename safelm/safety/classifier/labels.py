"""Other people's labels as harm scores 0 to 5: one stated table (the scores: Maini et al. 2025, section 3.1).

No scheme has our six levels. A mapping says where a scheme's levels stand on our scale, by our rubric's wording (0 fit
for all audiences, 1 and 2 mild, 3 moderate, 4 slurs aimed at people or harmful advice, 5 hate, threats, instructions
for harmful acts). Levels that a scheme can't tell apart get the score of its typical member.

`LABEL_TABLE[scheme]` maps a row to a score and says which columns it reads and what each label becomes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from safelm.tags import MAX_SCORE, MIN_SCORE

Row = Mapping[str, Any]


class LabelError(ValueError):
    """A label that is missing or out of its scheme's range; the message names the column and the value."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way of labelling text, and what its labels become.

    Attributes:
      score: the harm score of a row; raises `LabelError` for a row without a label or with one out of range.
      text_column, label_column, group_column: where its published files keep them; rows of one group never stand on
        both sides of a split ("" = every text is its own group).
      mapping: the rule in words, for `--help` and the checkpoint.
      label_is_column: whether the label is one column's value (which a user may then keep under another name).
    """

    score: Callable[[Row, str], int]
    text_column: str
    label_column: str
    mapping: str
    group_column: str = ""
    label_is_column: bool = True


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
        raise LabelError(f"column {column!r}: {str(value)[:40]!r} is not a number") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise LabelError(f"column {column!r}: {value!r} is outside {low:g} to {high:g}")
    return number


def _whole(row: Row, column: str, low: int, high: int) -> int:
    number = _number(row, column, low, high)
    if number != int(number):
        raise LabelError(f"column {column!r}: {number!r} is not a whole number from {low} to {high}")
    return int(number)


def _own(row: Row, column: str) -> int:
    return _whole(row, column, MIN_SCORE, MAX_SCORE)


def _of_levels(levels: tuple[int, ...], low: float, high: float) -> Callable[[Row, str], int]:
    """Evenly wide bands of a scale: `levels[i]` is the score of the i-th."""

    def score(row: Row, column: str) -> int:
        share = (_number(row, column, low, high) - low) / (high - low)
        return int(levels[min(math.floor(share * (len(levels) - 1) + 0.5), len(levels) - 1)])

    return score


def _of_classes(scores: Mapping[str, int]) -> Callable[[Row, str], int]:
    def score(row: Row, column: str) -> int:
        value = _value(row, column)
        key = f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
        if key not in scores:
            raise LabelError(f"column {column!r}: {str(value)[:40]!r} is none of {', '.join(scores)}")
        return scores[key]

    return score


def _pyrit(row: Row, column: str) -> int:
    ratings = [_number(row, name, 0, 1) for name in row if name.startswith(column) and row[name] not in (None, "")]
    if not ratings:
        raise LabelError(f"column {column!r}: no label")
    return _of_levels((0, 1, 3, 4, 5), 0.0, 1.0)({"mean": sum(ratings) / len(ratings)}, "mean")


OPENAI_FLAGS = {"S": 4, "H": 5, "V": 4, "HR": 4, "SH": 4, "S3": 5, "H2": 5, "V2": 5}


def _openai(row: Row, column: str) -> int:
    present = [name for name in OPENAI_FLAGS if row.get(name) not in (None, "")]
    if not present:
        raise LabelError(f"columns {', '.join(OPENAI_FLAGS)}: no label")
    return max((OPENAI_FLAGS[name] for name in present if _whole(row, name, 0, 1)), default=0)


JIGSAW_FLAGS = {"toxic": 3, "obscene": 4, "insult": 4, "severe_toxic": 5, "threat": 5, "identity_hate": 5}


def _jigsaw(row: Row, column: str) -> int:
    flags = {name: _whole(row, name, 0, 1) for name in JIGSAW_FLAGS}
    return max((JIGSAW_FLAGS[name] for name, flag in flags.items() if flag), default=0)


def _all_safe(row: Row, column: str) -> int:
    return MIN_SCORE


EDOS_CATEGORIES = {
    "none": 0,
    "4. prejudiced discussions": 3,
    "3. animosity": 3,
    "2. derogation": 4,
    "1. threats, plans to harm and incitement": 5,
}
SOURCE_SCORES = {"fineweb": 0, "wikitext": 0, "c4": 0, "4chan": 4}

LABEL_TABLE: dict[str, Scheme] = {
    "harm_score": Scheme(_own, "text", "harm_score", "our own 0 to 5, as it is", group_column="group"),
    "pyrit": Scheme(
        _pyrit,
        "assistant_response",
        "human_score",
        "mean of the human harm scores, nearest of 0, .25, .5, .75, 1 -> 0, 1, 3, 4, 5",
        group_column="objective",
    ),
    "openai_moderation": Scheme(
        _openai,
        "prompt",
        "S",
        "highest flag that is set: S 4, V 4, HR 4, SH 4, H 5, H2 5, S3 5, V2 5; none set -> 0 (an absent flag is not "
        "set; a row without any is unlabelled)",
        label_is_column=False,
    ),
    "davidson": Scheme(
        _of_classes({"0": 5, "1": 3, "2": 0}), "tweet", "class", "0 hate -> 5, 1 offensive -> 3, 2 neither -> 0"
    ),
    "toxigen": Scheme(
        _of_levels((0, 1, 3, 4, 5), 1.0, 5.0),
        "text",
        "toxicity_score",
        "mean of the raters' 1 to 5, nearest whole number -> 0, 1, 3, 4, 5",
    ),
    "dynahate": Scheme(
        _of_classes({"0": 0, "1": 5, "nothate": 0, "hate": 5}), "text", "label", "0 not hate -> 0, 1 hate -> 5"
    ),
    "implicit_hate": Scheme(
        _of_classes({"neutral": 0, "hate": 4}), "text", "label", "neutral -> 0, hate (said without slurs) -> 4"
    ),
    "edos": Scheme(
        _of_classes(EDOS_CATEGORIES),
        "text",
        "label_category",
        "EDOS' category of sexism: none -> 0, prejudiced discussions 3, animosity 3, derogation 4, threats 5",
    ),
    "jigsaw": Scheme(
        _jigsaw,
        "comment_text",
        "toxic",
        "highest flag that is set: toxic 3, obscene 4, insult 4, severe_toxic, threat, identity_hate 5; none -> 0",
        label_is_column=False,
    ),
    "civil_toxicity": Scheme(
        _of_levels((0, 1, 3, 4, 4), 0.0, 1.0),
        "text",
        "toxicity",
        "Civil Comments' toxicity 0 to 1, nearest of 0, .25, .5, .75, 1 -> 0, 1, 3, 4, 4",
    ),
    "safe": Scheme(
        _all_safe,
        "text",
        "text",
        "every row -> 0, no label needed: pages that you know to be safe",
        label_is_column=False,
    ),
    "source": Scheme(
        _of_classes(SOURCE_SCORES),
        "text",
        "source",
        "where the text comes from (paper, appendix C.1): 4chan -> 4; fineweb, wikitext, c4 -> 0. Coarse: use it for "
        "whole-source extras only",
    ),
}


def describe() -> str:
    """The table in lines, for `--help`."""
    return "\n".join(f"  {name:18} {scheme.mapping}" for name, scheme in LABEL_TABLE.items())
