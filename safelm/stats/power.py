"""What a design of seeds and prompts can tell, from the variances of a pilot: the power of a paired difference.

Models answer the same prompts, so of two rows compared every (seed, prompt) has a difference. Variances and test are
those of `safelm.stats.crossed`.
"""

import numpy as np
import scipy.optimize
import scipy.stats

from safelm.stats.crossed import Components, standard_error

POWER = 0.8
_QUANTILES = (np.arange(4000) + 0.5) / 4000  # SciPy's non-central t is NaN for few degrees of freedom


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
