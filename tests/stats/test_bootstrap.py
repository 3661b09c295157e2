"""Resampling: the draws are fixed, so that published intervals stay."""

import numpy as np

from safelm.stats.bootstrap import clustered_means, grouped_interval


def test_the_draws_are_fixed():
    value_n = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 3.0])
    np.testing.assert_allclose(
        clustered_means(value_n, [np.array([0, 0, 1, 1, 2, 2])], 4, seed=7), [1.0, 1.0, 0.5, 1.5]
    )
    assert grouped_interval(np.mean, value_n, groups=np.array([0, 0, 1, 1, 2, 2]), draws=50, seed=1) == (0.5, 2.0)
