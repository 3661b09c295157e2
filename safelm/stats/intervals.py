"""Rates and AUROCs with 95% intervals that hold for small samples and for rates near 0 and 1."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

Z_95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval and the number of cases behind it."""

    value: float
    low: float
    high: float
    cases: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def rate(count: int, total: int) -> Estimate:
    """`count / total` with Wilson's 95% score interval (Wilson 1927).

    Raises ValueError unless 0 <= count <= total > 0.
    """
    if total < 1 or not 0 <= count <= total:
        raise ValueError(f"a rate of {count} in {total} cases")
    low, high = wilson(count / total, total)
    return Estimate(count / total, low, high, total)


def wilson(share: int | float, cases: int | float, quantile: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share among `cases` independent cases, a number that may be fractional.

    `quantile` is that of the standard normal distribution for 95%, or a t-distribution's where `cases` is estimated.
    """
    z2 = quantile**2
    centre = (share + z2 / (2 * cases)) / (1 + z2 / cases)
    half = quantile / (1 + z2 / cases) * math.sqrt(share * (1 - share) / cases + z2 / (4 * cases**2))
    return (max(0.0, centre - half) if share > 0 else 0.0, min(1.0, centre + half) if share < 1 else 1.0)


def wilson_cases(share: int | float, width: int | float) -> float:
    """The number of independent cases of which `wilson` gives a share an interval of that width, in (0, 1)."""
    slope, square = 2 * share * (1 - share) - width**2, width**2
    z2_per_case = (math.sqrt(slope**2 + (1 - square) * square) - slope) / (1 - square)
    return Z_95**2 / z2_per_case


def auroc(positive: Float[np.ndarray, " P"], negative: Float[np.ndarray, " N"]) -> Estimate:
    """How often a positive case outscores a negative one (ties count half), with DeLong's interval on the logit scale.

    A perfect separation has no variance to estimate; its interval is Wilson's for the smaller group. Raises ValueError
    for an empty group or a value that is no number.
    """
    if not len(positive) or not len(negative):
        raise ValueError(f"AUROC of {len(positive)} positive and {len(negative)} negative cases")
    if not (np.isfinite(positive).all() and np.isfinite(negative).all()):
        raise ValueError("AUROC of scores that are not finite numbers")
    wins_PN = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    area, cases = float(wins_PN.mean()), len(positive) + len(negative)
    variance = _variance(wins_PN.mean(1)) / len(positive) + _variance(wins_PN.mean(0)) / len(negative)
    if area in (0.0, 1.0) or variance == 0:
        fewest = min(len(positive), len(negative))
        bound = rate(round(area * fewest), fewest)
        return Estimate(area, min(area, bound.low), max(area, bound.high), cases)
    logit, spread = math.log(area / (1 - area)), Z_95 * math.sqrt(variance) / (area * (1 - area))
    return Estimate(area, _logistic(logit - spread), _logistic(logit + spread), cases)


def _variance(values: Float[np.ndarray, " n"]) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.25  # the largest there is: one case tells nothing


def _logistic(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
