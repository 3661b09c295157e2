"""JSON lines in, JSON lines (gzip) out: a row keeps its bytes, and the added columns go before its closing brace."""

import functools
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from safelm.documents import Malformed, Part, iter_json, lines_before
from safelm.safety.scoring.columns import Columns

SUFFIX = ".jsonl.gz"
_LEVEL = 6

Row = tuple[str, bytes]


def read(
    path: str, part: Part | None, text_column: str, columns: Columns, on_malformed: Callable[[Malformed], object]
) -> Iterator[Row]:
    """(text, the row as it is) of a file or of a part of one; malformed rows with their number in the file."""

    @functools.cache
    def before() -> int:
        return lines_before(path, part.start) if part is not None and part.start else 0

    def report(malformed: Malformed) -> None:
        on_malformed(Malformed(before() + malformed.row, malformed.reason, malformed.raw))

    for row in iter_json(path, report, text_column=text_column, part=part):
        if taken := row.row.keys() & columns.types.keys():
            reason = f"field {min(taken)!r} is there, which scoring would add"
            report(Malformed(row.number, reason, row.raw.decode()))
            continue
        yield row.row[text_column], row.raw


class Sink:
    """One output file; the same rows give the same bytes."""

    def __init__(self, path: str):
        self.rows = 0
        self._file = open(path, "wb")
        self._gzip = gzip.GzipFile("", "wb", _LEVEL, self._file, mtime=0)

    def write(self, payloads: Sequence[bytes], values: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows: as they were read, and what to add to each."""
        for raw, added in zip(payloads, values, strict=True):
            self._gzip.write(raw[:-1].rstrip() + b", " + json.dumps(added).encode()[1:] + b"\n")
        self.rows += len(payloads)

    def close(self) -> None:
        """Ends the file."""
        self._gzip.close()
        self._file.close()
