"""Means of a full table of seeds and prompts, where another training and another prompt would both change them.

The variance has three parts: between seeds, between prompts, and the rest. They are estimated by a two-way
random-effects analysis of variance with one value a cell. Intervals and tests take a t-distribution with
Satterthwaite's degrees of freedom (Montgomery 2017, Design and Analysis of Experiments, 13.3 and 13.7). A bootstrap
that draws seeds and prompts anew does as well with many seeds. With few it can't leave the seeds' own means, and where
seeds differ much it finds differences that are not there (`scripts/studies/error_rates.py`).

S seeds, P prompts.
"""

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Float

from safelm.stats import intervals
from safelm.stats.intervals import Estimate

_UPPER = 0.975


@dataclasses.dataclass(frozen=True)
class Components:
    """The variances between seeds, between prompts and of the rest, negative estimates taken as 0.

    Attributes:
      square: the mean square between seeds, whose expectation is rest + num_prompts x seeds.
      num_seeds, num_prompts: of the table that they were estimated from.
    """

    seeds: float
    prompts: float
    rest: float
    square: float
    num_seeds: int
    num_prompts: int

    def upper(self, confidence: float = 0.8) -> "Components":
        """The same with the variance between seeds at its one-sided upper bound, since a pilot has few seeds."""
        degrees = self.num_seeds - 1
        bound = self.square * degrees / scipy.stats.chi2.ppf(1 - confidence, degrees)
        return dataclasses.replace(self, seeds=float(max((bound - self.rest) / self.num_prompts, self.seeds)))


def components(value_SP: Float[np.ndarray, "S P"]) -> Components:
    """The variance components of a table. Raises ValueError for fewer than two seeds or two prompts."""
    seeds, prompts = value_SP.shape
    if seeds < 2 or prompts < 2:
        raise ValueError(f"variances need two seeds and two prompts at least, got {seeds} and {prompts}")
    mean = value_SP.mean()
    seed_S, prompt_P = value_SP.mean(1) - mean, value_SP.mean(0) - mean
    rest_SP = value_SP - mean - seed_S[:, None] - prompt_P[None]
    rest = float((rest_SP**2).sum() / ((seeds - 1) * (prompts - 1)))
    of_seeds = float(prompts * (seed_S**2).sum() / (seeds - 1))
    of_prompts = float(seeds * (prompt_P**2).sum() / (prompts - 1))
    between = max((of_seeds - rest) / prompts, 0.0), max((of_prompts - rest) / seeds, 0.0)
    return Components(*between, rest, of_seeds, seeds, prompts)


def standard_error(parts: Components, seeds: int, prompts: int) -> tuple[float, float]:
    """(standard error of the mean, Satterthwaite's degrees of freedom) of a table of that size."""
    squares = np.array([parts.rest + prompts * parts.seeds, parts.rest + seeds * parts.prompts, parts.rest])
    degrees = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    signed = squares * [1, 1, -1] / (seeds * prompts)
    variance = float(signed.sum())
    if variance <= 0:
        return 0.0, float(degrees[0])
    return variance**0.5, float(variance**2 / (signed**2 / degrees).sum())


def mean(value_SP: Float[np.ndarray, "S P"]) -> Estimate:
    """The mean of any numbers with its 95% interval; without a width for a single number.

    One seed says nothing of others, so its interval covers prompts only; one prompt's covers seeds only.
    """
    value = float(value_SP.mean())
    error, degrees = _spread(value_SP)
    half = error * float(scipy.stats.t.ppf(_UPPER, degrees)) if error else 0.0
    return Estimate(value, value - half, value + half, value_SP.size)


def rate(value_SP: Float[np.ndarray, "S P"]) -> Estimate:
    """The mean of numbers from 0 to 1 with a 95% interval from 0 to 1.

    The interval is Wilson's with the t-distribution's quantile and as many independent cases as have this standard
    error (Korn and Graubard 1998). That of counts (0 and 1) is never narrower than Wilson's over prompts: near 0 and 1
    a table has too little spread to tell its variance. One seed's interval covers prompts only; of counts it is
    Wilson's.
    """
    value, (seeds, prompts) = float(value_SP.mean()), value_SP.shape
    is_counted = bool(np.isin(value_SP, (0.0, 1.0)).all())
    error, degrees = _spread(value_SP)
    low, high = value, value
    if error and 0 < value < 1 and not (is_counted and seeds == 1):
        quantile = float(scipy.stats.t.ppf(_UPPER, degrees))
        low, high = intervals.wilson(value, value * (1 - value) / error**2, quantile)
    if is_counted:
        least = intervals.wilson(value, prompts)
        low, high = min(low, least[0]), max(high, least[1])
    return Estimate(value, low, high, value_SP.size)


def difference(value_SP: Float[np.ndarray, "S P"]) -> Estimate:
    """The mean of paired differences of shares, each from -1 to 1, with a 95% interval from -1 to 1.

    Where all are equal counts (-1, 0 or 1), another prompt might differ: the interval is as wide as Wilson's over
    prompts. Numbers beyond -1 and 1 are differences of no shares: their interval is that of `mean`.
    """
    found = mean(value_SP)
    if np.abs(value_SP).max() > 1:
        return found
    first, low, high = float(value_SP.flat[0]), found.low, found.high
    if first in (-1.0, 0.0, 1.0) and (value_SP == first).all():
        width = intervals.rate(0, value_SP.shape[1]).high
        low, high = found.value - width, found.value + width
    return Estimate(found.value, max(low, -1.0), min(high, 1.0), found.cases)


def p_value(difference_SP: Float[np.ndarray, "S P"]) -> float:
    """Two-sided p-value of a mean difference of 0. Raises ValueError for one seed, which tells nothing of another.

    Where all differences are equal and not 0 it is that of the sign test over prompts.
    """
    if (seeds := len(difference_SP)) < 2:
        raise ValueError(f"a test over seeds needs two at least, got {seeds}")
    value = float(difference_SP.mean())
    error, degrees = _spread(difference_SP)
    if not error:
        return min(1.0, 0.5 ** (difference_SP.shape[1] - 1)) if value else 1.0
    return float(2 * scipy.stats.t.sf(abs(value) / error, degrees))


def _spread(value_SP: Float[np.ndarray, "S P"]) -> tuple[float, float]:
    """(standard error of the mean, degrees of freedom); (0, 0) for a single number."""
    seeds, prompts = value_SP.shape
    if min(seeds, prompts) > 1:
        return standard_error(components(value_SP), seeds, prompts)
    if (count := value_SP.size) == 1:
        return 0.0, 0.0
    return float(value_SP.std(ddof=1)) / count**0.5, count - 1.0
