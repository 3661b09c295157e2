"""Rates and differences over several trainings reach as far as trainings differ."""

import numpy as np
import pytest

from safelm.stats import comparison, crossed, seeds


def _cases(value_SP):
    """Values, categories, seeds and units of a full table, one case a cell."""
    count, prompts = value_SP.shape
    unit_n = np.tile(np.arange(prompts), count)
    return value_SP.ravel(), (unit_n % 4).tolist(), np.repeat(np.arange(count), prompts).tolist(), unit_n.tolist()


def _table(count, prompts, *, between, seed):
    """0s and 1s whose rate differs between seeds by a standard deviation of `between`."""
    rng = np.random.default_rng(seed)
    rate_S = np.clip(0.5 + between * rng.standard_normal(count), 0.02, 0.98)
    return (rng.random((count, prompts)) < rate_S[:, None]).astype(float)


@pytest.mark.parametrize("draw", range(5))
def test_one_seed_is_what_the_clusters_say(draw):
    first_n, categories, one, units = _cases(_table(1, 40, between=0.1, seed=draw))
    second_n, *_ = _cases(_table(1, 40, between=0.1, seed=100 + draw))
    assert seeds.rate(first_n, categories, one, units) == comparison.clustered_rate(first_n, categories, units=units)
    found = seeds.difference(first_n, second_n, categories, one, units)
    assert found == comparison.paired_difference(first_n, second_n, categories, units=units)
    of_units = comparison.mcnemar(first_n > second_n, first_n < second_n)
    assert seeds.p_value(first_n, second_n, one, units) == of_units.p_value
    assert seeds.unit_test(first_n - second_n, units) == of_units


@pytest.mark.parametrize("draw", range(5))
def test_an_interval_reaches_as_far_as_both_ways_of_it(draw):
    value_SP = _table(3, 40, between=0.15, seed=draw)
    value_n, categories, trained, units = _cases(value_SP)
    found = seeds.rate(value_n, categories, trained, units)
    for other in (comparison.clustered_rate(value_n, categories, trained, units=units), crossed.rate(value_SP)):
        assert found.low <= other.low <= other.high <= found.high
    assert found.value == pytest.approx(value_SP.mean())


def test_trainings_that_differ_by_chance_are_seldom_told_apart():
    """The rate of false alarms at 5%, of models that differ between seeds as ours do; McNemar's is far above."""
    alarms, of_units = [], []
    for draw in range(300):
        first_n, _, trained, units = _cases(_table(3, 60, between=0.12, seed=2 * draw))
        second_n, *_ = _cases(_table(3, 60, between=0.12, seed=2 * draw + 1))
        alarms.append(seeds.p_value(first_n, second_n, trained, units) < 0.05)
        of_units.append(seeds.unit_test(first_n - second_n, units).p_value < 0.05)
    assert np.mean(alarms) < 0.08
    assert np.mean(of_units) > 0.15


def test_a_difference_of_every_training_is_told():
    base_SP = _table(5, 80, between=0.03, seed=0)
    first_n, categories, trained, units = _cases(np.zeros_like(base_SP))
    second_n, *_ = _cases(base_SP)
    assert seeds.difference(first_n, second_n, categories, trained, units).high < 0
    assert seeds.p_value(first_n, second_n, trained, units) < 0.01


def test_attempts_count_as_one_and_units_that_a_seed_lacks_are_left_out():
    value_n = [1, 0, 1, 1, 0, 0, 1]
    of_seed, units = [0, 0, 0, 1, 1, 1, 1], ["a", "a", "b", "a", "b", "b", "c"]
    np.testing.assert_array_equal(seeds.table(value_n, of_seed, units), [[0.5, 1.0], [1.0, 0.0]])


def test_seeds_without_a_unit_in_common_are_compared_by_their_means():
    np.testing.assert_array_equal(seeds.table([1, 0, 1], [0, 0, 1], ["a", "b", "c"]), [[0.5], [1.0]])
    assert seeds.p_value([1, 0, 1], [0, 0, 0], [0, 0, 1], ["a", "b", "c"]) > 0.05


@pytest.mark.parametrize("draw", range(4))
@pytest.mark.parametrize("is_common", [True, False])
def test_the_difference_of_two_trainings_of_few_attempts_lies_within_one(draw, is_common):
    """Their cells are means of attempts or, without a goal in common, of whole seeds."""
    rng = np.random.default_rng(draw)
    trained, goals = np.repeat([0, 1], 20), np.tile(np.repeat(np.arange(10), 2), 2)
    first_n = (rng.random(40) < np.where(trained == 0, 0.2, 0.95)).astype(float)
    second_n = (rng.random(40) < 0.3).astype(float)
    units = goals if is_common else goals + 10 * trained
    found = seeds.difference(first_n, second_n, (goals % 3).tolist(), trained.tolist(), units.tolist())
    assert -1 <= found.low <= found.value <= found.high <= 1
    own = comparison.paired_difference(first_n, second_n, (goals % 3).tolist(), trained.tolist(), units=units.tolist())
    assert found.low <= own.low <= own.high <= found.high


def test_no_cases_is_an_error():
    with pytest.raises(ValueError, match="no cases"):
        seeds.rate([], [], [], [])
