"""Means over seeds and prompts: error rates of tests and intervals in simulated studies, and tables without spread."""

import numpy as np
import pytest

from safelm.stats import crossed
from safelm.stats.intervals import rate, wilson

STUDIES = 400


def differences(seeds, prompts, spread, seed=0, count=STUDIES):
    """Paired differences of answers, -1, 0 or 1 and what a seed adds, whose mean over all studies is 0."""
    rng = np.random.default_rng(seed)
    of_seeds = rng.normal(0, spread, (count, seeds, 1))
    of_prompts = rng.normal(0, 0.15, (count, 1, prompts))
    return of_seeds + of_prompts + rng.choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=(count, seeds, prompts))


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
def test_a_true_null_is_rejected_no_oftener_than_the_level_says(seeds, spread):
    p_values = [crossed.p_value(study) for study in differences(seeds, 60, spread)]
    assert np.mean(np.array(p_values) < 0.05) < 0.08 and np.mean(np.array(p_values) < 0.01) < 0.025


@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_cover_the_mean_of_all_seeds_and_prompts(seeds):
    found = [crossed.difference(study) for study in differences(seeds, 60, 0.2, seed=1)]
    assert np.mean([each.low <= 0 <= each.high for each in found]) > 0.92
    rng = np.random.default_rng(2)
    share_S = rng.beta(3, 9, (STUDIES, seeds, 1))  # a quarter, and a spread of 12 points between seeds
    answers = (rng.random((STUDIES, seeds, 100)) < share_S).astype(float)
    rates = [crossed.rate(study) for study in answers]
    assert np.mean([each.low <= 0.25 <= each.high for each in rates]) > 0.92
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in rates)


def test_a_true_difference_is_found():
    p_values = [crossed.p_value(study - 0.2) for study in differences(5, 60, 0.03)]
    assert np.mean(np.array(p_values) < 0.05) > 0.8


def test_components_are_those_of_the_simulation_on_average():
    rng = np.random.default_rng(0)
    tables = (
        rng.normal(0, 0.02**0.5, (300, 12, 1))
        + rng.normal(0, 0.05**0.5, (300, 1, 60))
        + rng.normal(0, 0.3**0.5, (300, 12, 60))
    )
    found = [crossed.components(table) for table in tables]
    for name, variance in (("seeds", 0.02), ("prompts", 0.05), ("rest", 0.3)):
        assert np.mean([getattr(each, name) for each in found]) == pytest.approx(variance, rel=0.1)
    with pytest.raises(ValueError, match="two seeds and two prompts at least, got 1 and 10"):
        crossed.components(np.zeros((1, 10)))


def test_the_upper_bound_of_the_variance_between_seeds_holds_in_four_of_five_pilots():
    """Also where the estimate is 0, as that of many a small pilot is."""
    parts = [crossed.components(study) for study in differences(3, 120, 0.03, seed=3)]
    assert 0.2 < np.mean([each.seeds == 0 for each in parts]) < 0.7
    assert 0.74 < np.mean([each.upper().seeds >= 0.03**2 for each in parts]) < 0.86
    assert all(each.upper().seeds >= each.seeds for each in parts)


def test_tables_without_spread_are_as_uncertain_as_their_prompts():
    none, all_of_them = crossed.rate(np.zeros((3, 100))), crossed.rate(np.ones((3, 100)))
    assert (none.low, none.high) == wilson(0, 100) and (all_of_them.low, all_of_them.high) == wilson(1, 100)
    bound = rate(0, 100).high
    for value, low, high in ((0, -bound, bound), (-1, -1, -1 + bound), (1, 1 - bound, 1)):
        found = crossed.difference(np.full((3, 100), float(value)))
        assert (found.value, found.low, found.high) == pytest.approx((value, low, high))
    assert crossed.p_value(np.zeros((3, 100))) == 1 and crossed.p_value(-np.ones((3, 100))) < 1e-20
    assert crossed.p_value(np.ones((2, 1))) == 1  # one prompt tells nothing


def test_one_seed_covers_prompts_and_one_prompt_seeds():
    answers = np.arange(10) < 4
    alone = crossed.rate(answers[None].astype(float))
    assert (alone.low, alone.high) == wilson(0.4, 10)
    with pytest.raises(ValueError, match="two at least, got 1"):
        crossed.p_value(answers[None].astype(float))
    numbers = np.array([[2.0], [3.0], [7.0]])
    found = crossed.mean(numbers)
    half = 4.302653 * numbers.std(ddof=1) / 3**0.5
    assert (found.value, found.high) == (4.0, pytest.approx(4 + half, rel=1e-6))
    assert crossed.mean(np.array([[5.0]])).high == 5.0


@pytest.mark.parametrize("attempts", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (3, 2), (4, 30)])
def test_a_difference_of_shares_stays_within_one(attempts, shape):
    """Also of means of attempts, and of the whole seeds' where no goal is common (one column)."""
    rng = np.random.default_rng(shape[1])
    for rate_S in ((0.05, 0.95), (0.5, 0.5), (0.9, 1.0)):
        share = np.resize(rate_S, shape[0])[:, None]
        after_SP, before_SP = rng.binomial(attempts, share, shape), rng.binomial(attempts, 1 - share, shape)
        value_SP = (after_SP - before_SP) / attempts
        found = crossed.difference(value_SP)
        assert -1 <= found.low <= found.value <= found.high <= 1
        plain = crossed.mean(value_SP)
        if 0 < plain.high - plain.low:
            assert (found.low, found.high) == (max(plain.low, -1), min(plain.high, 1))


def test_a_difference_of_other_numbers_is_not_held_within_one():
    numbers = np.array([[0.5, -3.0], [2.0, 8.0]])
    assert crossed.difference(numbers) == crossed.mean(numbers) and crossed.mean(numbers).high > 8
