"""Rows that can't be used: why, how many of them a command bears, and the quarantine file that keeps them."""

import argparse
import dataclasses
import json
import os
from typing import Any


class MalformedError(ValueError):
    """Why one row can't be used; never holds its text."""


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A row that can't be used. `raw` is the row for a quarantine file (bytes that aren't UTF-8 as `\\xNN`): never log
    it."""

    row: int
    reason: str
    raw: str = dataclasses.field(repr=False)

    def record(self, path: str) -> dict[str, Any]:
        """This row of the file `path` as a line of a quarantine file."""
        return {"file": path} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class MalformedLimit:
    """How many malformed rows a command bears.

    It stops when both are passed: more than `rows` malformed rows and more than `fraction` of all; and when more than
    half of the rows (and more than 20) are malformed, even if those are fewer than `rows`.
    """

    rows: int = 100
    fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"--max_malformed_rows={self.rows}: must be at least 0")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"--max_malformed_fraction={self.fraction}: must be from 0 to 1")

    def check(self, place: str, malformed: int, rows: int, *, is_whole: bool = True, more: str = "") -> None:
        """Raises ValueError naming `place` when the limit is passed.

        `is_whole` is False while rows are still read; `more` tells of the malformed ones.
        """
        of = "" if is_whole else "the first "
        shown = f"{place}: {malformed} of {of}{rows} rows are malformed"
        more = f"; {more}" if more else ""
        if malformed > self.rows and malformed > self.fraction * rows:
            raise ValueError(f"{shown}, more than {self.rows} rows and {self.fraction:.2%}{more}")
        if self.fraction < 1 and is_whole and malformed > _FEW_ROWS and 2 * malformed > rows:
            raise ValueError(f"{shown}, more than half of them{more}")


_FEW_ROWS = 20
_JUDGE_EVERY = 10_000  # rows


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `limit_from_flags`."""
    add, default = parser.add_argument, MalformedLimit()
    add(
        "--max_malformed_rows",
        type=int,
        default=default.rows,
        metavar="N",
        help="a file with more of them (%(default)s) and ...",
    )
    add(
        "--max_malformed_fraction",
        type=float,
        default=default.fraction,
        metavar="SHARE",
        help="... a larger share of them (%(default)s) stops the run",
    )


def limit_from_flags(flags: argparse.Namespace) -> MalformedLimit:
    """Raises ValueError for what is no limit."""
    return MalformedLimit(flags.max_malformed_rows, flags.max_malformed_fraction)


class RowTally:
    """The rows of one file, of which more malformed ones than the limit allows stop the reading.

    Attributes:
      rows: all that were read, malformed ones among them.
      malformed: how many can't be used.
    """

    def __init__(self, path: str, limit: MalformedLimit):
        self.rows = self.malformed = 0
        self._path, self._limit, self._first = path, limit, ""

    def add(self, malformed: Malformed | None = None) -> None:
        """Counts a row. Raises ValueError as `MalformedLimit.check` does."""
        self.rows += 1
        if malformed is not None:
            self.malformed += 1
            self._first = self._first or f"the first is row {malformed.row}: {malformed.reason}"
            if self.rows >= _JUDGE_EVERY:
                self._limit.check(self._path, self.malformed, self.rows, is_whole=False, more=self._first)

    def finish(self) -> None:
        """Raises ValueError as `MalformedLimit.check` does."""
        self._limit.check(self._path, self.malformed, self.rows, more=self._first)


class Quarantine:
    """The malformed rows of one file, as JSON lines: file, row from 1, reason, raw.

    The local file `target` is replaced by each reading and made when the first such row comes; None keeps nothing.
    """

    def __init__(self, path: str, target: str | None):
        self._path, self._target, self._file = path, target, None
        if target and os.path.exists(target):
            os.remove(target)

    def add(self, malformed: Malformed) -> None:
        """Keeps one row."""
        if not self._target:
            return
        if self._file is None:
            os.makedirs(os.path.dirname(self._target) or ".", exist_ok=True)
            self._file: Any = open(self._target, "w", encoding="utf-8")
        self._file.write(json.dumps(malformed.record(self._path)) + "\n")

    def __enter__(self) -> "Quarantine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
