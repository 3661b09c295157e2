"""Mixture schedule: which source every row of every step comes from, as exact integers over the token budget.

A phase is a range of the tokens: it holds from its start until the next one and gives each source a share of them. A
token here is a position of a row that is fed to the model, so a row counts `seq_len` of them, whatever its padding or
loss weights. Rows are apportioned step by step with the error carried over (`safelm.data.apportion`), anew in every
phase: after every step of a phase each source has had its planned number of rows rounded down or up. What is given
before a step depends on the phases begun before it only, never on later ones or on `total_steps`, so a phase can be
appended while a run is under way. Rates are kept to nine decimals, everything after that is integer arithmetic: the
same on every platform.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Int

from safelm.data import interleave
from safelm.data.apportion import Apportionment
from safelm.io import records

RATE_UNITS = 10**9
RATE_TOLERANCE = 1e-6
MAX_STEPS = 10**9
_BLOCK_STEPS = 1024


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
    """Steps [start, stop) of one phase, and the rows of every source before them."""

    start: int
    stop: int
    weights: tuple[int, ...]
    apportionment: Apportionment
    rows_before: Int[np.ndarray, " N"]


class MixtureSchedule:
    """Rows per source of every step of a run; a pure function of the phases, the batch size and the step."""

    def __init__(self, phases: Sequence[Any], *, batch_size: int, seq_len: int, total_steps: int):
        """Shapes are of the global batch (rows, tokens a row). ValueError names the phase and the value at fault."""
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("total_steps", total_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if total_steps > MAX_STEPS:
            raise ValueError(f"total_steps must be at most {MAX_STEPS:,}, got {total_steps}")
        self.batch_size, self.seq_len, self.total_steps = int(batch_size), int(seq_len), int(total_steps)
        self.phases = tuple(Phase.parse(phase) for phase in phases)
        _check_phases(self.phases)
        self.sources = tuple(sorted({name for phase in self.phases for name in phase.rates}))
        self._starts = [phase.start_step(self.batch_size * self.seq_len, self.total_steps) for phase in self.phases]
        if self._starts != sorted(self._starts):
            raise ValueError(f"phases must be sorted by their start, theirs are at steps {self._starts}")
        self._weights = [_integer_rates(phase.rates, self.sources) for phase in self.phases]
        self._blocks: tuple[tuple[int, np.ndarray], ...] = ()  # the last ones asked for: replaced whole, for threads

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of what decides the data order: phases by step, rates, batch shape. Not of `total_steps`, so a run
        whose last phase is made longer keeps it."""
        rates = [dict(zip(self.sources, weights, strict=True)) for weights in self._weights]
        phases = list(zip(self._starts, rates, strict=True))
        content = {"batch_size": self.batch_size, "seq_len": self.seq_len, "phases": phases}
        return records.fingerprint(content)

    def starts(self) -> list[tuple[int, dict[str, float]]]:
        """For every phase, also those past the run's end, the step it starts before and its rates."""
        return [
            (start, {name: weight / RATE_UNITS for name, weight in zip(self.sources, weights, strict=True) if weight})
            for start, weights in zip(self._starts, self._weights, strict=True)
        ]

    def counts(self, step: int) -> dict[str, int]:
        """Rows of each source in the batch of `step`."""
        self._check_step(step, self.total_steps - 1)
        before_N, after_N = self._rows_around(step)
        return self._by_source(after_N - before_N)

    def cumulative(self, step: int) -> dict[str, int]:
        """Rows of each source in all steps before `step`."""
        self._check_step(step, self.total_steps)
        return self._by_source(self._rows_around(step)[0])

    def tokens_given(self, step: int) -> dict[str, int]:
        """Tokens of the budget each source has had before `step`: rows times `seq_len`."""
        return {name: rows * self.seq_len for name, rows in self.cumulative(step).items()}

    def tokens_planned(self, step: int) -> dict[str, Fraction]:
        """Tokens each source's rates ask for before `step`, exactly; `tokens_given` is less than a row a phase off."""
        self._check_step(step, self.total_steps)
        planned = [Fraction(0)] * len(self.sources)
        for segment in self._segments:
            tokens = max(min(segment.stop, step) - segment.start, 0) * self.batch_size * self.seq_len
            shares = (Fraction(weight, RATE_UNITS) for weight in segment.weights)
            planned = [sum_ + tokens * share for sum_, share in zip(planned, shares, strict=True)]
        return dict(zip(self.sources, planned, strict=True))

    def layout(self, step: int) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """For each row of the global batch: its source (index into `sources`) and its number in the source's stream.

        The stream of a source counts its rows from the start of the run, so it says which row of which epoch this is.
        """
        self._check_step(step, self.total_steps - 1)
        before_N, after_N = self._rows_around(step)
        source_ids_B, ranks_B = interleave.arrange(after_N - before_N, step)
        return source_ids_B, before_N[source_ids_B] + ranks_B

    def _rows_around(self, step: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Rows of every source before a step and after it (at the run's end, before it twice)."""
        index, at = divmod(step, _BLOCK_STEPS)
        block_KN = next((block for i, block in self._blocks if i == index), None)
        if block_KN is None:
            block_KN = self._rows_before(index * _BLOCK_STEPS, min((index + 1) * _BLOCK_STEPS, self.total_steps) + 1)
            self._blocks = ((index, block_KN), *self._blocks[:7])
        return block_KN[at], block_KN[min(at + 1, len(block_KN) - 1)]

    def _rows_before(self, start: int, stop: int) -> Int[np.ndarray, "K N"]:
        """Rows of every source before each of the steps [start, stop)."""
        parts = [np.zeros((1 if start == 0 else 0, len(self.sources)), np.int64)]
        for segment in self._segments:
            first, last = max(start, segment.start + 1), min(stop, segment.stop + 1)
            if first < last:
                given_KN = segment.apportionment.given(first - segment.start, last - segment.start)
                parts.append(segment.rows_before + given_KN)
        return np.concatenate(parts)

    @functools.cached_property
    def _segments(self) -> list[_Segment]:
        segments, before_N = [], np.zeros(len(self.sources), np.int64)
        starts = [min(start, self.total_steps) for start in (*self._starts, self.total_steps)]
        for start, stop, weights in zip(starts[:-1], starts[1:], self._weights, strict=True):
            if start < stop:
                apportionment = Apportionment(weights, self.batch_size)
                segments.append(_Segment(start, stop, tuple(weights), apportionment, before_N))
                before_N = before_N + apportionment.given(stop - start, stop - start + 1)[0]
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
