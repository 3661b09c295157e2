"""Documents in files: which files an input names, and their rows, streamed, whatever columns they have.

An input is a file, a folder (every file below it that this can read; names that begin with `_` or `.` are left out) or
a pattern with `*`, `**`, `?` or `[...]`, local or behind a URL (`gs://`, `hf://`). Formats: `.jsonl`, `.jsonl.gz`,
`.jsonl.zst` and `.parquet`. A folder of scored documents (`score=0` ...) is such an input.

A row is malformed when it is not UTF-8, not JSON, no object, longer than MAX_ROW_BYTES, or when its text is missing,
null, no string or holds half a Unicode pair. Such a row is reported with its number (from 1: the line of a JSON lines
file, blank ones counted; the row of a Parquet file) and the reason, and reading goes on. An empty text is not
malformed. A file in which no row has a text column is an error that lists the columns there are.
No message holds a document's text.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from safelm.data import remote
from safelm.safety.document_files import SUFFIXES, DocumentFile, check_apart, describe, find, list_files, suffix

__all__ = [
    "SUFFIXES",
    "DocumentFile",
    "JsonRow",
    "Malformed",
    "MalformedError",
    "Part",
    "check_apart",
    "describe",
    "find",
    "iter_json",
    "iter_parquet",
    "list_files",
    "read_rows",
    "suffix",
]

MAX_ROW_BYTES = 256 << 20
ROWS_WITHOUT_COLUMN = 100
_BATCH_BYTES = 8 << 20
_BOM = b"\xef\xbb\xbf"


class MalformedError(ValueError):
    """Why one row can't be used; never holds its text."""


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A row that can't be used. `raw` is the row for a quarantine file (what isn't UTF-8 as `\\xNN`): never log it."""

    row: int
    reason: str
    raw: str = dataclasses.field(repr=False)


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


_OnMalformed = Callable[[Malformed], object]


def read_rows(
    path: str,
    columns: Sequence[str] | None = None,
    on_malformed: _OnMalformed | None = None,
    *,
    text_column: str | None = "text",
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams (row number from 1, row) of one file in file order; memory holds some rows, never the file.

    Args:
      path: a file of SUFFIXES, local or a URL.
      columns: which columns the rows hold (with `text_column`); None for all. A row may lack one (JSON lines).
      on_malformed: is told of rows that can't be used; None makes the first one a ValueError.
      text_column: the column that must hold a string; None requires none.

    Raises ValueError for a file that is damaged or lacks a column, FileNotFoundError or OSError as reading does.
    """
    wanted = None if columns is None else list(dict.fromkeys([*columns, *([text_column] if text_column else [])]))
    report = on_malformed or functools.partial(_refuse, path)
    if suffix(path) == ".parquet":
        for first, batch in iter_parquet(path, wanted, text_column=text_column):
            yield from batch_rows(first, batch, text_column, report)
        return
    for row in iter_json(path, report, text_column=text_column):
        kept = row.row if wanted is None else {name: row.row[name] for name in wanted if name in row.row}
        yield row.number, dict(kept)


def _refuse(path: str, malformed: Malformed) -> None:
    raise ValueError(f"{path}: row {malformed.row} is malformed: {malformed.reason}")


def iter_json(
    path: str,
    on_malformed: _OnMalformed,
    *,
    text_column: str | None,
    part: Part | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[JsonRow]:
    """The objects of a JSON lines file or of a part of one (uncompressed), their text checked.

    `on_bytes` is told the length of every line (uncompressed). In a part that begins in the middle, numbers count from
    the part's first line; `lines_before` gives what to add.
    """
    seen: set[str] = set()
    objects, has_text = 0, text_column is None
    for number, line in _lines(path, part):
        on_bytes(len(line))
        raw = line.removeprefix(_BOM).strip()
        if not raw:
            continue
        try:
            row = parse_object(raw)
            objects += 1
            seen.update(row)
            has_text = has_text or text_column in row
            if not has_text and objects >= ROWS_WITHOUT_COLUMN:
                raise missing_column(path, text_column, seen)
            if text_column is not None:
                check_text(row.get(text_column), text_column)
        except MalformedError as error:
            on_malformed(Malformed(number, str(error), raw.decode("utf-8", "backslashreplace")))
            continue
        yield JsonRow(number, raw, row)
    if objects and not has_text:
        raise missing_column(path, text_column, seen)


def parse_object(line: bytes) -> dict[str, Any]:
    """The object a line of JSON holds; MalformedError says why there is none, by position and never by text."""
    if len(line) > MAX_ROW_BYTES:
        raise MalformedError(f"longer than {MAX_ROW_BYTES >> 20} MiB")
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


def missing_column(path: str, column: str | None, present: Any) -> ValueError:
    """The error for a file that lacks a column altogether."""
    return ValueError(f"{path}: missing column {column!r}; it has {', '.join(sorted(present)) or 'none'}")


def lines_before(path: str, start: int) -> int:
    """How many lines of an uncompressed file begin before byte `start`; reads the file up to there."""
    count, at, last = 0, 0, b"\n"
    with open_binary(path) as file:
        while at < start and (block := file.read(min(8 << 20, start - at))):
            count += block.count(b"\n")
            at, last = at + len(block), block[-1:]
    return count + (last != b"\n")


def _lines(path: str, part: Part | None) -> Iterator[tuple[int, bytes]]:
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
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut short after row {number} ({error})") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{path}: can't read after row {number} ({error})") from error


def _skip_line(file: BinaryIO) -> int:
    """Reads on behind the next line end; how many bytes that was."""
    skipped = 0
    while block := file.readline(1 << 20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


@contextlib.contextmanager
def open_binary(path: str, *, decompress: bool = False) -> Iterator[Any]:
    """A file to read in, local or behind a URL; `decompress` by its suffix (.gz, .zst)."""
    with contextlib.ExitStack() as files:
        local = path.removeprefix("file://")
        file = files.enter_context(remote.open_file(path) if remote.is_remote(local) else open(local, "rb"))
        if decompress and path.endswith(".gz"):
            file = files.enter_context(gzip.GzipFile(fileobj=file))
        elif decompress and path.endswith(".zst"):
            import pyarrow

            stream = files.enter_context(pyarrow.CompressedInputStream(file, "zstd"))
            file = files.enter_context(io.BufferedReader(stream, 1 << 20))
        yield file


def iter_parquet(
    path: str, columns: Sequence[str] | None, *, text_column: str | None, groups: Part | None = None
) -> Iterator[tuple[int, Any]]:
    """(number of its first row from 1, Arrow record batch) of a Parquet file or of some of its row groups.

    Batches are of some 8 MB. Raises ValueError where a column is missing or the text column holds no strings.
    """
    import pyarrow

    number = 0
    with open_parquet(path) as table:
        check_columns(path, table.schema_arrow, columns or (), text_column)
        try:
            last = table.num_row_groups if groups is None else groups.stop
            for group in range(table.num_row_groups)[:last]:
                facts = table.metadata.row_group(group)
                if groups is not None and group < groups.start:
                    number += facts.num_rows
                    continue
                rows = max(1, min(1024, _BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
                for batch in table.iter_batches(rows, [group], columns=columns):
                    yield number + 1, batch
                    number += batch.num_rows
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: damaged or cut short after row {number} ({error})") from error
        except OSError as error:  # pyarrow's own for damaged pages, or the file system's
            raise OSError(f"{path}: can't read after row {number} ({error})") from error


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A pyarrow ParquetFile; ValueError for another file, OSError from the file system."""
    import pyarrow
    import pyarrow.parquet

    with open_binary(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=remote.is_remote(path))
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not Parquet, damaged or cut short ({error})") from error
        with table:
            yield table


def check_columns(path: str, schema: Any, columns: Sequence[str], text_column: str | None) -> None:
    """Raises ValueError unless an Arrow schema has the columns, the text column of strings."""
    import pyarrow.types

    for name in dict.fromkeys([*([text_column] if text_column else []), *columns]):
        if name not in schema.names:
            raise missing_column(path, name, schema.names)
    if text_column:
        if schema.names.count(text_column) > 1:
            raise ValueError(f"{path}: has {schema.names.count(text_column)} columns {text_column!r}")
        kind = schema.field(text_column).type
        value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        types = pyarrow.types
        if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
            raise ValueError(f"{path}: column {text_column!r} holds {kind}, not strings")


def batch_rows(
    first: int, batch: Any, text_column: str | None, on_malformed: _OnMalformed
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of an Arrow batch whose first row has number `first`; malformed rows go to `on_malformed`."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [None] * batch.num_rows
    for offset, found in enumerate(rows):
        try:
            row = found if found is not None else _decoded(batch.slice(offset, 1))
            if text_column is not None:
                check_text(row[text_column], text_column)
        except MalformedError as error:
            on_malformed(Malformed(first + offset, str(error), raw_parquet(batch.slice(offset, 1))))
            continue
        yield first + offset, row


def _decoded(batch: Any) -> dict[str, Any]:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        raise MalformedError("not UTF-8") from None


def raw_parquet(batch: Any) -> str:
    """A batch of one row as JSON for a quarantine file; strings that aren't UTF-8 with `\\xNN`."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column.to_pylist()[0]
        except UnicodeDecodeError:
            row[name] = _escaped(column)
    return json.dumps(row, default=str)


def _escaped(column: Any) -> str:
    import pyarrow

    try:
        return column.cast(pyarrow.binary()).to_pylist()[0].decode("utf-8", "backslashreplace")
    except pyarrow.ArrowException:
        return "<not UTF-8>"
