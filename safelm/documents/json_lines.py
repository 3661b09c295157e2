"""Reads rows of JSON lines in bounded memory: no more than MAX_ROW_BYTES of a line are ever held.

A `.json` file that is one array of objects is read as if each were a line; it alone is held whole.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from safelm.documents import json_arrays
from safelm.documents.malformed import Malformed, MalformedError
from safelm.documents.opening import DAMAGED, open_binary

MAX_ROW_BYTES = 64 << 20
ROWS_WITHOUT_COLUMN = 100
_NAMES_SHOWN = 50
_BOM = b"\xef\xbb\xbf"

OnMalformed = Callable[[Malformed], object]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a file: JSON lines that begin within bytes [start, stop), or Parquet row groups [start, stop)."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class JsonRow:
    """One object of a JSON lines file: its line number, its bytes without white space around them, and its value.

    Of an array: its place, from 1, and the bytes of a line that says the same.
    """

    number: int
    raw: bytes = dataclasses.field(repr=False)
    row: Mapping[str, Any] = dataclasses.field(repr=False)


class ColumnCheck:
    """Tells a missing column, which is an error, from rows that lack a field, which are malformed.

    A column is missing if none of a file's first 100 objects has it or an alternative.

    Args:
      wanted: name of each requirement -> the columns of which any satisfies it (perhaps `struct.field`).
    """

    def __init__(self, path: str, wanted: Mapping[str, Sequence[str]]):
        self._path, self._wanted, self._objects = path, dict(wanted), 0
        self._present: dict[str, None] = {}

    def see(self, row: Mapping[str, Any]) -> None:
        """Registers one object. Raises ValueError once a column is known to be missing."""
        if not self._wanted:
            return
        self._objects += 1
        self._present |= dict.fromkeys(itertools.islice(_names(row), _NAMES_SHOWN - len(self._present)))
        self._wanted = {name: any_of for name, any_of in self._wanted.items() if not _has_any(row, any_of)}
        if self._objects >= ROWS_WITHOUT_COLUMN:
            self.finish()

    def finish(self) -> None:
        """Ends the check of a file with fewer objects."""
        if self._objects and self._wanted:
            name, any_of = next(iter(self._wanted.items()))
            raise missing_column(self._path, name, self._present, any_of)


def iter_json(
    path: str,
    on_malformed: OnMalformed,
    *,
    text_column: str | None,
    part: Part | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
    required: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[JsonRow]:
    """Streams the objects of JSON lines or of a JSON array, compressed or not, or of a part of uncompressed lines.

    Args:
      on_malformed: called with each unusable row.
      text_column: the column whose text is checked.
      part: the part to read. In a part that starts mid-file, row numbers count from the part's first line;
        `lines_before` gives the offset.
      on_bytes: called with the length of every line, in uncompressed bytes.
      required: as `wanted` of `ColumnCheck`.

    Raises ValueError for a file that is damaged or lacks a column, OSError if it can't be read.
    """
    check = ColumnCheck(path, ({text_column: (text_column,)} if text_column else {}) | dict(required or {}))
    is_array = part is None and json_arrays.is_array(path)
    for number, line in _array_lines(path) if is_array else _lines(path, part):
        on_bytes(len(line))
        raw = line.removeprefix(_BOM).strip()
        if not raw:
            continue
        try:
            row = parse_object(raw)
            check.see(row)
            if text_column is not None:
                check_text(row.get(text_column), text_column)
        except MalformedError as error:
            on_malformed(Malformed(number, str(error), raw.decode("utf-8", "backslashreplace")))
            continue
        yield JsonRow(number, raw, row)
    check.finish()


def parse_object(line: bytes) -> dict[str, Any]:
    """The object in a line of JSON. Raises MalformedError that gives a position and no text."""
    if len(line) > MAX_ROW_BYTES:
        raise MalformedError(f"longer than {MAX_ROW_BYTES >> 20} MiB; cut to that length")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise MalformedError("not UTF-8") from None
    except RecursionError:
        raise MalformedError("not JSON: nested too deep") from None
    except ValueError as error:
        position = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise MalformedError(f"not JSON{position}") from None
    if not isinstance(row, dict):
        raise MalformedError(f"not an object but {type(row).__name__}")
    return row


def check_text(text: Any, column: str) -> None:
    """Raises MalformedError unless `text` is a string that UTF-8 can encode."""
    if text is None:
        raise MalformedError(f"field {column!r} is missing or null")
    if not isinstance(text, str):
        raise MalformedError(f"field {column!r} is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedError(f"field {column!r} holds half a Unicode pair") from None


class MissingColumnError(ValueError):
    """A file lacks a column.

    Attributes:
      name: what the missing column would hold.
      present: the file's columns, with fields of structs as `struct.field`.
    """

    def __init__(self, message: str, name: str, present: Sequence[str]):
        super().__init__(message)
        self.name, self.present = name, present


def missing_column(path: str, name: str, present: Iterable[str], any_of: Sequence[str] = ()) -> MissingColumnError:
    """The error for a file without a column; `any_of` are the columns that would do."""
    looked = f" (one of {', '.join(any_of)})" if len(any_of) > 1 else ""
    present = sorted(present)
    columns = [column for column in present if column.rpartition(".")[0] not in present]
    message = f"{path}: missing column {name!r}{looked}; it has {', '.join(columns) or 'none'}"
    return MissingColumnError(message, name, present)


def field(row: Any, name: str) -> Any:
    """A row's column, or the field `struct.field` of a struct; None if it is missing."""
    if isinstance(row, Mapping) and name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    return field(row.get(outer), inner) if dot and isinstance(row, Mapping) else None


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    """A row's columns, with fields of structs as `struct.field`."""
    for name, value in row.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _names(value))


def _has_any(row: Mapping[str, Any], names: Sequence[str]) -> bool:
    def has(holder: Any, name: str) -> bool:
        if not isinstance(holder, Mapping):
            return False
        outer, dot, inner = name.partition(".")
        return name in holder or (bool(dot) and has(holder.get(outer), inner))

    return any(has(row, name) for name in names)


def lines_before(path: str, start: int) -> int:
    """The number of lines of an uncompressed file that begin before byte `start`; reads the file up to there."""
    count, at, last = 0, 0, b"\n"
    with open_binary(path) as file:
        while at < start and (block := file.read(min(8 << 20, start - at))):
            count += block.count(b"\n")
            at, last = at + len(block), block[-1:]
    return count + (last != b"\n")


def _array_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(place from 1, line of JSON) of the values of an array."""
    for number, value in json_arrays.iter_array(path):
        yield number, json.dumps(value).encode()


def _lines(path: str, part: Part | None) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line, truncated to MAX_ROW_BYTES + 1 bytes."""
    number = 0
    try:
        with open_binary(path, decompress=True) as file:
            at = 0
            if part is not None and part.start:
                file.seek(part.start - 1)
                at = part.start - 1 + _skip_line(file)
            while (part is None or at < part.stop) and (line := file.readline(MAX_ROW_BYTES + 1)):
                number, at = number + 1, at + len(line)
                if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                    at += _skip_line(file)
                yield number, line
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged or cut short after row {number} ({error})") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{path}: can't read after row {number} ({error})") from error


def _skip_line(file: io.IOBase) -> int:
    """Reads past the next line end; returns the number of bytes read."""
    skipped = 0
    while block := file.readline(1 << 20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped
