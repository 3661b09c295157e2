"""Reads Parquet as Arrow batches of the wanted columns, and as rows of Python values where those are needed.

A column that is only passed on stays in Arrow, so any date survives. INT96 timestamps (Spark's, Impala's) are read in
microseconds, which cover the format's whole range but drop nanoseconds; read in Arrow's nanoseconds, dates after 2262
would change. A date that Python can't represent (before year 1, after 9999, or with nanoseconds) becomes a string.
Pages are looked at before Arrow decodes them (`parquet_pages`). A file of 0 bytes, as one is that was emptied where it
lies, has no rows and no columns.
"""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safelm.documents import parquet_pages
from safelm.documents.json_lines import OnMalformed, Part, check_text, missing_column
from safelm.documents.malformed import Malformed, MalformedError
from safelm.documents.opening import open_binary
from safelm.io import remote

_logger = logging.getLogger(__name__)
_BATCH_BYTES = 8 << 20
_MOST_BATCH_BYTES = 1 << 30  # should all values be as large as a dictionary allows
_BATCH_ROWS = 1024


Columns = Sequence[str] | Callable[[Any], Sequence[str] | None] | None


def iter_parquet(
    path: str, columns: Columns, *, text_column: str | None, groups: Part | None = None, rows: int = _BATCH_ROWS
) -> Iterator[tuple[int, Any]]:
    """Streams (number of the first row, from 1; Arrow record batch) of a Parquet file or of some of its row groups.

    Batches have about 8 MB, and at most `rows` rows.

    Args:
      columns: names, with fields of structs as `struct.field`; None for all; or a function from the ParquetFile to
        these.

    Raises ValueError if a column is missing, the text column does not hold strings, or a row group has fewer or more
    rows than the file says.
    """
    import pyarrow

    number = 0
    with open_parquet(path) as table, open_binary(path) as file:
        if has_no_columns(table):
            _logger.warning("%s: is empty, it has no rows", path)
            return
        pages = _Pages(path, file)
        columns = columns(table) if callable(columns) else columns
        check_columns(path, table.schema_arrow, columns or (), text_column)
        try:
            last = table.num_row_groups if groups is None else groups.stop
            for group in range(table.num_row_groups)[:last]:
                facts = table.metadata.row_group(group)
                if groups is not None and group < groups.start:
                    number += facts.num_rows
                    continue
                begin = number
                at_once = pages.rows_at_once(table.metadata, group, columns, rows)
                for batch in table.iter_batches(at_once, [group], columns=columns):
                    yield number + 1, batch
                    number += batch.num_rows
                if number - begin != facts.num_rows:
                    found = f"row group {group} gave {number - begin} rows, the file says {facts.num_rows}"
                    raise ValueError(f"{path}: damaged: {found}")
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: damaged or cut short after row {number} ({error})") from error
        except OSError as error:  # pyarrow's own for damaged pages, or the file system's
            raise OSError(f"{path}: can't read after row {number} ({error})") from error


class _Pages:
    """How many rows make a batch, by what the pages of a file ask for; they are looked at one row group at a time.

    Behind a URL that is done only where the footer says that there is much: it takes a request a page.
    """

    def __init__(self, path: str, file: Any):
        self._path, self._file = path, file
        self._chunks: list[list[parquet_pages.Chunk]] | None = None

    def rows_at_once(self, metadata: Any, group: int, columns: Sequence[str] | None, rows: int) -> int:
        """At most `rows`. ValueError for a damaged file and for pages that are too large (see `parquet_pages`)."""
        facts = metadata.row_group(group)
        if not remote.is_remote(self._path) or facts.total_byte_size > parquet_pages.MAX_PAGE_BYTES:
            if self._chunks is None:
                self._chunks = parquet_pages.read_footer(self._path, self._file)
            largest = parquet_pages.check(self._path, self._file, group, self._chunks[group], columns)
            rows = min(rows, _MOST_BATCH_BYTES // max(1, largest))
        return max(1, min(rows, _BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)))


def has_no_columns(table: Any) -> bool:
    """Whether a ParquetFile has neither columns nor rows, as that of an emptied file."""
    return not table.schema_arrow.names and not table.metadata.num_rows


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """Opens a pyarrow ParquetFile, of a file of 0 bytes one without rows and columns.

    Raises ValueError for another format, OSError from the file system.
    """
    import pyarrow
    import pyarrow.parquet

    with open_binary(path) as file:
        if not file.seek(0, io.SEEK_END):
            with _no_table() as table:
                yield table
            return
        file.seek(0)
        try:
            table = pyarrow.parquet.ParquetFile(
                file,
                pre_buffer=remote.is_remote(path),
                coerce_int96_timestamp_unit="us",
                page_checksum_verification=True,
            )
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not Parquet, damaged or cut short ({error})") from error
        with table:
            stated = sum(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups))
            if stated != table.metadata.num_rows:
                raise ValueError(f"{path}: damaged: {stated} rows in its row groups, {table.metadata.num_rows} in all")
            yield table


def _no_table() -> Any:
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({}), sink)
    return pyarrow.parquet.ParquetFile(pyarrow.BufferReader(sink.getvalue()))


def may_be_null(path: str, column: str) -> bool:
    """Whether a Parquet file lacks a column, or its statistics allow null values in it.

    Raises ValueError for a damaged file.
    """
    with open_binary(path) as file:
        groups = parquet_pages.read_footer(path, file)
    found = [chunk.num_nulls for group in groups for chunk in group if chunk.name == column]
    return not found or any(num_nulls is None or num_nulls for num_nulls in found)


def codec_of(path: str) -> str:
    """How the first column of a Parquet file is compressed, by pyarrow's name; snappy, its default, without rows.

    Raises ValueError for a damaged file.
    """
    with open_binary(path) as file:
        groups = parquet_pages.read_footer(path, file) if file.seek(0, io.SEEK_END) else []
    return groups[0][0].codec if groups and groups[0] else "snappy"


def field_names(schema: Any) -> list[str]:
    """The columns of an Arrow schema, with fields of structs as `struct.field`."""
    import pyarrow.types

    names = []
    for field in schema:
        names.append(field.name)
        if pyarrow.types.is_struct(field.type):
            names += [f"{field.name}.{inner}" for inner in field_names(field.type.fields)]
    return names


def check_columns(path: str, schema: Any, columns: Sequence[str], text_column: str | None) -> None:
    """Raises ValueError unless an Arrow schema has the columns, and strings in the text column."""
    import pyarrow.types

    names = field_names(schema)
    for name in dict.fromkeys([*([text_column] if text_column else []), *columns]):
        if name not in names:
            raise missing_column(path, name, schema.names)
    if text_column:
        if schema.names.count(text_column) > 1:
            raise ValueError(f"{path}: has {schema.names.count(text_column)} columns {text_column!r}")
        kind = schema.field(text_column).type if text_column in schema.names else None
        value = kind.value_type if kind is not None and pyarrow.types.is_dictionary(kind) else kind
        types = pyarrow.types
        if value is None or not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
            raise ValueError(f"{path}: column {text_column!r} holds {kind}, not strings")


def batch_rows(
    first: int, batch: Any, text_column: str | None, on_malformed: OnMalformed
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, row) of an Arrow batch that starts at row `first`; malformed rows go to `on_malformed`."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # a string that isn't UTF-8, a date that Python doesn't have
        rows = [None] * batch.num_rows
    for offset, found in enumerate(rows):
        try:
            row = found if found is not None else _row(batch, offset)
            if text_column is not None:
                check_text(row[text_column], text_column)
        except MalformedError as error:
            on_malformed(Malformed(first + offset, str(error), raw_parquet(batch.slice(offset, 1))))
            continue
        yield first + offset, row


def raw_parquet(batch: Any) -> str:
    """A one-row batch as JSON for a quarantine file; bytes that aren't UTF-8 appear as `\\xNN`."""
    row = {
        name: _value(column[0], escapes=True) for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    return json.dumps(row, default=str)


def _row(batch: Any, offset: int) -> dict[str, Any]:
    try:
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return {name: _value(column[offset], escapes=False) for name, column in columns}
    except UnicodeDecodeError:
        raise MalformedError("not UTF-8") from None


def _value(scalar: Any, *, escapes: bool) -> Any:
    """An Arrow scalar as a Python value; dates that Python can't represent become strings.

    Bytes that aren't UTF-8 raise UnicodeDecodeError or, with `escapes`, become `\\xNN`.
    """
    import pyarrow

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if not escapes:
            raise
    except (ValueError, OverflowError):
        pass
    if isinstance(scalar, pyarrow.StructScalar):
        return {field.name: _value(scalar[index], escapes=escapes) for index, field in enumerate(scalar.type)}
    if isinstance(scalar, pyarrow.ListScalar | pyarrow.MapScalar):
        return [_value(value, escapes=escapes) for value in scalar.values]
    if isinstance(scalar, pyarrow.DictionaryScalar):
        return _value(scalar.value, escapes=escapes)
    if isinstance(scalar, pyarrow.BinaryScalar):
        return scalar.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")
    try:
        return scalar.cast(pyarrow.string()).as_py()
    except pyarrow.ArrowException:
        return f"<{scalar.type} {getattr(scalar, 'value', '')}>"
