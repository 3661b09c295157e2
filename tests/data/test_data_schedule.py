"""The mixture schedule: every step's rows follow the plan exactly, and every part of a batch is a fair sample."""

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelm.data import interleave
from safelm.data.schedule import MixtureSchedule, Phase

LADDER = ({"start": 0.0, "rates": {"raw": 1.0}}, {"start": 0.6, "rates": {"raw": 0.55, "safe": 0.4, "moral": 0.05}})


def schedule_of(phases, batch_size=8, seq_len=16, total_steps=50):
    return MixtureSchedule(phases, batch_size=batch_size, seq_len=seq_len, total_steps=total_steps)


@st.composite
def schedules(draw):
    names = [f"source{i}" for i in range(draw(st.integers(1, 6)))]
    phases, count = [], draw(st.integers(1, 3))
    for i in range(count):
        weights = [draw(st.one_of(st.just(0.0), st.floats(1e-4, 1.0))) for _ in names]
        weights[draw(st.integers(0, len(names) - 1))] += 0.5
        phases.append(Phase(i / count, {n: w / sum(weights) for n, w in zip(names, weights, strict=True)}))
    return phases, draw(st.integers(1, 17)), draw(st.integers(1, 70))


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_cumulative_rows_stay_within_a_row_of_the_plan(drawn):
    phases, batch_size, total_steps = drawn
    schedule = schedule_of(phases, batch_size=batch_size, total_steps=total_steps)
    starts = [int(np.ceil(round(phase.start * total_steps, 9))) for phase in phases] + [total_steps]
    before = dict.fromkeys(schedule.sources, 0)
    for phase, start, stop in zip(phases, starts[:-1], starts[1:], strict=True):
        base = schedule.cumulative(start)
        for step in range(start, stop):
            counts, after = schedule.counts(step), schedule.cumulative(step + 1)
            assert sum(counts.values()) == batch_size and min(counts.values()) >= 0
            for name in schedule.sources:
                assert after[name] == before[name] + counts[name]
                # The plan of a phase that ends is rounded to whole rows, which tilts it by less than a row.
                tilt = 1.0 if stop < total_steps else 0.0
                wanted = (step + 1 - start) * batch_size * phase.rates[name]
                assert abs(after[name] - base[name] - wanted) < 1 + tilt + 1e-5
                if phase.rates[name] == 0:
                    assert counts[name] == 0
            before = after


def test_two_phases_by_hand():
    schedule = schedule_of(LADDER, batch_size=20, total_steps=10)
    assert schedule.cumulative(6) == {"raw": 120, "safe": 0, "moral": 0}
    assert schedule.counts(5) == {"raw": 20, "safe": 0, "moral": 0}
    assert schedule.counts(6) == {"raw": 11, "safe": 8, "moral": 1}
    assert schedule.tokens_given(10) == {"raw": 164 * 16, "safe": 32 * 16, "moral": 4 * 16}


def test_start_by_tokens_is_the_first_step_that_has_given_them():
    phases = [Phase(0.0, {"a": 1.0}), Phase(rates={"b": 1.0}, start_tokens=3 * 8 * 16 - 5)]
    schedule = schedule_of(phases)
    assert schedule.counts(2) == {"a": 8, "b": 0} and schedule.counts(3) == {"a": 0, "b": 8}


@pytest.mark.parametrize("start, total_steps, first", [(0.2, 10, 2), (0.6, 5, 3), (0.1, 3, 1), (0.7, 10, 7)])
def test_start_fractions_are_decimal(start, total_steps, first):
    """0.7 * 10 is 7.000000000000001 in floats on no platform here, but 0.1 * 3 is above 0.3."""
    schedule = schedule_of([Phase(0.0, {"a": 1.0}), Phase(start, {"b": 1.0})], total_steps=total_steps)
    given = [schedule.counts(step)["b"] > 0 for step in range(total_steps)]
    assert given.index(True) == first


def test_longer_run_keeps_hash_and_past():
    phases = [Phase(0.0, {"a": 0.7, "b": 0.3}), Phase(rates={"a": 0.123, "b": 0.877}, start_tokens=7 * 128)]
    short, long = schedule_of(phases, total_steps=20), schedule_of(phases, total_steps=400)
    cut = schedule_of(phases, total_steps=5)
    assert short.hash == long.hash == cut.hash
    for step in range(20):
        assert short.counts(step) == long.counts(step)
        assert step >= 5 or cut.counts(step) == long.counts(step)
    assert short.hash != schedule_of(phases, batch_size=16).hash
    assert short.hash != schedule_of([phases[0]]).hash


def test_hash_and_counts_do_not_depend_on_the_order_of_names():
    one = schedule_of([Phase(0.0, {"a": 0.3, "b": 0.7})])
    two = schedule_of([Phase(0.0, {"b": 0.7, "a": 0.3})])
    assert one.hash == two.hash and one.counts(3) == two.counts(3)
    # A recorded value: a change of the arithmetic would break the resuming of old runs.
    assert one.hash == "34ff36d0cf786f78f990cf4e26fcb6d60fb4ff6395c5ba5945f5cb5c4c6ecf9d"


def test_large_schedule_is_quick():
    rates = {"a": 0.3, "b": 0.25, "c": 0.2, "d": 0.12, "e": 0.08, "f": 0.05}
    phases = [Phase(0.0, {"a": 1.0}), Phase(0.2, rates)]
    schedule = schedule_of(phases, batch_size=1024, seq_len=2048, total_steps=300_000)
    began = time.process_time()
    assert sum(schedule.tokens_given(300_000).values()) == 300_000 * 1024 * 2048
    assert time.process_time() - began < 20  # about 1.5 s on an idle core
    began = time.process_time()
    schedule.counts(299_999)
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    "phases, message",
    [
        ([], "at least one phase"),
        ([Phase(0.0, {"a": 0.5, "b": 0.4})], "phase 0: rates sum to 0.9"),
        ([Phase(0.0, {})], "phase 0: rates sum to 0"),
        ([Phase(0.0, {"a": 1.5, "b": -0.5})], r"phase 0: rate of 'a' must be in \[0, 1\], got 1.5"),
        ([Phase(0.0, {"b": -0.5, "a": 1.0})], "phase 0: rate of 'b' .* got -0.5"),
        ([Phase(0.0, {"a": float("nan")})], "phase 0: rate of 'a' .* got nan"),
        ([Phase(0.1, {"a": 1.0})], "first phase must start at 0, got start=0.1"),
        ([Phase(rates={"a": 1.0}, start_tokens=5)], "first phase must start at 0"),
        ([Phase(0.0, {"a": 1.0}), Phase(1.0, {"a": 1.0})], r"phase 1: start .* \[0, 1\), got 1.0"),
        ([Phase(0.0, {"a": 1.0}), Phase(0.5, {"a": 1.0}), Phase(0.2, {"a": 1.0})], "phase 2: starts at 0.2, not after"),
        ([Phase(0.0, {"a": 1.0}), Phase(0.0, {"a": 1.0})], "phase 1: starts at 0.0, not after"),
        ([Phase(0.0, {"a": 1.0}), Phase(0.5, {"a": 1.0}, start_tokens=9)], "phase 1: start_tokens=9 with start=0.5"),
        (
            [Phase(0.0, {"a": 1.0}), Phase(0.9, {"a": 1.0}), Phase(rates={"a": 1.0}, start_tokens=9)],
            r"phases must be sorted by their start, theirs are at steps \[0, 45, 1\]",
        ),
        (["raw"], "a phase must map start and rates to values, got 'raw'"),
        ([{"start": 0.0, "rates": 5}], "phase rates must map source names to numbers, got 5"),
        ([{"start": 0.0, "rates": {"a": "all"}}], "phase rates must map source names to numbers, got {'a': 'all'}"),
        ([{"start": "early", "rates": {"a": 1.0}}], "phase start must be a number, got start='early'"),
        ([{"start": 0.0, "weights": {"a": 1.0}}], r"unknown fields \['weights'\]"),
    ],
)
def test_bad_phases(phases, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(phases)


@pytest.mark.parametrize("field", ["batch_size", "seq_len", "total_steps"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        schedule_of(LADDER, **{field: 0})


def test_rates_within_tolerance_are_scaled_to_one():
    schedule = schedule_of([Phase(0.0, {"a": 0.3333333, "b": 0.3333333, "c": 0.3333333})], batch_size=3)
    assert schedule.cumulative(50) == {"a": 50, "b": 50, "c": 50}


def test_steps_outside_are_refused():
    schedule = schedule_of(LADDER)
    for step in (-1, 50):
        with pytest.raises(IndexError, match=re.escape(f"step {step} is outside 0..49")):
            schedule.counts(step)
    with pytest.raises(IndexError):
        schedule.cumulative(51)


def test_layout_numbers_each_sources_stream_without_gaps():
    schedule = schedule_of(LADDER, batch_size=12, total_steps=40)
    seen = {name: [] for name in schedule.sources}
    for step in range(40):
        sources, numbers = schedule.layout(step)
        for name, count in schedule.counts(step).items():
            mine = numbers[sources == schedule.sources.index(name)].tolist()
            assert len(mine) == count
            seen[name] += mine
    for name, numbers in seen.items():
        assert numbers == list(range(schedule.cumulative(40)[name]))


def parts_of(sources, process_count, accumulation):
    """Every host's contiguous share, and its micro-batches cut contiguously and with a stride."""
    hosts = sources.reshape(process_count, -1)
    yield from (("contiguous", host) for host in hosts)
    if hosts.shape[1] % accumulation == 0:
        yield from (("contiguous", part) for host in hosts for part in host.reshape(accumulation, -1))
        yield from (("strided", part) for host in hosts for part in host.reshape(-1, accumulation).T)


@pytest.mark.parametrize("batch_size, allowed", [(64, 1), (256, 1), (24, 2), (96, 2), (720, 3)])
def test_every_share_has_the_mixtures_rates(batch_size, allowed):
    """Up to one row (contiguous) or two (strided) for powers of two, as `interleave` says."""
    rates = {"a": 0.43, "b": 0.25, "c": 0.2, "d": 0.08, "e": 0.04}
    schedule = schedule_of([Phase(0.0, rates)], batch_size=batch_size, total_steps=12)
    for step in range(12):
        sources, _ = schedule.layout(step)
        counts = np.bincount(sources, minlength=5)
        for process_count in (p for p in range(1, batch_size + 1) if batch_size % p == 0):
            for kind, part in parts_of(sources, process_count, 4):
                error = np.abs(np.bincount(part, minlength=5) - counts * len(part) / batch_size).max()
                if kind == "contiguous":
                    assert error < allowed
                else:
                    assert error < (2 if allowed == 1 else 8)


def test_net_bounds_hold_for_any_interval_of_slots():
    """A source is an interval of slots, so these bounds hold for all rates and all turns at once."""
    for bits in range(1, 9):
        size = 1 << bits
        slots = interleave._slots(size)
        assert sorted(slots) == list(range(size))
        for parts in (1 << k for k in range(bits + 1)):
            for limit, shares in ((1, slots.reshape(parts, -1)), (2, slots.reshape(-1, parts).T)):
                for share in shares:
                    excess = np.cumsum(np.bincount(share, minlength=size)) - np.arange(1, size + 1) / parts
                    assert max(excess.max(), 0) - min(excess.min(), 0) < limit or parts in (1, size)


def test_rare_sources_visit_all_hosts():
    schedule = schedule_of([Phase(0.0, {"common": 0.98, "rare": 0.02})], batch_size=16, total_steps=6000)
    rows = np.zeros(16)
    for step in range(6000):
        rows += schedule.layout(step)[0] == schedule.sources.index("rare")
    by_host = rows.reshape(8, 2).sum(1)  # 1,920 rows in all, 240 a host
    assert by_host.sum() == 1920 and np.abs(by_host - 240).max() < 5 * np.sqrt(240)


def test_neighbouring_steps_differ_in_layout():
    schedule = schedule_of([Phase(0.0, {"a": 0.5, "b": 0.5})], batch_size=64)
    layouts = {schedule.layout(step)[0].tobytes() for step in range(20)}
    assert len(layouts) > 10
