"""Rows of JSON lines, read with bounded memory: no line longer than MAX_ROW_BYTES is ever held."""

import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from safelm.documents.malformed import Malformed, MalformedError
from safelm.documents.opening import DAMAGED, open_binary

MAX_ROW_BYTES = 64 << 20
ROWS_WITHOUT_COLUMN = 100
_NAMES_SHOWN = 50
_BOM = b"\xef\xbb\xbf"

OnMalformed = Callable[[Malformed], object]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a file: bytes [start, stop) of JSON lines (the lines that begin there), or row groups of Parquet."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class JsonRow:
    """One object of a JSON lines file: the line without what is around the object, and what it says."""

    number: int
    raw: bytes = dataclasses.field(repr=False)
    row: Mapping[str, Any] = dataclasses.field(repr=False)


class ColumnCheck:
    """Tells a missing column (an error) from rows that lack a field (malformed): of the first 100 objects, or of all
    in a shorter file, none has any of the columns that would do.

    `wanted`: name of what must be there -> the columns of which any will do. A column may be `struct.field`.
    """

    def __init__(self, path: str, wanted: Mapping[str, Sequence[str]]):
        self._path, self._wanted, self._objects = path, dict(wanted), 0
        self._present: dict[str, None] = {}

    def see(self, row: Mapping[str, Any]) -> None:
        """Takes note of one object; ValueError once it is clear that a column is missing."""
        if not self._wanted:
            return
        self._objects += 1
        self._present |= dict.fromkeys(itertools.islice(_names(row), _NAMES_SHOWN - len(self._present)))
        self._wanted = {name: any_of for name, any_of in self._wanted.items() if not _has_any(row, any_of)}
        if self._objects >= ROWS_WITHOUT_COLUMN:
            self.finish()

    def finish(self) -> None:
        """Says that there are no more rows."""
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
    """The objects of a JSON lines file or of a part of one (uncompressed), their text checked.

    `on_bytes` is told the length of every line (uncompressed). In a part that begins in the middle, numbers count from
    the part's first line; `lines_before` gives what to add. `required`: as the `wanted` of `ColumnCheck`.
    """
    check = ColumnCheck(path, ({text_column: (text_column,)} if text_column else {}) | dict(required or {}))
    for number, line in _lines(path, part):
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
    """The object a line of JSON holds; MalformedError says why there is none, by position and never by text."""
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
    """Raises MalformedError unless `text` is a string that UTF-8 can hold."""
    if text is None:
        raise MalformedError(f"field {column!r} is missing or null")
    if not isinstance(text, str):
        raise MalformedError(f"field {column!r} is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedError(f"field {column!r} holds half a Unicode pair") from None


class MissingColumnError(ValueError):
    """A file lacks a column altogether.

    Attributes:
      name: of what is missing.
      present: the columns there are, and fields of structs as `struct.field`.
    """

    def __init__(self, message: str, name: str, present: Sequence[str]):
        super().__init__(message)
        self.name, self.present = name, present


def missing_column(path: str, name: str, present: Iterable[str], any_of: Sequence[str] = ()) -> MissingColumnError:
    """The error for a file that lacks a column; `any_of`: the columns that would do."""
    looked = f" (one of {', '.join(any_of)})" if len(any_of) > 1 else ""
    present = sorted(present)
    columns = [column for column in present if column.rpartition(".")[0] not in present]
    message = f"{path}: missing column {name!r}{looked}; it has {', '.join(columns) or 'none'}"
    return MissingColumnError(message, name, present)


def field(row: Any, name: str) -> Any:
    """A row's column or, by `struct.field`, a field of a struct; None where there is none."""
    if isinstance(row, Mapping) and name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    return field(row.get(outer), inner) if dot and isinstance(row, Mapping) else None


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    """The columns of a row, and fields of structs as `struct.field`."""
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
    """How many lines of an uncompressed file begin before byte `start`; reads the file up to there."""
    count, at, last = 0, 0, b"\n"
    with open_binary(path) as file:
        while at < start and (block := file.read(min(8 << 20, start - at))):
            count += block.count(b"\n")
            at, last = at + len(block), block[-1:]
    return count + (last != b"\n")


def _lines(path: str, part: Part | None) -> Iterator[tuple[int, bytes]]:
    """(number, line), cut to MAX_ROW_BYTES + 1 bytes where it is longer."""
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
    """Reads on behind the next line end; how many bytes that was."""
    skipped = 0
    while block := file.readline(1 << 20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped
