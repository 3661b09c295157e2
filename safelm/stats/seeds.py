"""Rates and differences of models that were trained with several seeds, where another training would give another.

Cases are answers, as in `safelm.stats.comparison`; their units are prompts, or goals of several attempts. Resampled
clusters of few seeds are too narrow, and McNemar's test knows of these models alone (`scripts/studies/error_rates.py`).
So with two seeds or more an interval reaches as far as that of clusters and that of the analysis of variance over seeds
and units (`safelm.stats.crossed`), and a p-value is the larger one of both tests. With one seed nothing is added.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Shaped

from safelm.stats import comparison, crossed
from safelm.stats.intervals import Estimate

Values = Sequence[float | int] | Shaped[np.ndarray, " n"]


def rate(
    value_n: Values, categories: Sequence[Hashable], seeds: Sequence[Hashable], units: Sequence[Hashable]
) -> Estimate:
    """The share of ones with its 95% interval; categories, or units in their place, are crossed with seeds.

    Raises ValueError if there are no cases or a factor has another length.
    """
    found = comparison.clustered_rate(value_n, categories, seeds, units=units)
    value_SP = table(value_n, seeds, units)
    return _wider(found, crossed.rate(value_SP)) if len(value_SP) > 1 else found


def difference(
    first_n: Values,
    second_n: Values,
    categories: Sequence[Hashable],
    seeds: Sequence[Hashable],
    units: Sequence[Hashable],
) -> Estimate:
    """The mean of first - second over the same cases with its 95% interval, clusters as in `rate`."""
    found = comparison.paired_difference(first_n, second_n, categories, seeds, units=units)
    value_SP = table(_differences(first_n, second_n), seeds, units)
    return _wider(found, crossed.difference(value_SP)) if len(value_SP) > 1 else found


def p_value(first_n: Values, second_n: Values, seeds: Sequence[Hashable], units: Sequence[Hashable]) -> float:
    """Two-sided p-value of no difference: McNemar's over units, and with several seeds the t-test's if that is larger.

    McNemar's test counts a unit once, by the sign of its mean difference over seeds and attempts.
    """
    value_n = _differences(first_n, second_n)
    value_SP = table(value_n, seeds, units)
    found = unit_test(value_n, units).p_value
    return max(found, crossed.p_value(value_SP)) if len(value_SP) > 1 else found


def unit_test(difference_n: Values, units: Sequence[Hashable]) -> comparison.McNemar:
    """McNemar's test of units: cases of several seeds or attempts at one unit aren't independent."""
    balance: dict[Hashable, float] = {}
    for value, unit in zip(difference_n, units, strict=True):
        balance[unit] = balance.get(unit, 0.0) + float(value)
    return comparison.mcnemar([each > 0 for each in balance.values()], [each < 0 for each in balance.values()])


def table(value_n: Values, seeds: Sequence[Hashable], units: Sequence[Hashable]) -> Float[np.ndarray, "S P"]:
    """The mean of every seed and unit, of those units that all seeds have.

    Where there is none, the one column holds the seeds' means.
    """
    cells: dict[Hashable, dict[Hashable, list[float]]] = {}
    for value, seed, unit in zip(value_n, seeds, units, strict=True):
        cells.setdefault(seed, {}).setdefault(unit, []).append(float(value))
    common = [unit for unit in next(iter(cells.values()), {}) if all(unit in of_seed for of_seed in cells.values())]
    if not common:
        whole = [[value for values in of_seed.values() for value in values] for of_seed in cells.values()]
        return np.array([[np.mean(values)] for values in whole]).reshape(-1, 1)
    return np.array([[np.mean(of_seed[unit]) for unit in common] for of_seed in cells.values()])


def _differences(first_n: Values, second_n: Values) -> Float[np.ndarray, " n"]:
    return np.asarray(first_n, np.float64) - np.asarray(second_n, np.float64)


def _wider(first: Estimate, second: Estimate) -> Estimate:
    return Estimate(first.value, min(first.low, second.low), max(first.high, second.high), first.cases)
