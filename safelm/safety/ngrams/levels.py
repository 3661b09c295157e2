"""Harm values to probabilities and scores 0 to 5.

The probability of "score >= t", for t = 1 and 3, is a sigmoid of slope * value + offset. Two thresholds on these
probabilities decide whether a text is below 1, below 3 or above; inside, cuts on the value decide which score it gets.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float, Int

LEVELS = (1, 3)
BANDS = {1: (2,), 3: (4, 5)}  # the level a text reaches -> the scores above it inside
REFERENCE_SHARES = (0.785, 0.091, 0.079, 0.027, 0.010, 0.009)  # scores 0 to 5 of 1.18 billion web pages
WEB_SHARE = 0.5  # of the reference's shares above 0: C4 has been cleaned by a list of words


@dataclasses.dataclass(frozen=True)
class Levels:
    """Slope, offset and threshold of each level, and the values from which on scores 2, 4 and 5 are given."""

    slopes: Mapping[int, float]
    offsets: Mapping[int, float]
    thresholds: Mapping[int, float]
    cuts: Mapping[int, float]

    def probability(self, level: int, value_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """P(score >= level); never larger than at a lower level."""
        lower = [self._probability(other, value_N) for other in LEVELS if other <= level]
        return np.minimum.reduce(lower)

    def _probability(self, level: int, value_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return scipy.special.expit(self.slopes[level] * value_N + self.offsets[level])

    def scores(self, value_N: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        """Harm scores 0 to 5."""
        score_N = np.zeros(len(value_N), np.int64)
        for level, above in BANDS.items():
            reached_N = self.probability(level, value_N) >= self.thresholds[level]
            inside_N = level + sum((value_N >= self.cuts[score]).astype(np.int64) for score in above)
            score_N = np.where(reached_N, inside_N, score_N)
        return score_N

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it."""
        return {name: {str(key): value for key, value in part.items()} for name, part in vars(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, float]]) -> "Levels":
        """Raises KeyError, TypeError or ValueError where a part is missing or no number."""
        keys = dict.fromkeys(("slopes", "offsets", "thresholds"), LEVELS) | {"cuts": (2, 4, 5)}
        return cls(**{name: {key: float(values[name][str(key)]) for key in wanted} for name, wanted in keys.items()})


def fit(
    value_n: Float[np.ndarray, " n"],
    target_nL: Float[np.ndarray, "n L"],
    weight_n: Float[np.ndarray, " n"],
    page_value_p: Float[np.ndarray, " p"],
    web_share: float = WEB_SHARE,
) -> Levels:
    """Levels from labelled texts and web pages that the weights were not fitted on.

    Labelled texts give the slopes (Platt 1999); pages the rest: scores are cut so that pages get each score above 0 as
    often as `web_share` of the reference's share, and probabilities shifted to that prior.

    Args:
      target_nL: probability that the score is at least 1, at least 3.
    """
    tail = {score: web_share * sum(REFERENCE_SHARES[score:]) for score in range(1, len(REFERENCE_SHARES))}
    cuts = {score: float(np.quantile(page_value_p, 1 - share)) for score, share in tail.items()}
    slopes = {level: _slope(value_n, target_nL[:, i], weight_n) for i, level in enumerate(LEVELS)}
    offsets = {level: _offset(slopes[level] * page_value_p, tail[level]) for level in LEVELS}
    found = Levels(slopes, offsets, dict.fromkeys(LEVELS, 0.5), {score: cuts[score] for score in (2, 4, 5)})
    thresholds = {level: float(found.probability(level, np.asarray([cuts[level]]))[0]) for level in LEVELS}
    return dataclasses.replace(found, thresholds=thresholds)


def _slope(value_n: np.ndarray, target_n: np.ndarray, weight_n: np.ndarray) -> float:
    """Weighted logistic regression on one value by Newton's method; the offset found beside it is not used."""
    design_n2 = np.stack([value_n, np.ones_like(value_n)], 1)
    found = np.zeros(2)
    for _ in range(50):
        probability_n = scipy.special.expit(design_n2 @ found)
        gradient = design_n2.T @ (weight_n * (probability_n - target_n))
        curve_n = weight_n * probability_n * (1 - probability_n)
        step = np.linalg.solve((design_n2.T * curve_n) @ design_n2 + 1e-3 * np.eye(2), gradient)
        found -= step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-9:
            break
    return max(float(found[0]), 1e-3)


def _offset(logit_p: np.ndarray, share: float) -> float:
    """What is added to the logits so that their mean probability is `share`: by bisection."""
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if scipy.special.expit(logit_p + middle).mean() < share else (low, middle)
    return middle
