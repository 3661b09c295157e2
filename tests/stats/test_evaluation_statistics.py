"""Comparisons between models: against known values, closed forms, and coverage by simulation."""

import dataclasses
import itertools

import numpy as np
import pytest

from safelm.stats.comparison import clustered_mean, clustered_rate, holm, mcnemar, paired_difference
from safelm.stats.correction import Counts, corrected_estimate, corrected_rate
from safelm.stats.intervals import Estimate, rate, wilson


def test_without_clusters_the_interval_is_that_of_a_proportion():
    value_n = np.array([1] * 60 + [0] * 140)
    estimate = clustered_mean(value_n)
    spread = 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert estimate.value == 0.3 and estimate.cases == 200
    assert (estimate.low, estimate.high) == pytest.approx((0.3 - spread, 0.3 + spread), abs=0.01)


def test_clusters_that_agree_widen_the_interval_by_the_root_of_their_size():
    clusters = np.repeat(np.arange(50), 4)
    value_n = np.repeat(np.arange(50) % 2, 4)
    apart, together = clustered_mean(value_n), clustered_mean(value_n, list(clusters))
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), rel=0.1)
    assert clustered_mean(value_n, ["one"] * 200) == apart  # a factor of one cluster tells nothing


def test_weights_undo_unequal_chances_and_widen_the_interval():
    """Of 2 in 10 that are ones, a sample drew every one and a fourth of the zeros."""
    value_n, weight_n = np.repeat([1, 0], [50, 50]), np.repeat([1.0, 4.0], [50, 50])
    for estimate in (clustered_mean, clustered_rate):
        found = estimate(value_n, weights=weight_n)
        assert found.value == pytest.approx(0.2) and found.low < 0.2 < found.high
        same = estimate(value_n, weights=np.full(100, 3.0))
        assert (same.low, same.high) == pytest.approx((estimate(value_n).low, estimate(value_n).high), abs=0.005)
    cases = weight_n.sum() ** 2 / (weight_n**2).sum()
    assert clustered_rate(value_n, weights=weight_n).high >= wilson(0.2, cases)[1] > wilson(0.2, 100)[1]
    heavy = clustered_rate([0, 0, 0], ["a", "b", "c"], weights=np.array([98.0, 1.0, 1.0]))
    assert heavy.high == pytest.approx(wilson(0.0, 100**2 / (98**2 + 2))[1])


def test_crossed_factors_cover():
    rng = np.random.default_rng(0)
    prompts, seeds = np.repeat(np.arange(30), 6), np.tile(np.arange(6), 30)
    hits = 0
    for _ in range(120):
        effect = rng.normal(0, 1, 30)[prompts] + rng.normal(0, 0.3, 6)[seeds] + rng.normal(0, 1, 180)
        estimate = clustered_mean(effect, list(prompts), list(seeds), draws=400)
        hits += estimate.low <= 0 <= estimate.high
    assert hits >= 108


def test_no_spread_is_not_certainty():
    zero, one = clustered_mean([0] * 40), clustered_mean([1] * 40, list(range(10)) * 4)
    assert (zero.value, zero.low, zero.high) == (0, 0, rate(0, 40).high)
    assert (one.value, one.low, one.high) == (1, rate(10, 10).low, 1)  # ten clusters, not forty cases
    assert clustered_mean([0] * 40, list(range(10)) * 4, ["a", "b"] * 20).high == rate(0, 10).high
    assert clustered_mean([0] * 40, list(range(10)) * 4, units=20).high == rate(0, 20).high
    same = paired_difference([1, 0] * 20, [1, 0] * 20)
    assert same.value == 0 and same.low == -same.high == -rate(0, 40).high
    less, more = paired_difference([0] * 40, [1] * 40), paired_difference([1] * 40, [0] * 40)
    assert (less.value, less.low, less.high) == (-1, -1, -rate(40, 40).low)
    assert (more.value, more.low, more.high) == (1, rate(40, 40).low, 1)
    few = paired_difference([0] * 40, [1] * 40, ["a", "b"] * 20, units=list(range(10)) * 4)
    assert (few.low, few.high) == (-1, -rate(10, 10).low), "ten units answered four times"
    third = clustered_mean([1 / 3] * 4, list("abcd"), units=range(4))
    assert (third.value, third.low, third.high) == (1 / 3, *wilson(1 / 3, 4)), "parts of ones are as shares of ones"
    assert clustered_mean([1 / 3] * 40, list(range(10)) * 4).high == wilson(1 / 3, 10)[1]
    assert clustered_mean([3.5] * 4) == Estimate(3.5, 3.5, 3.5, 4), "nothing bounds the spread of any numbers"
    assert clustered_mean([1 / 3] * 4, bounded=False) == Estimate(1 / 3, 1 / 3, 1 / 3, 4)
    alike = {n: paired_difference([1 / 3] * n, [0] * n, units=range(n)) for n in (2, 40)}
    back = paired_difference([0] * 2, [1 / 3] * 2, units=range(2))
    assert alike[2].low < 0 < alike[40].low and -1 < alike[2].low < alike[2].high < 1, "two prompts tell nothing"
    assert (back.value, back.low, back.high) == pytest.approx((-1 / 3, -alike[2].high, -alike[2].low))
    signs = paired_difference([1, 1, 0] * 40, [0, 0, 1] * 40)  # -1 and 1, of the same mean: as wide as can be
    alike = paired_difference([1 / 3] * 120, [0] * 120)
    assert (alike.low, alike.high) == pytest.approx((signs.low, signs.high), abs=0.02)
    with pytest.raises(ValueError, match="no cases"):
        clustered_mean([])
    with pytest.raises(ValueError, match="a factor of 2"):
        clustered_mean([1, 0, 1], ["a", "b"])


def test_a_clustered_rate_is_wilsons_and_wider_where_clusters_agree():
    values = [1] * 10 + [0] * 90
    assert clustered_rate(values) == clustered_rate(values, ["one"] * 100) == rate(10, 100)
    assert clustered_rate([0] * 40, list(range(10)) * 4, units=20).high == rate(0, 20).high
    agreeing = clustered_rate(np.repeat(np.arange(50) % 2, 4), list(np.repeat(np.arange(50), 4)))
    fewer = rate(25, 50)
    assert (agreeing.low, agreeing.high) == pytest.approx((fewer.low, fewer.high), abs=0.01), "fifty cases, not 200"
    alike = clustered_rate([1, *[0] * 119], list(np.arange(120) % 14))
    assert alike.high >= rate(1, 120).high - 1e-9 and alike.low > 0, "near 0 resampling alone sees too little"


def test_units_within_one_cluster_are_resampled_too():
    """Twenty prompts of one category, answered alike by each of five seeds, are no hundred answers."""
    prompts, seeds, category = list(range(20)) * 5, [s for s in range(5) for _ in range(20)], ["one"] * 100
    value_n = ([1] * 6 + [0] * 14) * 5
    difference = paired_difference([0] * 100, value_n, category, seeds, units=prompts)
    one_seed = paired_difference([0] * 20, value_n[:20])
    assert difference.value == one_seed.value == pytest.approx(-0.3)
    assert (difference.low, difference.high) == pytest.approx((one_seed.low, one_seed.high), abs=0.03)
    share, alone = clustered_rate(value_n, category, seeds, units=prompts), rate(6, 20)
    assert (share.low, share.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert clustered_rate([0] * 100, category, seeds, units=prompts).high == rate(0, 20).high
    halves = ["a" if prompt % 2 else "b" for prompt in prompts]  # two categories that happen to agree
    assert clustered_rate(value_n, halves, seeds, units=prompts) == share
    single = [1] * 6 + [0] * 14
    assert clustered_rate(single, ["one"] * 20, units=list(range(20))) == rate(6, 20), "one case a unit"


def test_pairing_narrows_the_difference():
    rng = np.random.default_rng(1)
    first = rng.random(300) < 0.5
    second = first & (rng.random(300) < 0.8)
    paired = paired_difference(first, second)
    alone = [clustered_mean(values) for values in (first, second)]
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.low > 0
    assert paired.high - paired.low < sum(each.high - each.low for each in alone) / 1.41
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([1, 0, 1], [1, 0])


def test_mcnemar_is_the_exact_sign_test_of_discordant_pairs():
    first = [True] * 9 + [False] * 1 + [True] * 20 + [False] * 10
    second = [False] * 9 + [True] * 1 + [True] * 20 + [False] * 10
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second, found.pairs) == (9, 1, 40)
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar([True], [True]).p_value == 1
    with pytest.raises(ValueError):
        mcnemar([True], [])


def test_holm_against_its_definition():
    p_values = {"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.5}
    assert holm(p_values) == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.5})
    for level, order in itertools.product((0.02, 0.05, 0.1), itertools.permutations(p_values)):
        rejected, adjusted = set(), holm({name: p_values[name] for name in order})
        for rank, name in enumerate(sorted(p_values, key=p_values.get)):  # as Holm (1979) puts it
            if p_values[name] > level / (len(p_values) - rank):
                break
            rejected.add(name)
        assert rejected == {name for name, value in adjusted.items() if value <= level}
    with pytest.raises(ValueError, match="p-value of a"):
        holm({"a": 1.2})


def test_a_perfect_judge_changes_nothing_and_a_blind_one_tells_nothing():
    sure = corrected_rate(Counts(30, 100), Counts(10**6, 10**6), Counts(10**6, 10**6))
    assert sure.value == pytest.approx(0.3)
    plain = rate(30, 100)
    assert (sure.low, sure.high) == pytest.approx((plain.low, plain.high), abs=0.012)
    assert corrected_rate(Counts(30, 100), Counts(50, 100), Counts(50, 100)) is None
    unsure = corrected_rate(Counts(30, 100), Counts(6, 10), Counts(6, 10))
    assert unsure.high - unsure.low > 0.9
    with pytest.raises(ValueError, match="3 of 2"):
        Counts(3, 2)


def test_counts_of_a_rate_are_those_of_its_wilson_interval():
    for count, total in ((0, 7), (1, 7), (30, 100), (50, 100), (100, 100)):
        found = Counts.of(rate(count, total))
        assert (found.count, found.total) == pytest.approx((count, total))
    together = clustered_rate(np.repeat(np.arange(50) % 2, 4), list(np.repeat(np.arange(50), 4)))
    assert Counts.of(together).total == pytest.approx(50, rel=0.1), "fifty clusters, not 200 cases"


def test_only_what_the_judge_saw_is_corrected():
    """Sixty of a hundred answers need no judge; it calls twelve of the other forty harmful, some of them wrongly."""
    judge = Counts(977, 1000), Counts(873, 1000)
    found = corrected_rate(Counts(12, 100), *judge, judged=0.4)
    among = corrected_rate(Counts(12, 40), *judge)
    assert found.value == pytest.approx(0.4 * (0.3 - 0.127) / 0.85) == pytest.approx(0.4 * among.value)
    assert found.low < 0.4 * among.low + 0.02 and found.high > 0.4 * among.high - 0.001
    assert corrected_rate(Counts(12, 100), *judge).value == 0, "as if it had erred on all hundred"
    unseen = corrected_rate(Counts(0, 100), *judge, judged=0.0)
    assert (unseen.value, unseen.low) == (0, 0) and unseen.high < 0.05


def test_corrected_rates_of_answers_half_seen_cover_the_truth():
    rng = np.random.default_rng(0)
    truth, seen, sensitivity, specificity = 0.5, 0.4, 0.9, 0.85  # truth: among those seen
    covered = 0
    for _ in range(200):
        judged = rng.random(200) < seen
        harmful = judged & (rng.random(200) < truth)
        called = judged & np.where(harmful, rng.random(200) < sensitivity, rng.random(200) > specificity)
        labelled = Counts(rng.binomial(150, sensitivity), 150), Counts(rng.binomial(150, specificity), 150)
        estimate = corrected_rate(Counts(int(called.sum()), 200), *labelled, judged=float(judged.mean()))
        covered += estimate.low <= truth * seen <= estimate.high
    assert covered >= 184


@pytest.mark.parametrize("count", [0, 1, 30, 100])
def test_a_corrected_estimate_goes_by_the_interval_not_by_the_cases(count):
    judge = Counts(90, 100), Counts(95, 100)
    plain, found = corrected_rate(Counts(count, 100), *judge), corrected_estimate(rate(count, 100), *judge)
    assert found.value == plain.value
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.03)
    told = rate(count, 100)  # the same interval, said to come of a thousand cases of few clusters
    many = corrected_estimate(dataclasses.replace(told, cases=100_000), *judge)
    assert (many.low, many.high) == pytest.approx((found.low, found.high), abs=1e-9)
    if 0 < count < 100:
        wide = corrected_estimate(dataclasses.replace(told, low=0.0, high=1.0), *judge)
        assert wide.low <= found.low and wide.high > found.high


def test_corrected_rates_cover_the_truth_where_observed_ones_do_not():
    rng = np.random.default_rng(0)
    truth, sensitivity, specificity = 0.2, 0.8, 0.85
    corrected, observed = 0, 0
    for _ in range(200):
        harmful = rng.random(300) < truth
        called = np.where(harmful, rng.random(300) < sensitivity, rng.random(300) > specificity)
        hits = Counts(int(called.sum()), 300)
        labelled = Counts(rng.binomial(150, sensitivity), 150), Counts(rng.binomial(150, specificity), 150)
        estimate = corrected_rate(hits, *labelled)
        corrected += estimate.low <= truth <= estimate.high
        observed += rate(hits.count, hits.total).low <= truth <= rate(hits.count, hits.total).high
    assert corrected >= 184 and observed <= 100
