"""Compares models: clustered bootstrap, paired differences, McNemar's exact test, Holm's correction.

A case is one answer; its value is 0 or 1 (harmful or not), or any number. Cases of one cluster aren't independent:
prompts of a category, answers to a prompt, answers of models trained with one seed. Several factors of clusters are
crossed: each is resampled separately and a case's weight is the product (the pigeonhole bootstrap, Owen 2007), which
makes intervals rather too wide than too narrow.

`weights` are those of cases that were drawn with unequal chances: one over the chance of each.

`units` says which cases are of one unit, such as a prompt that models of several seeds answered, or a goal of several
attempts. Units lie within the clusters of the first factor (a prompt has one category), so they aren't crossed with it:
the interval is the wider one of clusters by the first factor and by units in its place. As a number, `units` says only
how many there are; 0 stands for the number of clusters of the finest factor. Every result is a pure function of its
arguments.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float, Int, Shaped

from safelm.stats.bootstrap import clustered_means, percentile_interval
from safelm.stats.intervals import Estimate, rate, wilson

DRAWS = 4000
Units = int | Sequence[Hashable]
Weights = Float[np.ndarray, " n"] | None


@dataclasses.dataclass(frozen=True)
class McNemar:
    """The exact test on discordant pairs: how often one model alone is harmful."""

    only_first: int
    only_second: int
    pairs: int
    p_value: float


def clustered_mean(
    value_n: Sequence[float | int] | Shaped[np.ndarray, " n"],
    *factors: Sequence[Hashable],
    draws: int = DRAWS,
    seed: int = 0,
    units: Units = 0,
    weights: Weights = None,
    bounded: bool = True,
) -> Estimate:
    """The mean with its 95% percentile interval over resampled clusters, or over resampled cases without factors.

    A factor with a single cluster says nothing about spread and is ignored. A sample of one value has no spread to
    resample. If that is a share, from 0 to 1, the interval is Wilson's of that share for as many independent cases as
    there are units: no numbers from 0 to 1 of this mean vary more than ones and zeros do. (-1, a difference, is as 1.)
    Of any other number nothing bounds the spread, and the interval has no width. `bounded=False` says that numbers
    between 0 and 1 are no shares either, but nats or rows per byte.

    Raises ValueError if there are no cases or a factor has another length.
    """
    value_n = np.asarray(value_n, np.float64)
    ways = _ways(len(value_n), factors, units)
    if (value_n == value_n[0]).all():
        value = float(value_n[0])
        return Estimate(value, *_without_spread(value, _num_units(units, ways, weights), bounded), len(value_n))
    mean = float(np.average(value_n, weights=weights))
    intervals = [percentile_interval(clustered_means(value_n, codes, draws, seed, weights)) for codes in ways]
    lows, highs = zip(*intervals, strict=True)
    return Estimate(mean, min(mean, *lows), max(mean, *highs), len(value_n))


def clustered_rate(
    value_n: Sequence[float | int] | Shaped[np.ndarray, " n"],
    *factors: Sequence[Hashable],
    units: Units = 0,
    weights: Weights = None,
) -> Estimate:
    """The share of ones, with Wilson's 95% interval at the effective number of independent cases.

    The effective number is cases / design effect. The design effect, at least 1 (with weights, Kish's), is the
    variance over resampled clusters (crossed, as above) divided by that of independent cases (Korn and Graubard 1998,
    with Wilson's interval for theirs). So an interval is never narrower than Wilson's of the cases, not even near 0
    and 1, where resampling underestimates the spread. A sample of only 0s or only 1s has no spread and counts as as
    many independent cases as there are units (with weights, as many as clusters of equal weight would tell as much).

    Raises ValueError if there are no cases or a factor has another length.
    """
    value_n = np.asarray(value_n, np.float64)
    ways = _ways(len(value_n), factors, units)
    share, cases = float(np.average(value_n, weights=weights)), len(value_n)
    if (value_n == value_n[0]).all():
        return Estimate(float(value_n[0]), *wilson(float(value_n[0]), _num_units(units, ways, weights)), cases)
    effect = 1.0 if weights is None else cases / _effective_number(weights)
    for codes in ways:
        if len(codes) > 1 or _clusters(codes) < cases or weights is not None:
            variance = float(clustered_means(value_n, codes, DRAWS, 0, weights).var())
            effect = max(effect, variance / (share * (1 - share) / cases))
    return Estimate(share, *wilson(share, cases / effect), cases)


def paired_difference(
    first_n: Sequence[float | int] | Shaped[np.ndarray, " n"],
    second_n: Sequence[float | int] | Shaped[np.ndarray, " n"],
    *factors: Sequence[Hashable],
    draws: int = DRAWS,
    seed: int = 0,
    units: Units = 0,
) -> Estimate:
    """Mean of first - second over the same cases, with its clustered 95% interval.

    If no case differs, the interval comes from Wilson's upper bound on the share of differing cases among `units`. If
    all differ alike, by a part of 1, it is Wilson's for numbers from -1 to 1 of this mean, which spread widest where
    each is -1 or 1.
    """
    first_n, second_n = np.asarray(first_n, np.float64), np.asarray(second_n, np.float64)
    if first_n.shape != second_n.shape:
        raise ValueError(f"paired: {len(first_n)} and {len(second_n)} cases")
    difference_n = first_n - second_n
    if not difference_n.any():
        bound = rate(0, _num_units(units, _ways(len(difference_n), factors, units))).high
        return Estimate(0.0, -bound, bound, len(difference_n))
    if (difference_n == difference_n[0]).all() and -1 < difference_n[0] < 1:
        value = float(difference_n[0])
        low, high = wilson((value + 1) / 2, _num_units(units, _ways(len(difference_n), factors, units)))
        return Estimate(value, 2 * low - 1, 2 * high - 1, len(difference_n))
    return clustered_mean(difference_n, *factors, draws=draws, seed=seed, units=units)


def mcnemar(
    first_n: Sequence[bool] | Shaped[np.ndarray, " n"], second_n: Sequence[bool] | Shaped[np.ndarray, " n"]
) -> McNemar:
    """Two-sided test of whether two models differ on the same prompts. Raises ValueError for unequal lengths."""
    pairs = list(zip(first_n, second_n, strict=True))
    only_first = sum(bool(a) and not b for a, b in pairs)
    only_second = sum(bool(b) and not a for a, b in pairs)
    discordant = only_first + only_second
    p_value = float(scipy.stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, len(pairs), p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values in the mapping's order; they control the family-wise error rate."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if not 0 <= p_values[name] <= 1:
            raise ValueError(f"p-value of {name}: {p_values[name]} is not in [0, 1]")
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _ways(cases: int, factors: Sequence[Sequence[Hashable]], units: Units) -> list[list[Int[np.ndarray, " n"]]]:
    """The codes by the factors, and those with the units, where they are told, in place of the first factor."""
    ways = [_codes(cases, factors)]
    if not isinstance(units, int):
        ways.append(_codes(cases, (units, *factors[1:])))
    return ways


def _num_units(units: Units, ways: Sequence[Sequence[Int[np.ndarray, " n"]]], weights: Weights = None) -> int | float:
    if not isinstance(units, int):
        return len(set(units))
    if units or weights is None:
        return units or _clusters(ways[0])
    return min(_effective_number(np.bincount(code_n, weights)) for code_n in ways[0])


def _effective_number(weight_n: Float[np.ndarray, " n"]) -> float:
    """How many cases of equal weight tell as much (Kish 1965)."""
    return float(weight_n.sum() ** 2 / (weight_n**2).sum())


def _without_spread(value: float, units: int | float, bounded: bool) -> tuple[float, float]:
    """The interval of a value that all cases have: Wilson's for a share, or a difference of -1, else itself."""
    if value == -1.0:
        low, high = wilson(1.0, units)
        return -high, -low
    is_share = value in (0.0, 1.0) or (bounded and 0 < value < 1)
    return wilson(value, units) if is_share else (value, value)


def _codes(cases: int, factors: Sequence[Sequence[Hashable]]) -> list[Int[np.ndarray, " n"]]:
    """Each factor's clusters as numbers from 0, without factors of one cluster.

    If none is left, each case is a cluster.
    """
    if not cases:
        raise ValueError("no cases to take a mean of")
    codes = []
    for factor in factors:
        if len(factor) != cases:
            raise ValueError(f"a factor of {len(factor)} clusters for {cases} cases")
        numbers: dict[Hashable, int] = {}
        code_n = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in factor])
        if len(numbers) > 1:
            codes.append(code_n)
    return codes or [np.arange(cases)]


def _clusters(codes: Sequence[Int[np.ndarray, " n"]]) -> int:
    """The number of clusters of the finest factor."""
    return max(int(code_n.max()) + 1 for code_n in codes)
