"""Reads files that are one table of delimited values."""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from safelm.documents.json_lines import MAX_ROW_BYTES, OnMalformed
from safelm.documents.malformed import Malformed
from safelm.documents.opening import DAMAGED, open_binary

_REMARKS = re.compile(r"(?:#[^\n]*+(?:\n|\Z))*+")  # lines of versions and remarks in front of a table, as PyRIT has


def delimited_rows(path: str, text: str, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a whole table, whose first line has the column names; `path` is for messages, which quote no field.

    Raises ValueError for text that is no such table, and for a row with more or fewer fields than there are columns.
    """
    text = text[_REMARKS.match(text).end() :]
    csv.field_size_limit(1 << 30)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error})") from None
    uneven = next((number for number, row in enumerate(rows, 1) if None in row or None in row.values()), None)
    if uneven is not None:
        raise ValueError(f"{path}: row {uneven} has more or fewer fields than the header")
    return rows


def shown(value: Any) -> str:
    """A label for a message: one word as it is; a text, which a wrong column may hold, by its length alone."""
    said = str(value)
    return repr(said) if len(said) <= 20 and len(said.split()) < 2 else f"a text of {len(said)} characters"


def iter_tsv(path: str, on_malformed: OnMalformed) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, row) of tab-separated values whose first line has the column names."""
    csv.field_size_limit(MAX_ROW_BYTES)
    number = 0
    try:
        with open_binary(path, decompress=True) as file:
            lines = csv.DictReader(io.TextIOWrapper(_Bounded(file), encoding="utf-8-sig", newline=""), delimiter="\t")
            for number, row in enumerate(lines, 1):
                if None in row or None in row.values():
                    reason = "not as many values as there are columns"
                    on_malformed(Malformed(number, reason, json.dumps({str(name): row[name] for name in row})))
                    continue
                yield number, row
    except (*DAMAGED, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: damaged, cut short or not UTF-8 after row {number} ({error})") from error


class _Bounded(io.BufferedIOBase):
    """A file that raises an error for lines longer than MAX_ROW_BYTES."""

    def __init__(self, file: Any):
        self._file, self._since_line_end = file, 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        data = self._file.read1(size) if hasattr(self._file, "read1") else self._file.read(max(size, 1))
        at = data.rfind(b"\n")
        self._since_line_end = len(data) - at - 1 if at >= 0 else self._since_line_end + len(data)
        if self._since_line_end > MAX_ROW_BYTES:
            raise csv.Error(f"a line longer than {MAX_ROW_BYTES >> 20} MiB")
        return data

    read = read1
