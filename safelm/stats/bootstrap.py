"""Resampling with replacement: of clusters, of groups of rows (Efron 1979; Owen 2007).

Every result is a pure function of its arguments, the seed among them.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

_BLOCK = 1 << 22  # weights at once


def percentile_interval(value_d: Sequence[float] | Float[np.ndarray, " d"]) -> tuple[float, float]:
    """The middle 95% of the draws."""
    low, high = np.quantile(value_d, (0.025, 0.975))
    return float(low), float(high)


def clustered_means(
    value_n: Float[np.ndarray, " n"],
    codes: Sequence[Int[np.ndarray, " n"]],
    draws: int,
    seed: int,
    weight_n: Float[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " d"]:
    """Means of the resampled cases; a case's weight is the product of how often each of its clusters was drawn.

    Args:
      codes: for each factor, the number (from 0) of every case's cluster.
      weight_n: further weights, such as those of cases drawn with unequal chances.

    Returns up to `draws` means: a draw of crossed factors that hits no case is left out.
    """
    rng = np.random.default_rng([seed, len(value_n)])
    means = []
    step = max(1, _BLOCK // len(value_n))
    for start in range(0, draws, step):
        count = min(step, draws - start)
        weight_dn = np.ones((count, len(value_n)))
        for code_n in codes:
            weight_dn *= _times_drawn(rng, int(code_n.max()) + 1, count)[:, code_n]
        if weight_n is not None:
            weight_dn *= weight_n
        total_d = weight_dn.sum(1)
        good_d = total_d > 0
        means.append((weight_dn[good_d] @ value_n) / total_d[good_d])
    return np.concatenate(means)


def grouped_interval(
    statistic: Callable[..., float], *columns: np.ndarray, groups: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of `statistic(*columns)` over resampled groups of rows; draws without a value (NaN) are left out."""
    names, which = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(which == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        values.append(statistic(*(column[rows] for column in columns)))
    return percentile_interval([value for value in values if not np.isnan(value)] or [np.nan])


def _times_drawn(rng: np.random.Generator, clusters: int, draws: int) -> Int[np.ndarray, "d c"]:
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)
