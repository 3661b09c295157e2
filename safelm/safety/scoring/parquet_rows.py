"""Parquet in, Parquet out: rows stay in Arrow, so nested columns and their types come out as they went in.

A row without an id gets one (`documents.row_id`): in a column of its own where the file has none, and in place of a
null or blank one where ids are strings.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from safelm.documents import (
    Malformed,
    MalformedError,
    Part,
    batch_rows,
    check_columns,
    codec_of,
    field_names,
    has_no_columns,
    iter_parquet,
    open_parquet,
    raw_parquet,
    required_id,
    row_id,
)
from safelm.safety.scoring.columns import Columns, check_free

SUFFIX = ".parquet"
_GROUP_BYTES = 32 << 20
_FEATURES = b"huggingface"

Payload = tuple[Any, int]  # a record batch and the row's place in it


def read(
    path: str,
    part: Part | None,
    text_column: str,
    id_column: str,
    columns: Columns,
    on_malformed: Callable[[Malformed], object],
) -> Iterator[tuple[str, Payload]]:
    """(text, the row in its record batch) of a file or of some of its row groups; malformed rows are reported."""
    for first, batch in iter_parquet(path, None, text_column=text_column, groups=part):

        def report(malformed: Malformed, first: int = first, batch: Any = batch) -> None:
            whole = raw_parquet(batch.slice(malformed.row - first, 1))
            on_malformed(dataclasses.replace(malformed, raw=whole))

        wanted = dict.fromkeys([text_column, id_column, id_column.split(".")[0]])
        narrow = batch.select([name for name in wanted if name in batch.schema.names])
        texts, ids = {}, [None] * batch.num_rows
        for number, row in batch_rows(first, narrow, text_column, report):
            text = row[text_column]
            try:
                ids[number - first] = row_id(row, text, id_column)
            except MalformedError as error:
                report(Malformed(number, str(error), ""))
                continue
            texts[number - first] = text
        whole = _with_ids(batch, id_column, ids)
        yield from ((text, (whole, offset)) for offset, text in texts.items())


def _with_ids(batch: Any, column: str, ids: Sequence[str | None]) -> Any:
    """The batch with these ids where it has no column of ids, or one of strings that lacks some."""
    import pyarrow

    if column not in field_names(batch.schema):
        return batch.append_column(pyarrow.field(column, pyarrow.string()), pyarrow.array(ids, pyarrow.string()))
    index = batch.schema.get_field_index(column)
    if index < 0 or batch.schema.field(index).type not in (pyarrow.string(), pyarrow.large_string()):
        return batch
    own = batch.column(index)
    if not own.null_count and all(each is None or each.strip() for each in _strings(own)):
        return batch
    field = batch.schema.field(index)
    return batch.set_column(index, field, pyarrow.array(ids, field.type))


def _strings(column: Any) -> list[str | None]:
    """A column's strings, None for what isn't UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [None] * len(column)


def output_schema(path: str, text_column: str, id_column: str, columns: Columns) -> tuple[Any, str]:
    """The Arrow schema of the scored rows of a file, and its compression. Raises ValueError as `check_columns` does."""
    with open_parquet(path) as table:
        schema = table.schema_arrow
        if not has_no_columns(table):
            check_columns(path, schema, list(required_id(id_column)), text_column)
        check_free(path, schema.names, columns)
    added = {} if id_column in field_names(schema) else {id_column: "string"}
    return with_columns(schema, added | columns.types), codec_of(path)


def with_columns(schema: Any, added: Mapping[str, Any]) -> Any:
    """An Arrow schema with further columns: name -> Arrow type, or its name."""
    import pyarrow

    types = {name: pyarrow.type_for_alias(kind) if isinstance(kind, str) else kind for name, kind in added.items()}
    for name, kind in types.items():
        schema = schema.append(pyarrow.field(name, kind))
    if schema.metadata and _FEATURES in schema.metadata:
        metadata = dict(schema.metadata)
        if any(pyarrow.types.is_nested(kind) for kind in types.values()):
            del metadata[_FEATURES]  # the library then goes by the schema
        else:
            metadata[_FEATURES] = _with_features(metadata[_FEATURES], {n: str(kind) for n, kind in types.items()})
        schema = schema.with_metadata(metadata)
    return schema


def _with_features(written: bytes, added: Mapping[str, str]) -> bytes:
    """What the `datasets` library wrote about the columns, with ours: it refuses a file that has others."""
    try:
        values = json.loads(written)
        values["info"]["features"] |= {name: {"dtype": t, "_type": "Value"} for name, t in added.items()}
    except (ValueError, KeyError, TypeError, RecursionError):
        return written
    return json.dumps(values).encode()


def _rows(batch: Any, offsets: Sequence[int]) -> Any:
    """Rows of a record batch by their places."""
    import pyarrow

    try:
        return batch.take(pyarrow.array(offsets, pyarrow.int64()))
    except pyarrow.ArrowNotImplementedError:  # columns of string views
        return pyarrow.concat_batches([batch.slice(offset, 1) for offset in offsets])


class Sink:
    """One output file; the same rows give the same bytes."""

    def __init__(self, path: str, schema: Any, codec: str, columns: Columns):
        import pyarrow.parquet

        self.rows, self._bytes, self._pending = 0, 0, []
        self._schema, self._columns = schema, columns
        self._writer = pyarrow.parquet.ParquetWriter(path, schema, compression=codec)

    def write(self, payloads: Sequence[Payload], values: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows: as they were read, and what to add to each."""
        import pyarrow

        start = 0
        while start < len(payloads):
            batch, stop = payloads[start][0], start
            while stop < len(payloads) and payloads[stop][0] is batch:
                stop += 1
            rows = _rows(batch, [offset for _, offset in payloads[start:stop]])
            added = [
                pyarrow.array([row[name] for row in values[start:stop]], pyarrow.type_for_alias(kind))
                for name, kind in self._columns.types.items()
            ]
            whole = pyarrow.RecordBatch.from_arrays([*rows.columns, *added], schema=self._schema)
            self._pending.append(whole)
            self._bytes += whole.nbytes
            start = stop
        self.rows += len(payloads)
        if self._bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Ends the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow

        if self._pending:
            table = pyarrow.Table.from_batches(self._pending, self._schema)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._pending, self._bytes = [], 0
