"""The order of an epoch is a permutation, the same anywhere, unlike the next epoch's and unlike the rows' own."""

import numpy as np
import pytest

from safelm.data.order import EpochOrders, shuffled_rows


def order_of(num_rows, *, seed=0, source="web", epoch=0):
    return shuffled_rows(seed, source, epoch, np.arange(num_rows), num_rows)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 500, 4096, (1 << 16) + 1])  # the last by the cipher
def test_every_row_comes_once(num_rows):
    np.testing.assert_array_equal(np.sort(order_of(num_rows)), np.arange(num_rows))


@pytest.mark.parametrize("other", [{"seed": 1}, {"source": "safe"}, {"epoch": 1}])
def test_another_seed_source_or_epoch_is_another_order(other):
    same_place = np.mean(order_of(1000) == order_of(1000, **other))
    assert same_place < 0.02  # by chance 0.001


def test_an_order_has_no_trace_of_the_rows_own():
    correlations = [
        np.corrcoef(np.arange(500), order_of(500, seed=seed, epoch=epoch))[0, 1]
        for seed in range(8)
        for epoch in range(8)
    ]
    assert abs(np.mean(correlations)) < 3 / np.sqrt(500 * 64) and np.std(correlations) < 1.3 / np.sqrt(500)


def test_all_first_rows_are_equally_likely():
    firsts = [int(order_of(16, seed=seed)[0]) for seed in range(1600)]
    counts = np.bincount(firsts, minlength=16)
    assert ((counts - 100) ** 2 / 100).sum() < 37.7  # chi-squared of 15 degrees of freedom, p = 0.001


def test_the_order_is_fixed():
    """Runs resume with the order they began with: these rows may not change."""
    assert order_of(100, seed=3, epoch=2)[:5].tolist() == [36, 48, 50, 72, 31]
    assert shuffled_rows(3, "web", 2, np.arange(5), 100_000).tolist() == [27038, 25380, 75325, 4908, 96456]


def test_orders_of_many_sources_are_those_of_each():
    """Sources with few rows, with as many as are kept in one array, and with more; forwards, back, other seeds."""
    num_rows = [3, 1024, 1500, (1 << 16) + 5]
    orders, rng = EpochOrders("abcd", num_rows), np.random.default_rng(0)
    for seed, start in [(0, 0), (0, 900), (0, 1490), (0, 3100), (0, 1000), (1, 1000), (0, 2990)]:
        source_ids = rng.integers(0, 4, 60)
        stream = start + rng.integers(0, 30, 60)
        epochs, index = np.divmod(stream, np.array(num_rows)[source_ids])
        wanted = [
            shuffled_rows(seed, "abcd"[source], epoch, np.array([at]), num_rows[source])[0]
            for source, epoch, at in zip(source_ids.tolist(), epochs.tolist(), index.tolist(), strict=True)
        ]
        assert orders.rows(seed, source_ids, stream).tolist() == wanted
