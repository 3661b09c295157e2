"""How unsure scorers are of a document: where they disagree, else how flat one scorer's probabilities are.

Disagreement between scorers is query by committee (Seung et al. 1992), entropy and margin are uncertainty sampling
(Lewis and Gale 1994; Scheffer et al. 2001).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.documents import MalformedError
from safelm.documents.harm import HarmScore
from safelm.tags import MAX_SCORE, MIN_SCORE

METHODS = ("disagreement", "entropy", "margin", "score", "random")
SCORE_PREFIX = "score_"  # of the columns that safelm.score writes, one a scorer
DETAILS = ("expected_score", "unsafe_probability", "unsafe_probability_3")


@dataclasses.dataclass(frozen=True)
class Opinion:
    """One scorer on one document.

    Attributes:
      score: 0 to 5.
      graded: the same as a number between, where the scorer gives one.
      probabilities: of the classes it tells apart; empty where it gives none.
    """

    score: int
    graded: float
    probabilities: tuple[float, ...] = ()


def opinion(score: int, details: Mapping[str, Any]) -> Opinion:
    """What a scorer says: of its details (see `DETAILS`) those that it has."""
    expected, any_harm, harm = (details.get(name) for name in DETAILS)
    probabilities: tuple[float, ...] = ()
    if any_harm is not None:
        steps = [1.0, any_harm, min(any_harm, harm)] if harm is not None else [1.0, any_harm]
        probabilities = tuple(above - below for above, below in zip(steps, [*steps[1:], 0.0], strict=True))
    return Opinion(score, float(score) if expected is None else float(expected), probabilities)


def scorers_of(columns: Sequence[str]) -> list[str]:
    """The scorers that have a column among these."""
    return [name.removeprefix(SCORE_PREFIX) for name in columns if name.startswith(SCORE_PREFIX)]


def opinions_of(row: Mapping[str, Any], found: HarmScore) -> dict[str, Opinion]:
    """Each scorer's opinion in a row; of a row with one score alone that column's.

    Raises MalformedError for a score outside 0 to 5.
    """
    opinions = {}
    for name in scorers_of(list(row)):
        score = row[SCORE_PREFIX + name]
        if isinstance(score, bool) or not isinstance(score, int):
            continue  # no answer, or somebody else's column
        if not MIN_SCORE <= score <= MAX_SCORE:
            raise MalformedError(f"field {SCORE_PREFIX + name!r} is {score}, not a harm score from 0 to 5")
        opinions[name] = opinion(score, {key: row.get(f"{name}_{key}") for key in DETAILS})
    if not opinions and found.value is not None:
        listed = row.get("safety_probs")
        opinions[found.column] = Opinion(found.value, float(found.found), tuple(map(float, listed or ())))
    return opinions


def check_method(asked: str | None, opinions: Sequence[Mapping[str, Opinion]]) -> str:
    """The method to choose by: the one asked for, or the first of METHODS for which documents have what it needs.

    Raises ValueError where they don't have it.
    """
    names = sorted({name for each in opinions for name in each})
    has = {
        "disagreement": any(len(each) > 1 for each in opinions),
        "entropy": any(len(one.probabilities) > 1 for each in opinions for one in each.values()),
    }
    has["margin"] = has["entropy"]
    if asked and not has.get(asked, True):
        lack = "the scores of several scorers" if asked == "disagreement" else "a scorer's probabilities"
        raise ValueError(f"--choose_by={asked}: needs {lack}, there is {', '.join(names) or 'nothing'}")
    return asked or next((method for method in ("disagreement", "entropy") if has[method]), "score")


def uncertainty(method: str, opinions: Mapping[str, Opinion]) -> float:
    """From 0 (sure) to 1: by METHODS; "score" and "random" find all documents alike."""
    if method == "disagreement":
        graded = [each.graded for each in opinions.values()]
        return (max(graded) - min(graded)) / (MAX_SCORE - MIN_SCORE)
    if method in ("entropy", "margin"):
        measure = _entropy if method == "entropy" else _margin
        found = [measure(each.probabilities) for each in opinions.values() if len(each.probabilities) > 1]
        return sum(found) / len(found) if found else 0.0
    return 0.0


def _entropy(probabilities: Sequence[float]) -> float:
    """Shannon's, as a share of the largest there is for so many classes."""
    return sum(-p * math.log(p) for p in probabilities if p > 0) / math.log(len(probabilities))


def _margin(probabilities: Sequence[float]) -> float:
    """1 less the distance of the two likeliest classes."""
    first, second = sorted(probabilities, reverse=True)[:2]
    return 1 - (first - second)
