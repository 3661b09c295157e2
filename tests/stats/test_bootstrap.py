"""Resampling: the draws are fixed, so that published intervals stay; two ways of one resampling agree."""

import numpy as np
import pytest

from safelm.stats.bootstrap import clustered_means, crossed_means, grouped_interval, percentile_interval


def test_the_draws_are_fixed():
    table_SP, value_n = np.arange(6.0).reshape(2, 3), np.array([0.0, 1.0, 1.0, 0.0, 1.0, 3.0])
    np.testing.assert_allclose(crossed_means(table_SP, 4), [11 / 6, 2.5, 11 / 3, 11 / 3])
    np.testing.assert_allclose(
        clustered_means(value_n, [np.array([0, 0, 1, 1, 2, 2])], 4, seed=7), [1.0, 1.0, 0.5, 1.5]
    )
    assert grouped_interval(np.mean, value_n, groups=np.array([0, 0, 1, 1, 2, 2]), draws=50, seed=1) == (0.5, 2.0)


def test_a_full_table_resamples_as_its_crossed_clusters_do():
    table_SP = np.random.default_rng(0).random((4, 30))
    codes = [np.repeat(np.arange(4), 30), np.tile(np.arange(30), 4)]
    crossed, clustered = crossed_means(table_SP, 8000), clustered_means(table_SP.ravel(), codes, 8000, seed=0)
    assert percentile_interval(crossed) == pytest.approx(percentile_interval(clustered), abs=0.01)
    assert np.std(crossed) == pytest.approx(np.std(clustered), rel=0.05)
