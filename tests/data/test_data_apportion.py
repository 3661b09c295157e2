"""Apportionment: the same rows as the plain algorithm, step by step, for any rates; quick for millions of steps."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safelm.data import apportion
from safelm.data.apportion import Apportionment
from safelm.data.schedule import MixtureSchedule, Phase

LADDER = {"web": 0.65, "safe": 0.20, "refuse": 0.05, "moral": 0.05, "tagged": 0.05}


def plainly(weights, batch_size, num_steps):
    """Rows after 0, 1, .. `num_steps` steps, one step after the other as the module's docstring says."""
    units, given = sum(weights), [0] * len(weights)
    rows = [weight * batch_size for weight in weights]
    table = [given]
    for step in range(1, num_steps + 1):
        after, left, begun = [], batch_size, []
        for i, row_rate in enumerate(rows):
            due, part = divmod(step * row_rate, units)
            has = given[i]
            if due > has:
                left -= due - has
                has = due
            after.append(has)
            if part and has == due:
                begun.append((-(-(due + 1) * units // row_rate), -part, i))
        for *_, i in sorted(begun)[:left]:
            after[i] += 1
        given = after
        table.append(given)
    return np.array(table)


WEIGHTS = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 10**9)), min_size=1, max_size=7).filter(any)


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, st.integers(1, 40), st.integers(1, 90), st.data())
@example([10**9 - 3, 1, 1, 1], 1, 90, None)
@example([1, 1, 1], 2, 90, None)
def test_rows_are_those_of_the_plain_algorithm(weights, batch_size, num_steps, data):
    expected, apportionment = plainly(weights, batch_size, num_steps), Apportionment(weights, batch_size)
    if data is not None:  # any part, in any order
        start = data.draw(st.integers(0, num_steps))
        stop = data.draw(st.integers(start, num_steps + 1))
        np.testing.assert_array_equal(apportionment.given(start, stop), expected[start:stop])
    np.testing.assert_array_equal(apportionment.given(0, num_steps + 1), expected)


@settings(max_examples=25, deadline=None)
@given(WEIGHTS, st.integers(1, 9), st.integers(3, 20))
def test_blocks_that_began_with_a_wrong_guess_are_made_again(weights, batch_size, block_steps):
    normal = apportion._BLOCK_STEPS
    apportion._BLOCK_STEPS = block_steps
    try:
        table = Apportionment(weights, batch_size).given(0, 601)
    finally:
        apportion._BLOCK_STEPS = normal
    np.testing.assert_array_equal(table, plainly(weights, batch_size, 600))


@pytest.mark.parametrize("batch_size", [8, 1024])
@pytest.mark.parametrize("rare", [1e-9, 1 / 54321.7, 0.00053])
def test_rare_sources_over_many_blocks(batch_size, rare):
    rates = {"web": 1 - 3 * rare - 1 / 7777, "a": rare, "b": 2 * rare, "c": 1 / 7777}
    schedule = MixtureSchedule([Phase(0.0, rates)], batch_size=batch_size, seq_len=1, total_steps=12_000)
    (weights,) = schedule._weights
    expected = plainly(weights, batch_size, 12_000)
    np.testing.assert_array_equal(Apportionment(weights, batch_size).given(0, 12_001), expected)
    for step in (0, 1, 1023, 1024, 1025, 7000, 12_000):
        assert list(schedule.cumulative(step).values()) == expected[step].tolist()


def test_millions_of_steps_keep_no_table():
    """The last step of a long run is computed alone where every source gets a row or more a step."""
    phases = [Phase(0.0, {"raw": 1.0}), Phase(0.61234, LADDER)]
    schedule = MixtureSchedule(phases, batch_size=1024, seq_len=2048, total_steps=50_000_000)
    given, planned = schedule.tokens_given(50_000_000), schedule.tokens_planned(50_000_000)
    assert sum(given.values()) == sum(planned.values()) == 50_000_000 * 1024 * 2048
    assert all(abs(given[name] - planned[name]) < 2048 for name in given)
    assert all(len(segment.apportionment._ahead_KN) == 1 for segment in schedule._segments)
    assert schedule.starts()[1] == (30_617_000, LADDER)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), st.integers(1, 30), st.integers(1, 60))
def test_a_phase_appended_later_leaves_the_past_as_it_was(weights, batch_size, at):
    rates = dict(zip("abc", (weight / sum(weights) for weight in weights), strict=True))
    sizes = {"batch_size": batch_size, "seq_len": 4, "total_steps": 80}
    phases = [Phase(0.0, rates), Phase(rates={"a": 0.4, "b": 0.6, "c": 0.0}, start_tokens=at * batch_size * 4)]
    before, after = (MixtureSchedule(phases[:n], **sizes) for n in (1, 2))
    assert all(before.cumulative(step) == after.cumulative(step) for step in range(at + 1))
    assert after.counts(at)["c"] == 0
