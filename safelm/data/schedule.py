"""Mixture schedule: which source every row of every step comes from, as exact integers over the token budget.

A phase holds from its start until the next one and gives each source a share of the tokens. Rows are apportioned
step by step with the error carried over, by earliest deadline (Tijdeman's "chairman assignment"): after every step
each source has had its planned number of rows rounded down or up, so the plan is never missed by a whole row. The
plan of a phase that ends is its rates times its rows, rounded once to whole rows. Rates are kept to nine decimals,
everything after that is integer arithmetic: the same on every platform.
"""

import array
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Int

from safelm.data import interleave

RATE_UNITS = 10**9
RATE_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Phase:
    """Rates by source from `start` on: a fraction of the token budget, or `start_tokens` tokens into the run."""

    start: float = 0.0
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start_tokens: int | None = None

    @classmethod
    def parse(cls, value: Any) -> "Phase":
        """A phase, or one from a dict or ConfigDict such as `{"start": 0.2, "rates": {"raw_web": 1.0}}`.

        ValueError on unknown fields and values of the wrong type.
        """
        if isinstance(value, Phase):
            return value
        if not hasattr(value, "items"):
            raise ValueError(f"a phase must map start and rates to values, got {value!r}")
        fields = dict(value.items())
        if unknown := set(fields) - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"phase has unknown fields {sorted(unknown)}, known are start, start_tokens, rates")
        rates, start, start_tokens = (fields.get(name) for name in ("rates", "start", "start_tokens"))
        if not hasattr(rates, "items") or not all(isinstance(rate, Real) for rate in rates.values()):
            raise ValueError(f"phase rates must map source names to numbers, got {rates!r}")
        if not isinstance(start, Real | None) or not isinstance(start_tokens, int | None):
            raise ValueError(f"phase start must be a number, got start={start!r}, start_tokens={start_tokens!r}")
        return cls(float(start or 0), {name: float(rate) for name, rate in rates.items()}, start_tokens)

    def start_step(self, batch_tokens: int, total_steps: int) -> int:
        """The first step before which at least the start's share of the tokens was given."""
        if self.start_tokens is None:
            return math.ceil(Fraction(str(float(self.start))) * total_steps)
        return -(-int(self.start_tokens) // batch_tokens)


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Steps [start, stop) of one phase: source i's plan after k of its steps is `k * rows[i] / steps` rows."""

    start: int
    stop: int
    rows: tuple[int, ...]
    steps: int


class MixtureSchedule:
    """Rows per source of every step of a run; a pure function of the phases, the batch size and the step."""

    def __init__(self, phases: Sequence[Any], *, batch_size: int, seq_len: int, total_steps: int):
        """Shapes are of the global batch (rows, tokens a row). ValueError names the phase and the value at fault."""
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("total_steps", total_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.batch_size, self.seq_len, self.total_steps = int(batch_size), int(seq_len), int(total_steps)
        self.phases = tuple(Phase.parse(phase) for phase in phases)
        _check_phases(self.phases)
        self.sources = tuple(sorted({name for phase in self.phases for name in phase.rates}))
        self._starts = [phase.start_step(self.batch_size * self.seq_len, self.total_steps) for phase in self.phases]
        if self._starts != sorted(self._starts):
            raise ValueError(f"phases must be sorted by their start, theirs are at steps {self._starts}")
        self._weights = [_integer_rates(phase.rates, self.sources) for phase in self.phases]

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of what decides the data order: phases by step, rates, batch shape. Not of `total_steps`, so a run
        whose last phase is made longer keeps it."""
        rates = [dict(zip(self.sources, weights, strict=True)) for weights in self._weights]
        phases = list(zip(self._starts, rates, strict=True))
        content = {"batch_size": self.batch_size, "seq_len": self.seq_len, "phases": phases}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def counts(self, step: int) -> dict[str, int]:
        """Rows of each source in the batch of `step`."""
        self._check_step(step, self.total_steps - 1)
        return self._by_source(self._cumulative[step + 1] - self._cumulative[step])

    def cumulative(self, step: int) -> dict[str, int]:
        """Rows of each source in all steps before `step`."""
        self._check_step(step, self.total_steps)
        return self._by_source(self._cumulative[step])

    def tokens_given(self, step: int) -> dict[str, int]:
        """Tokens of the budget each source has had before `step`: rows times `seq_len`."""
        return {name: rows * self.seq_len for name, rows in self.cumulative(step).items()}

    def layout(self, step: int) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """For each row of the global batch: its source (index into `sources`) and its number in the source's stream.

        The stream of a source counts its rows from the start of the run, so it says which row of which epoch this is.
        """
        self._check_step(step, self.total_steps - 1)
        before = self._cumulative[step]
        source_ids_B, ranks_B = interleave.arrange(self._cumulative[step + 1] - before, step)
        return source_ids_B, before[source_ids_B] + ranks_B

    @functools.cached_property
    def _cumulative(self) -> Int[np.ndarray, "steps_plus_1 sources"]:
        counts = np.zeros((self.total_steps + 1, len(self.sources)), np.int64)
        for segment in self._segments():
            counts[segment.start + 1 : segment.stop + 1] = _apportion(segment, self.batch_size)
        return np.cumsum(counts, axis=0)

    def _segments(self) -> list[_Segment]:
        segments = []
        for i, (start, weights) in enumerate(zip(self._starts, self._weights, strict=True)):
            if i + 1 < len(self._starts):
                stop = self._starts[i + 1]
                rows, steps = _largest_remainder(weights, (stop - start) * self.batch_size), stop - start
            else:  # open-ended: its plan must not depend on total_steps
                stop, rows, steps = self.total_steps, [self.batch_size * weight for weight in weights], RATE_UNITS
            if start < min(stop, self.total_steps):
                divisor = math.gcd(steps, *rows)
                rows = tuple(row // divisor for row in rows)
                segments.append(_Segment(start, min(stop, self.total_steps), rows, steps // divisor))
        return segments

    def _by_source(self, values: np.ndarray) -> dict[str, int]:
        return dict(zip(self.sources, values.tolist(), strict=True))

    def _check_step(self, step: int, last: int) -> None:
        if not 0 <= step <= last:
            raise IndexError(f"step {step} is outside 0..{last} of a schedule of {self.total_steps} steps")


def _check_phases(phases: Sequence[Phase]) -> None:
    if not phases:
        raise ValueError("a mixture schedule needs at least one phase, got none")
    first = phases[0]
    if (first.start_tokens or 0) != 0 or first.start != 0:
        raise ValueError(f"the first phase must start at 0, got start={first.start}, start_tokens={first.start_tokens}")
    for i, phase in enumerate(phases):
        if phase.start_tokens is not None and (phase.start_tokens < 0 or phase.start != 0):
            raise ValueError(f"phase {i}: start_tokens={phase.start_tokens} with start={phase.start}: give one of them")
        if not 0 <= phase.start < 1:
            raise ValueError(f"phase {i}: start must be a fraction of the token budget in [0, 1), got {phase.start}")
        before = phases[i - 1] if i else None
        if before and phase.start_tokens is before.start_tokens is None and phase.start <= before.start:
            raise ValueError(f"phase {i}: starts at {phase.start}, not after phase {i - 1} at {before.start}")
        for name, rate in phase.rates.items():
            if not 0 <= rate <= 1 + RATE_TOLERANCE:
                raise ValueError(f"phase {i}: rate of {name!r} must be in [0, 1], got {rate}")
        if abs(math.fsum(phase.rates.values()) - 1) > RATE_TOLERANCE:
            raise ValueError(f"phase {i}: rates sum to {math.fsum(phase.rates.values())}, not 1: {dict(phase.rates)}")


def _integer_rates(rates: Mapping[str, float], sources: Sequence[str]) -> list[int]:
    exact = [Fraction(str(float(rates.get(name, 0.0)))) for name in sources]
    scale = math.lcm(*(rate.denominator for rate in exact))
    return _largest_remainder([int(rate * scale) for rate in exact], RATE_UNITS)


def _largest_remainder(weights: Sequence[int], total: int) -> list[int]:
    """Splits `total` in proportion to the weights: rounded down, the rest to the largest remainders."""
    whole = sum(weights)
    parts = [weight * total // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(weights[i] * total % whole), i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _apportion(segment: _Segment, batch_size: int) -> Int[np.ndarray, "steps sources"]:
    """Rows per source in each step of the segment.

    A source's next row may be given once its plan has begun it and must be given when its plan completes it; among
    those begun, the ones due first go first, then those further on. This never misses a deadline (Tijdeman, 1980).
    """
    steps, rows, given = segment.steps, segment.rows, [0] * len(segment.rows)
    counts = array.array("q")  # a long run has millions of steps
    for step in range(1, segment.stop - segment.start + 1):
        after, left, begun = [], batch_size, []
        for i, row_rate in enumerate(rows):
            due, part = divmod(step * row_rate, steps)
            has = given[i]
            if due > has:
                left -= due - has
                has = due
            after.append(has)
            if part and has == due:
                begun.append((-(-(due + 1) * steps // row_rate), -part, i))
        if left:
            begun.sort()
            for *_, i in begun[:left]:
                after[i] += 1
        counts.extend([a - b for a, b in zip(after, given, strict=True)])
        given = after
    return np.frombuffer(counts, np.int64).reshape(-1, len(rows))
