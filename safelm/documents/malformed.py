"""Unusable rows: the reason, the number that a command tolerates, and the quarantine file that keeps them."""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any


class MalformedError(ValueError):
    """Why a row is unusable; never contains its text."""


@dataclasses.dataclass(frozen=True)
class Malformed:
    """An unusable row.

    Attributes:
      raw: the row for a quarantine file (bytes that aren't UTF-8 as `\\xNN`); never log it.
    """

    row: int
    reason: str
    raw: str = dataclasses.field(repr=False)

    def record(self, path: str) -> dict[str, Any]:
        """This row of the file `path` as a line of a quarantine file."""
        return {"file": path} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class MalformedLimit:
    """The number of malformed rows that a command tolerates.

    The limit is passed by more than `rows` malformed rows that are also more than `fraction` of all rows, and by more
    than 20 malformed rows that are more than half of all.
    """

    rows: int = 100
    fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"--max_malformed_rows={self.rows}: must be at least 0")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"--max_malformed_fraction={self.fraction}: must be from 0 to 1")

    def check(self, place: str, malformed: int, rows: int, *, is_whole: bool = True, more: str = "") -> None:
        """Raises ValueError naming `place` if the limit is passed.

        Args:
          is_whole: whether all rows were read.
          more: details of the malformed rows, for the message.
        """
        of = "" if is_whole else "the first "
        shown = f"{place}: {malformed} of {of}{rows} rows are malformed"
        more = f"; {more}" if more else ""
        if malformed > self.rows and malformed > self.fraction * rows:
            raise ValueError(f"{shown}, more than {self.rows} rows and {self.fraction:.2%}{more}")
        if self.fraction < 1 and is_whole and malformed > _FEW_ROWS and 2 * malformed > rows:
            raise ValueError(f"{shown}, more than half of them{more}")

    def check_any_left(self, paths: Iterable[str], malformed: int, rows: int, *, more: str = "") -> None:
        """Raises ValueError naming the files `paths` if all of their rows, and there are some, are malformed.

        Args:
          malformed, rows: of all files together; a file without a usable row among others is no error.
          more: details of the malformed rows, for the message.
        """
        if not rows or malformed < rows or self.fraction >= 1:
            return
        first, *others = dict.fromkeys(paths)
        place = f"{first} and {len(others)} more files" if others else first
        raise ValueError(
            f"{place}: {malformed} of {rows} rows are malformed, none is left{f'; {more}' if more else ''}"
        )


_FEW_ROWS = 20
_JUDGE_EVERY = 10_000  # rows


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `limit_from_flags` reads."""
    add, default = parser.add_argument, MalformedLimit()
    add(
        "--max_malformed_rows",
        type=int,
        default=default.rows,
        metavar="N",
        help="stop at a file with more malformed rows than this (%(default)s) ...",
    )
    add(
        "--max_malformed_fraction",
        type=float,
        default=default.fraction,
        metavar="SHARE",
        help="... that are also more than this share of its rows (%(default)s)",
    )


def limit_from_flags(flags: argparse.Namespace) -> MalformedLimit:
    """The limit that parsed flags set. Raises ValueError naming a flag that is out of range."""
    return MalformedLimit(flags.max_malformed_rows, flags.max_malformed_fraction)


class RowTally:
    """Counts the rows of one file and stops reading once too many are malformed.

    Attributes:
      rows: number of rows read, including malformed ones.
      malformed: number of malformed rows.
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
        """Checks the whole file. Raises ValueError as `MalformedLimit.check` does."""
        self._limit.check(self._path, self.malformed, self.rows, more=self._first)


class Quarantine:
    """Writes the malformed rows of one file as JSON lines: file, row from 1, reason, raw.

    Each reading replaces the local file `target`, which is created with the first such row. With None nothing is kept.
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
