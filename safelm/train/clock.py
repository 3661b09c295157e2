"""Measures where a run's time goes (waiting for data, saving, evaluating, compiling) and its goodput.

Goodput is the share of wall time since the run's first launch, pauses between its starts included, that was spent on
updates that still count. Not counted: starting, restoring, compiling, evaluating, being
held by a save, being down, updates repeated after a restart, skipped or rolled back. Waiting for a batch is counted,
since the devices work meanwhile; `time/data_wait` tells of it. The seconds that count are kept in the checkpoints, so a
step done again after a kill counts once.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

PARTS = ("checkpoint_stall", "eval", "compile")


class Clock:
    """Adds up the main loop's time from `run` on."""

    def __init__(self, first_launch: float):
        """`first_launch`: seconds since 1970."""
        self._first_launch = first_launch
        self._productive_s = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._data_wait_s, self._waits = 0.0, 0
        self._stepping_since: float | None = None
        self._steps_s, self._steps = 0.0, 0  # of this process

    def run(self) -> None:
        """The loop begins."""
        self._stepping_since = time.monotonic()

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around the wait for one batch."""
        begin = time.monotonic()
        yield
        self._data_wait_s += time.monotonic() - begin
        self._waits += 1
        self._steps += 1

    @contextlib.contextmanager
    def aside(self, part: str) -> Iterator[None]:
        """Around what is not stepping: one of PARTS. Every update before it must be done."""
        self._count()
        begin = time.monotonic()
        try:
            yield
        finally:
            self._parts[part] += time.monotonic() - begin
            if self._stepping_since is not None:
                self._stepping_since = time.monotonic()

    def skipped(self) -> None:
        """One update had no effect."""
        self._count()
        self._productive_s = max(0.0, self._productive_s - self._steps_s / max(self._steps, 1))

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by part (`data_wait` per step), and the goodput so far."""
        self._count()
        values = {"time/data_wait": self._data_wait_s / max(self._waits, 1)}
        values |= {f"time/{part}": seconds for part, seconds in self._parts.items()}
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._data_wait_s, self._waits = 0.0, 0
        return values | {"goodput": self._productive_s / max(time.time() - self._first_launch, 1e-9)}

    def record(self) -> dict[str, float]:
        """The seconds that count so far, for a checkpoint."""
        self._count()
        return {"productive_s": self._productive_s}

    def load(self, record: Mapping[str, Any] | None) -> None:
        """Continues from a checkpoint's record, on resuming or after a rollback."""
        self._count()
        self._productive_s = float((record or {}).get("productive_s", 0.0))

    def _count(self) -> None:
        if self._stepping_since is not None:
            now = time.monotonic()
            self._productive_s += now - self._stepping_since
            self._steps_s += now - self._stepping_since
            self._stepping_since = now
