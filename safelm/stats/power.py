"""What a design of seeds and prompts can tell: variance components of a pilot, the power of a paired difference.

Models answer the same prompts, so of two rows compared every (seed, prompt) has a difference. Its variance has three
parts: between seeds (another training), between prompts, and what is left. Their estimates are those of a two-way
random-effects analysis of variance with one value a cell; the test is a t-test with Satterthwaite's degrees of freedom
(Montgomery 2017, Design and Analysis of Experiments, 13.3 and 13.7).
"""

import dataclasses

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float

POWER = 0.8
_QUANTILES = (np.arange(4000) + 0.5) / 4000  # SciPy's non-central t is NaN for few degrees of freedom


@dataclasses.dataclass(frozen=True)
class Components:
    """Variances of a paired difference: between seeds, between prompts, and the rest; and what they were taken from."""

    seeds: float
    prompts: float
    rest: float
    pilot_seeds: int

    def upper(self, confidence: float = 0.8) -> "Components":
        """The same with the variance between seeds at its one-sided upper bound: a pilot has few seeds."""
        degrees = self.pilot_seeds - 1
        factor = degrees / scipy.stats.chi2.ppf(1 - confidence, degrees)
        return dataclasses.replace(self, seeds=float(self.seeds * factor))


def components(difference_SP: Float[np.ndarray, "S P"]) -> Components:
    """The variance components of a pilot's differences, negative estimates taken as 0.

    Raises ValueError for fewer than two seeds or two prompts.
    """
    seeds, prompts = difference_SP.shape
    if seeds < 2 or prompts < 2:
        raise ValueError(f"a pilot needs two seeds and two prompts at least, got {seeds} and {prompts}")
    mean = difference_SP.mean()
    seed_S, prompt_P = difference_SP.mean(1) - mean, difference_SP.mean(0) - mean
    rest_SP = difference_SP - mean - seed_S[:, None] - prompt_P[None]
    rest = float((rest_SP**2).sum() / ((seeds - 1) * (prompts - 1)))
    of_seeds = float(prompts * (seed_S**2).sum() / (seeds - 1))
    of_prompts = float(seeds * (prompt_P**2).sum() / (prompts - 1))
    return Components(max((of_seeds - rest) / prompts, 0.0), max((of_prompts - rest) / seeds, 0.0), rest, seeds)


def standard_error(parts: Components, seeds: int, prompts: int) -> tuple[float, float]:
    """(standard error of the mean difference, Satterthwaite's degrees of freedom) of a design."""
    squares = np.array([parts.rest + prompts * parts.seeds, parts.rest + seeds * parts.prompts, parts.rest])
    degrees = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    signed = squares * [1, 1, -1] / (seeds * prompts)
    variance = float(signed.sum())
    if variance <= 0:
        return 0.0, float(degrees[0])
    return variance**0.5, float(variance**2 / (signed**2 / degrees).sum())


def power_of(difference: float, parts: Components, seeds: int, prompts: int, alpha: float) -> float:
    """The probability that a two-sided t-test at `alpha` finds a true difference."""
    error, degrees = standard_error(parts, seeds, prompts)
    if not error:
        return float(difference != 0)
    limit, shift = scipy.stats.t.ppf(1 - alpha / 2, degrees), difference / error
    spread_Q = np.sqrt(scipy.stats.chi2.ppf(_QUANTILES, degrees) / degrees)  # of the estimated standard error
    upper_Q, lower_Q = (scipy.stats.norm.cdf(sign * shift - limit * spread_Q) for sign in (1, -1))
    return float((upper_Q + lower_Q).mean())


def detectable(parts: Components, seeds: int, prompts: int, alpha: float, power: float = POWER) -> float:
    """The least true difference that a design finds with this power.

    Args:
      alpha: of the two-sided test; of m contrasts under Holm's correction the first to be told needs alpha / m.

    Raises ValueError for fewer than two seeds, which have no spread.
    """
    if seeds < 2:
        raise ValueError(f"a design needs two seeds at least, got {seeds}")
    error, _ = standard_error(parts, seeds, prompts)
    if not error:
        return 0.0
    high = error
    while power_of(high, parts, seeds, prompts, alpha) < power:
        high *= 2
    return float(scipy.optimize.brentq(lambda d: power_of(d, parts, seeds, prompts, alpha) - power, 0.0, high))
