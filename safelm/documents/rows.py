"""Reads the rows of one file in any format: JSON lines, a JSON array, tab-separated values or Parquet."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm.documents import json_lines, parquet, tables
from safelm.documents.annotations import AnnotationFolder, FileAnnotations
from safelm.documents.files import PARQUET, TSV_SUFFIXES, suffix
from safelm.documents.identity import required_id
from safelm.documents.json_lines import ColumnCheck, OnMalformed, check_text, missing_column
from safelm.documents.malformed import Malformed, MalformedError

Wanted = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
      number: its place in the file, from 1 (in JSON lines the line, blank lines counted).
      values: by column.
      line: the bytes of a line of JSON; None for other formats.
    """

    number: int
    values: Mapping[str, Any] = dataclasses.field(repr=False)
    line: bytes | None = dataclasses.field(default=None, repr=False)

    def malformed(self, reason: str) -> Malformed:
        """This row as a malformed one, for a quarantine."""
        raw = (
            json.dumps(self.values, default=str) if self.line is None else self.line.decode("utf-8", "backslashreplace")
        )
        return Malformed(self.number, reason, raw)


def iter_rows(
    path: str,
    on_malformed: OnMalformed,
    *,
    text_column: str | None,
    columns: Sequence[str] | None = None,
    required: Wanted | None = None,
    annotated: Sequence[AnnotationFolder] = (),
) -> Iterator[Row]:
    """Streams the rows of one file in file order and bounded memory (only a JSON array is held whole).

    Args:
      on_malformed: called with each unusable row.
      text_column: the column that must hold a string; None requires none.
      columns: the columns to read from Parquet if the file has them, fields of structs as `struct.field`; None for all.
        Rows of other formats come whole.
      required: name of each requirement -> the columns of which the file must have one.
      annotated: folders of annotations; those of `columns` that they have are joined to each row, and count as columns
        of the file.

    Raises ValueError for a file that is damaged or lacks a column, FileNotFoundError or OSError if it can't be read.
    """
    required = dict(required or {})
    if annotated:
        with contextlib.ExitStack() as files:
            joined = FileAnnotations(path, annotated, files, wanted=columns)
            missing = joined.required(required)
            for row in iter_rows(path, on_malformed, text_column=text_column, columns=columns, required=missing):
                yield dataclasses.replace(row, values=joined.join(row.number, row.values))
        return
    if path.endswith(PARQUET):
        chosen = functools.partial(_choose, path, columns, required, text_column)
        for first, batch in parquet.iter_parquet(path, chosen, text_column=text_column):
            for number, values in parquet.batch_rows(first, batch, text_column, on_malformed):
                yield Row(number, values)
        return
    if path.endswith(TSV_SUFFIXES):
        yield from _table(path, tables.iter_tsv(path, on_malformed), text_column, required, on_malformed)
    else:
        suffix(path)
        for row in json_lines.iter_json(path, on_malformed, text_column=text_column, required=required):
            yield Row(row.number, row.row, row.raw)


def check_names(path: str, text_column: str, id_column: str) -> list[Row]:
    """Reads up to 100 rows of a file. Raises ValueError if it lacks the text column or a named id column."""
    rows = iter_rows(path, lambda malformed: None, text_column=text_column, required=required_id(id_column))
    return list(itertools.islice(rows, json_lines.ROWS_WITHOUT_COLUMN))


def read_rows(
    path: str,
    columns: Sequence[str] | None = None,
    on_malformed: OnMalformed | None = None,
    *,
    text_column: str | None = "text",
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, row) as `iter_rows` does.

    Args:
      columns: the columns of the rows beside `text_column`; None for all.
      on_malformed: called with each unusable row; None raises ValueError at the first.
    """
    wanted = None if columns is None else list(dict.fromkeys([*columns, *([text_column] if text_column else [])]))
    required = {name: [name] for name in wanted or ()} if path.endswith(PARQUET) else None
    report = on_malformed or functools.partial(_refuse, path)
    for row in iter_rows(path, report, text_column=text_column, columns=wanted, required=required):
        kept = row.values if wanted is None else {name: row.values[name] for name in wanted if name in row.values}
        yield row.number, dict(kept)


def _refuse(path: str, malformed: Malformed) -> None:
    raise ValueError(f"{path}: row {malformed.row} is malformed: {malformed.reason}")


def _choose(
    path: str,
    columns: Sequence[str] | None,
    required: Wanted,
    text_column: str | None,
    table: Any,
) -> list[str] | None:
    """The columns of a Parquet file to read. Raises ValueError if a required one is missing."""
    names = parquet.field_names(table.schema_arrow)
    for name, any_of in required.items():
        if not any(field in names for field in any_of):
            raise missing_column(path, name, names, any_of)
    if columns is None:
        return None
    wanted = [
        *([text_column] if text_column else []),
        *columns,
        *(name for any_of in required.values() for name in any_of),
    ]
    return [name for name in dict.fromkeys(wanted) if name in names]


def _table(
    path: str,
    rows: Iterator[tuple[int, Any]],
    text_column: str | None,
    required: Wanted,
    on_malformed: OnMalformed,
) -> Iterator[Row]:
    check = ColumnCheck(path, ({text_column: (text_column,)} if text_column else {}) | dict(required))
    for number, values in rows:
        row = Row(number, values)
        try:
            if not isinstance(values, dict):
                raise MalformedError(f"not an object but {type(values).__name__}")
            check.see(values)
            if text_column is not None:
                check_text(values.get(text_column), text_column)
        except MalformedError as error:
            on_malformed(row.malformed(str(error)))
            continue
        yield row
    check.finish()
