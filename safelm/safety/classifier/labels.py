"""Other people's labels as harm scores 0 to 5: one stated table (the scores: Maini et al. 2025, section 3.1).

No scheme has our six levels. A mapping says where a scheme's levels stand on our scale, by our rubric's wording (0 fit
for all audiences, 1 and 2 mild, 3 moderate, 4 slurs aimed at people or harmful advice, 5 hate, threats, instructions
for harmful acts). Levels that a scheme can't tell apart get the score of its typical member.

Where raters disagree, or a mean of them is given, a text also has a distribution over the six scores: each rater's vote
at its own score, or a mean shared out between the two levels it lies between.

`LABEL_TABLE[scheme]` maps a row to a score, a distribution and kinds of harm (see `harm_kinds`), and says which columns
it reads and what each label becomes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safelm.safety.classifier import harm_kinds
from safelm.tags import MAX_SCORE, MIN_SCORE

Row = Mapping[str, Any]
Distribution = tuple[float, ...]  # probabilities of the scores 0 to 5


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
      votes: the distribution over the scores, where raters may disagree; None: all of it at the score.
      kinds: the rule of its kinds of harm.
    """

    score: Callable[[Row, str], int]
    text_column: str
    label_column: str
    mapping: str
    group_column: str = ""
    label_is_column: bool = True
    votes: Callable[[Row, str], Distribution] | None = None
    kinds: harm_kinds.Rule = harm_kinds.none_known

    def distribution(self, row: Row) -> Distribution:
        """Probabilities of the scores 0 to 5 for a row whose `score` is valid."""
        return self.votes(row, self.label_column) if self.votes else one_hot(self.score(row, self.label_column))


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


VOTES_COLUMN = "harm_votes"  # of our own labels: how many annotators gave each score


def _own_votes(row: Row, column: str) -> Distribution:
    counts = row.get(VOTES_COLUMN)
    if counts is None:
        return one_hot(_own(row, column))
    if not isinstance(counts, list) or len(counts) != MAX_SCORE + 1:
        raise LabelError(f"column {VOTES_COLUMN!r}: not a list of {MAX_SCORE + 1} counts")
    votes = [_whole({"count": count}, "count", 0, 1_000_000) for count in counts]
    if not sum(votes):
        raise LabelError(f"column {VOTES_COLUMN!r}: no vote")
    return mean([one_hot(score) for score in range(MAX_SCORE + 1)], [float(vote) for vote in votes])


def _of_levels(levels: tuple[int, ...], low: float, high: float) -> Callable[[Row, str], int]:
    """Evenly wide bands of a scale: `levels[i]` is the score of the i-th."""

    def score(row: Row, column: str) -> int:
        share = (_number(row, column, low, high) - low) / (high - low)
        return int(levels[min(math.floor(share * (len(levels) - 1) + 0.5), len(levels) - 1)])

    return score


def _between_levels(levels: tuple[int, ...], low: float, high: float) -> Callable[[Row, str], Distribution]:
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


def _of_classes(scores: Mapping[str, int]) -> Callable[[Row, str], int]:
    def score(row: Row, column: str) -> int:
        value = _value(row, column)
        key = f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
        if key not in scores:
            raise LabelError(f"column {column!r}: {str(value)[:40]!r} is none of {', '.join(scores)}")
        return scores[key]

    return score


_PYRIT_LEVELS = (0, 1, 3, 4, 5)


def _pyrit_ratings(row: Row, column: str) -> list[float]:
    ratings = [_number(row, name, 0, 1) for name in row if name.startswith(column) and row[name] not in (None, "")]
    if not ratings:
        raise LabelError(f"column {column!r}: no label")
    return ratings


def _pyrit(row: Row, column: str) -> int:
    ratings = _pyrit_ratings(row, column)
    return _of_levels(_PYRIT_LEVELS, 0.0, 1.0)({"mean": sum(ratings) / len(ratings)}, "mean")


def _pyrit_votes(row: Row, column: str) -> Distribution:
    votes = _between_levels(_PYRIT_LEVELS, 0.0, 1.0)
    return mean([votes({"rating": rating}, "rating") for rating in _pyrit_ratings(row, column)])


DAVIDSON_VOTES = {"hate_speech": 5, "offensive_language": 3, "neither": 0}


def _davidson_votes(row: Row, column: str) -> Distribution:
    counts = {score: _whole(row, name, 0, 1000) for name, score in DAVIDSON_VOTES.items() if row.get(name)}
    if not sum(counts.values()):
        return one_hot(_of_classes({"0": 5, "1": 3, "2": 0})(row, column))
    return mean([one_hot(score) for score in counts], [float(count) for count in counts.values()])


ABUSE_SCORES = {"1": 0, "0": 1, "-1": 3, "-2": 4, "-3": 5}


def _abuse_votes(row: Row, column: str) -> Distribution:
    """Every rater's marks: columns AnnotatorN_is_abuse.LEVEL of 0 and 1, empty for who did not rate the row."""
    given = []
    for name in row:
        level = name.partition(f"_{column}.")[2]
        if not level or row[name] in (None, ""):
            continue
        marks = [part.strip() for part in str(row[name]).split(",")]
        if level not in ABUSE_SCORES or not set(marks) <= {"0", "1"}:
            raise LabelError(f"column {name!r}: {str(row[name])[:40]!r} is not a mark of 0 or 1")
        given += [one_hot(ABUSE_SCORES[level])] * marks.count("1")
    if not given:
        raise LabelError(f"columns {column!r}: no label")
    return mean(given)


def _abuse(row: Row, column: str) -> int:
    """The score that most raters' marks lie at or below: the median, the higher one of two."""
    total, votes = 0.0, _abuse_votes(row, column)
    for score in range(MAX_SCORE + 1):
        total += votes[score]
        if total > 0.5 + 1e-9:
            return score
    return MAX_SCORE


def _spans(row: Row, column: str) -> int:
    """Toxic spans: a list of character positions, [] where the raters found none."""
    value = str(_value(row, column)).strip()
    if not re.fullmatch(r"\[[\d\s,]*\]", value):
        raise LabelError(f"column {column!r}: {value[:40]!r} is not a list of positions")
    return 1 if value == "[]" else 3


def _toxic_comment(row: Row, column: str) -> int:
    _whole(row, column, 1, 100_000)
    return 3


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
    "harm_score": Scheme(
        _own,
        "text",
        "harm_score",
        "our own 0 to 5, as it is; harm_votes and harm_kinds of safelm.label, where they stand beside it",
        group_column="group",
        votes=_own_votes,
        kinds=harm_kinds.own,
    ),
    "pyrit": Scheme(
        _pyrit,
        "assistant_response",
        "human_score",
        "mean of the human harm scores, nearest of 0, .25, .5, .75, 1 -> 0, 1, 3, 4, 5",
        group_column="objective",
        votes=_pyrit_votes,
        kinds=harm_kinds.pyrit,
    ),
    "openai_moderation": Scheme(
        _openai,
        "prompt",
        "S",
        "highest flag that is set: S 4, V 4, HR 4, SH 4, H 5, H2 5, S3 5, V2 5; none set -> 0 (an absent flag is not "
        "set; a row without any is unlabelled)",
        label_is_column=False,
        kinds=harm_kinds.openai,
    ),
    "davidson": Scheme(
        _of_classes({"0": 5, "1": 3, "2": 0}),
        "tweet",
        "class",
        "0 hate -> 5, 1 offensive -> 3, 2 neither -> 0; the raters' counts, where they stand beside it, as votes",
        votes=_davidson_votes,
        kinds=harm_kinds.davidson,
    ),
    "toxigen": Scheme(
        _of_levels((0, 1, 3, 4, 5), 1.0, 5.0),
        "text",
        "toxicity_score",
        "mean of the raters' 1 to 5, nearest whole number -> 0, 1, 3, 4, 5",
        votes=_between_levels((0, 1, 3, 4, 5), 1.0, 5.0),
        kinds=harm_kinds.hate_only,
    ),
    "dynahate": Scheme(
        _of_classes({"0": 0, "1": 5, "nothate": 0, "hate": 5}),
        "text",
        "label",
        "0 not hate -> 0, 1 hate -> 5",
        kinds=harm_kinds.hate_only,
    ),
    "implicit_hate": Scheme(
        _of_classes({"neutral": 0, "hate": 4}),
        "text",
        "label",
        "neutral -> 0, hate (said without slurs) -> 4",
        kinds=harm_kinds.hate_only,
    ),
    "edos": Scheme(
        _of_classes(EDOS_CATEGORIES),
        "text",
        "label_category",
        "EDOS' category of sexism: none -> 0, prejudiced discussions 3, animosity 3, derogation 4, threats 5",
        kinds=harm_kinds.edos,
    ),
    "conv_abuse": Scheme(
        _abuse,
        "user",
        "is_abuse",
        "ConvAbuse's raters: 1 not abusive -> 0, 0 unclear -> 1, -1, -2, -3 ever more abusive -> 3, 4, 5; as votes, "
        "their median the score",
        group_column="conv_id",
        label_is_column=False,
        votes=_abuse_votes,
        kinds=harm_kinds.conversation_abuse,
    ),
    "toxic_spans": Scheme(
        _spans, "text", "spans", "comments found toxic: with a toxic span -> 3, raters found none -> 1"
    ),
    "civil_toxic": Scheme(
        _toxic_comment,
        "text",
        "n_raters",
        "Civil Comments that are all toxic -> 3; votes fall with swearing and are not read",
    ),
    "jigsaw": Scheme(
        _jigsaw,
        "comment_text",
        "toxic",
        "highest flag that is set: toxic 3, obscene 4, insult 4, severe_toxic, threat, identity_hate 5; none -> 0",
        label_is_column=False,
        kinds=harm_kinds.jigsaw,
    ),
    "civil_toxicity": Scheme(
        _of_levels((0, 1, 3, 4, 4), 0.0, 1.0),
        "text",
        "toxicity",
        "Civil Comments' toxicity 0 to 1, nearest of 0, .25, .5, .75, 1 -> 0, 1, 3, 4, 4",
        votes=_between_levels((0, 1, 3, 4, 4), 0.0, 1.0),
    ),
    "safe": Scheme(
        _all_safe,
        "text",
        "text",
        "every row -> 0, no label needed: pages that you know to be safe",
        label_is_column=False,
        kinds=harm_kinds.all_safe,
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
