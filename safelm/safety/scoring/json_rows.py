"""JSON lines in, JSON lines (gzip) out: a row keeps its bytes, and the added columns go before its closing brace.

A row without an id gets one (`documents.row_id`), as if it were its last column.
"""

import functools
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from safelm.documents import (
    JsonRow,
    Malformed,
    MalformedError,
    Part,
    field,
    iter_json,
    lines_before,
    required_id,
    row_id,
)
from safelm.safety.scoring.columns import Columns

SUFFIX = ".jsonl.gz"
_LEVEL = 6

Row = tuple[str, bytes]


def read(
    path: str,
    part: Part | None,
    text_column: str,
    id_column: str,
    columns: Columns,
    on_malformed: Callable[[Malformed], object],
) -> Iterator[Row]:
    """(text, the row with its id) of a file or of a part of one; malformed rows with their number in the file."""

    @functools.cache
    def before() -> int:
        return lines_before(path, part.start) if part is not None and part.start else 0

    def report(malformed: Malformed) -> None:
        on_malformed(Malformed(before() + malformed.row, malformed.reason, malformed.raw))

    for row in iter_json(path, report, text_column=text_column, part=part, required=required_id(id_column)):
        try:
            if taken := row.row.keys() & columns.types.keys():
                raise MalformedError(f"field {min(taken)!r} is there, which scoring would add")
            identity = row_id(row.row, row.row[text_column], id_column)
        except MalformedError as error:
            report(Malformed(row.number, str(error), row.raw.decode()))
            continue
        yield row.row[text_column], _with_id(row, id_column, identity)


def _with_id(row: JsonRow, column: str, identity: str) -> bytes:
    own = field(row.row, column)
    if own is not None and str(own).strip():
        return row.raw
    if column in row.row:  # null or blank
        return json.dumps({**row.row, column: identity}).encode()
    return row.raw[:-1].rstrip() + b", " + json.dumps({column: identity}).encode()[1:]


class Sink:
    """One output file; the same rows give the same bytes."""

    def __init__(self, path: str):
        self.rows = 0
        self._file = open(path, "wb")
        self._gzip = gzip.GzipFile("", "wb", _LEVEL, self._file, mtime=0)

    def write(self, payloads: Sequence[bytes], values: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows: as they were read, and what to add to each."""
        for raw, added in zip(payloads, values, strict=True):
            line = raw[:-1].rstrip() + b", " + json.dumps(added).encode()[1:] if added else raw
            self._gzip.write(line + b"\n")
        self.rows += len(payloads)

    def close(self) -> None:
        """Ends the file."""
        self._gzip.close()
        self._file.close()
