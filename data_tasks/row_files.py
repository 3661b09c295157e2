"""Rows of JSON lines, Parquet, tab-separated and JSON array files, wherever fsspec reaches; no TensorFlow."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import fsspec

from safelm.data import remote
from safelm.documents import MAX_ROW_BYTES, parse_object
from safelm.documents import MalformedError as MalformedRowError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".tsv", ".tsv.gz", ".json", ".json.gz")

Row = tuple[int, Any, Callable[[], Any]]
ChooseColumns = Callable[[Sequence[str]], list[str]]  # those to read, of the fields that a Parquet file has


def read_rows(path: str, choose_columns: ChooseColumns) -> Iterator[Row]:
    """Streams (row number from 1, raw row, what parses it or raises MalformedRowError) of a file in file order.

    `path` is a local path or an fsspec URL that ends in one of SUFFIXES; `.json` is an array of objects. Raises
    FileNotFoundError, OSError and, for a file that is damaged or none of these, ValueError.
    """
    if path.endswith(".parquet"):
        return _parquet_rows(path, choose_columns)
    name = path.removesuffix(".gz")
    for suffix, read in ((".jsonl", _json_rows), (".json", _json_array_rows), (".tsv", _tsv_rows)):
        if name.endswith(suffix):
            return read(path)
    raise ValueError(f"{path}: not a file this can read (one of {', '.join(SUFFIXES)})")


def _json_rows(path: str) -> Iterator[Row]:
    """(row number, raw line, its parser) for every line that isn't blank."""
    with _open(path, "infer") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line, lambda line=line: parse_object(line)
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged or cut short after row {number} ({error})") from error
        except OSError as error:
            raise OSError(f"{path}: can't read after row {number} ({error})") from error


def _parquet_rows(path: str, choose_columns: ChooseColumns) -> Iterator[Row]:
    """The same for Parquet, reading only the columns that are needed, batch by batch."""
    import pyarrow
    import pyarrow.parquet

    with _open(path, None) as file:
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(file)
            wanted = choose_columns(_fields(table.schema_arrow))
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row, lambda row=row: _utf8_row(row)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not Parquet, damaged or cut short after row {number} ({error})") from error
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: can't read after row {number} ({error})") from error
        except OSError as error:  # pyarrow's own for damaged pages, or the file system's
            raise OSError(f"{path}: can't read after row {number} ({error})") from error


def _batch_rows(batch: Any) -> Iterator[Any]:
    """A batch's rows as dicts; where one holds a string that isn't UTF-8, that one as a batch of its own."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        slices = [batch.slice(index, 1) for index in range(batch.num_rows)]
    for row in slices:
        try:
            yield row.to_pylist()[0]
        except UnicodeDecodeError:
            yield row


def _utf8_row(row: Any) -> Any:
    if not isinstance(row, Mapping):
        raise MalformedRowError("not UTF-8")
    return row


def _fields(schema: Any) -> list[str]:
    """Columns, and the fields of those that are structs as "column.field"."""
    names = list(schema.names)
    structs = [field for field in schema if hasattr(field.type, "fields") and str(field.type).startswith("struct")]
    return names + [f"{outer.name}.{inner.name}" for outer in structs for inner in outer.type.fields]


def _tsv_rows(path: str) -> Iterator[Row]:
    """(row number, row, itself) for every row of tab-separated values below a line of column names."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open(path, "infer") as file:
        number = 0
        try:
            lines = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""), delimiter="\t")
            for number, row in enumerate(lines, 1):
                yield number, row, lambda row=row: _whole_row(row)
        except (EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: damaged, cut short or not UTF-8 after row {number} ({error})") from error


def _whole_row(row: dict[str | None, Any]) -> dict[str, Any]:
    if None in row or None in row.values():
        raise MalformedRowError("not as many values as there are columns")
    return row


def _json_array_rows(path: str) -> Iterator[Row]:
    """The same for a file that is one JSON array of objects; it is held in memory."""
    with _open(path, "infer") as file:
        try:
            found = json.loads(file.read())
        except (EOFError, zlib.error, ValueError) as error:
            raise ValueError(f"{path}: not JSON, damaged or cut short ({error})") from error
    if not isinstance(found, list):
        raise ValueError(f"{path}: not an array of objects but {type(found).__name__}")
    yield from ((number, row, lambda row=row: row) for number, row in enumerate(found, 1))


def _open(path: str, compression: str | None) -> Any:
    if not remote.is_remote(path) or path.startswith("file://"):
        return fsspec.open(path, "rb", compression=compression)
    file = remote.open_file(path)
    return gzip.GzipFile(fileobj=file) if compression and path.endswith(".gz") else file
