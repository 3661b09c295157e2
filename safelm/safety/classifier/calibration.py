"""Logits to calibrated probabilities of harm, and thresholds on them that attain a stated recall.

For each level t (1 and 3) the raw logit of "score is t or more" is log(sum of the classes from t on / sum of those
below). Calibration is Platt's: probability = sigmoid(slope * logit + offset) with slope > 0, fitted on texts that the
head has not seen. So it is monotone: it changes what a value means, never the order of texts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from safelm.safety.classifier.metrics import CLASSES, LEVELS

_MIN_SLOPE, _MAX_SLOPE = 1e-3, 1e3
_RIDGE = 1e-3  # keeps slope and offset finite where the classes separate


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Slope and offset per level, and the probability from which on a text counts as unsafe at that level."""

    slopes: Mapping[int, float]
    offsets: Mapping[int, float]
    thresholds: Mapping[int, float]

    def probability(self, level: int, logits_NC: Float[np.ndarray, "N 6"]) -> Float[np.ndarray, " N"]:
        """P(score >= level), calibrated; never larger than at a lower level."""
        lower = [other for other in LEVELS if other <= level]
        values = [sigmoid(self.slopes[t] * level_logit(t, logits_NC) + self.offsets[t]) for t in lower]
        return np.minimum.reduce(values)

    def scores(self, logits_NC: Float[np.ndarray, "N 6"]) -> Int[np.ndarray, " N"]:
        """Harm scores 0 to 5: the thresholds say whether a text is below 1, below 3 or above; there its likeliest."""
        given_N = np.zeros(len(logits_NC), dtype=np.int64)
        for level, stop in ((1, 3), (3, CLASSES)):
            unsafe_N = self.probability(level, logits_NC) >= self.thresholds[level]
            given_N[unsafe_N] = level + logits_NC[unsafe_N, level:stop].argmax(1)
        return given_N

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it."""
        return {name: {str(t): v for t, v in value.items()} for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, float]]) -> "Calibration":
        """Raises ValueError if a part or a level is missing, or a value is no number in its range."""
        try:
            parts = {f.name: {t: float(values[f.name][str(t)]) for t in LEVELS} for f in dataclasses.fields(cls)}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"calibration: {error} is missing or no number") from None
        if not all(slope > 0 for slope in parts["slopes"].values()):
            raise ValueError(f"calibration: slopes {parts['slopes']} are not above 0")
        if not all(np.isfinite(v) for part in parts.values() for v in part.values()):
            raise ValueError("calibration: a value is not finite")
        return cls(**parts)


def level_logit(level: int, logits_NC: Float[np.ndarray, "N 6"]) -> Float[np.ndarray, " N"]:
    """The head's own logit of P(score >= level)."""
    logits_NC = logits_NC.astype(np.float64)
    return _log_sum(logits_NC[:, level:]) - _log_sum(logits_NC[:, :level])


def expected_score(logits_NC: Float[np.ndarray, "N 6"]) -> Float[np.ndarray, " N"]:
    """The mean score under the head's probabilities: a graded scale from 0 to 5."""
    shifted_NC = np.exp(logits_NC.astype(np.float64) - logits_NC.max(1, keepdims=True))
    return (shifted_NC / shifted_NC.sum(1, keepdims=True)) @ np.arange(CLASSES)


def fit(
    logits_NC: Float[np.ndarray, "N 6"], scores_N: Int[np.ndarray, " N"], target_recall: Mapping[int, float]
) -> Calibration:
    """Calibration and thresholds from texts that the head was not trained on.

    The threshold of a level is the highest probability at which at least `target_recall[level]` of the given texts
    that are unsafe at that level count as unsafe. Raises ValueError where the texts lack one side of a level.
    """
    slopes, offsets = {}, {}
    for level in LEVELS:
        unsafe_N = scores_N >= level
        if unsafe_N.all() or not unsafe_N.any():
            kind = "below" if unsafe_N.all() else "of at least"
            raise ValueError(f"calibration: no held-out text has a score {kind} {level}")
        slopes[level], offsets[level] = _platt(level_logit(level, logits_NC), unsafe_N)
    calibration = Calibration(slopes, offsets, dict.fromkeys(LEVELS, 0.5))
    thresholds = {
        level: threshold_for(target_recall[level], calibration.probability(level, logits_NC)[scores_N >= level])
        for level in LEVELS
    }
    return dataclasses.replace(calibration, thresholds=thresholds)


def threshold_for(recall: float, unsafe_probability_n: Float[np.ndarray, " n"]) -> float:
    """The highest threshold that at least `recall` of these probabilities reach. Raises ValueError out of (0, 1]."""
    if not 0 < recall <= 1:
        raise ValueError(f"target recall {recall} is not above 0 and at most 1")
    falling = np.sort(unsafe_probability_n)[::-1]
    return float(falling[int(np.ceil(recall * len(falling) - 1e-9)) - 1])


def _platt(logit_N: Float[np.ndarray, " N"], unsafe_N: Bool[np.ndarray, " N"]) -> tuple[float, float]:
    """Logistic regression on one logit with a positive slope; targets smoothed as in Platt (1999); Newton's method."""
    positives, negatives = int(unsafe_N.sum()), int((~unsafe_N).sum())
    target_N = np.where(unsafe_N, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    scale = float(logit_N.std()) or 1.0
    design_N2 = np.stack([(logit_N - logit_N.mean()) / scale, np.ones_like(logit_N)], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(100):
        probability_N = sigmoid(design_N2 @ weights)
        gradient = design_N2.T @ (probability_N - target_N) + _RIDGE * weights
        hessian = (design_N2.T * (probability_N * (1 - probability_N))) @ design_N2 + _RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights -= step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    slope = float(np.clip(weights[0] / scale, _MIN_SLOPE, _MAX_SLOPE))
    return slope, float(weights[1] - slope * logit_N.mean())


def _log_sum(values_NC: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " N"]:
    top_N1 = values_NC.max(1, keepdims=True)
    return top_N1[:, 0] + np.log(np.exp(values_NC - top_N1).sum(1))


def sigmoid(value: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Logits to probabilities."""
    return 0.5 * (1 + np.tanh(value / 2))
