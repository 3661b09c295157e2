"""A journal: keyed rows in an append-only file of JSON lines, from which no kill can lose a row."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from safelm.io import files, records


class Journal:
    """An open journal; made by `open_journal`.

    Attributes:
      rows: all rows by key.
    """

    def __init__(self, rows: dict[str, Any], file: Any):
        self.rows, self._file = rows, file

    def add(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Appends rows and syncs them to disk, so that they survive a kill."""
        lines = (json.dumps({"key": key, **row}).encode() + b"\n" for key, row in rows.items())
        files.append_whole(self._file, b"".join(lines))
        self.rows.update(rows)


@contextlib.contextmanager
def open_journal(path: pathlib.Path) -> Iterator[Journal]:
    """Opens a journal, creating it if needed; an incomplete last line is cut off.

    Raises OSError if another process has it open, ValueError if it is damaged elsewhere.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        if not files.try_lock(file):
            raise OSError(f"{path}: another process is writing there")
        file.seek(0)
        found, size = records.read_log(file, str(path), "remove that line, and what it holds is measured again")
        file.truncate(size)
        yield Journal({row.pop("key", None): row for row in found}, file)
