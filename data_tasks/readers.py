"""Reading documents from the rows of files (`data_tasks.row_files`): which columns, which rows can be used.

Columns of web documents, as the published sets have them: `id` (string), `text` (string) and `metadata`, a struct. The
harm score is the first of these a row has:

    harm_score, metadata.harm_score, int_score, metadata.int_score, score, metadata.score

a number from 0 to 5 (a fraction is rounded, a half up). An explicit `harm_score` comes first because educational
corpora use `int_score` and `score` for something else: rename yours where both exist.

A row that can't be used (not JSON, no object, a field missing, null or of another type, an empty text, half a Unicode
pair, a needed score outside 0 to 5) is counted and copied to a quarantine file with its row number and the reason, and
reading goes on; more than `MalformedLimit` allows stops it. A file without one of the columns altogether is an error.
No message and no log line holds a document's text.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol, runtime_checkable

from data_tasks.preprocessors import MAX_SCORE, NO_SCORE
from data_tasks.row_files import SUFFIXES, read_rows
from safelm.documents import MalformedError as MalformedRowError

__all__ = ["SUFFIXES", "Document", "MalformedLimit", "MalformedRowError", "ReadReport", "RowFormat", "WebDocuments"]
__all__ += ["harm_score", "missing_column", "parse_document", "read_documents"]

SCORE_FIELDS = (
    "harm_score",
    "metadata.harm_score",
    "int_score",
    "metadata.int_score",
    "score",
    "metadata.score",
)
_ROWS_BEFORE_JUDGING = 10_000
_FEW_ROWS = 20
_ROWS_WITHOUT_COLUMN = 100

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Document:
    """One web document; `harm_score` is 0 to 5, or NO_SCORE where the corpus carries none."""

    id: str
    text: str
    harm_score: int


@dataclasses.dataclass(frozen=True)
class MalformedLimit:
    """Reading a file stops when both are passed: more than `rows` malformed rows and more than `fraction` of all.

    The fraction is judged at the file's end and, to stop early, after the first 10,000 rows. A file of which more than
    half (and more than 20 rows) is malformed is refused at its end even if that is fewer than `rows`.
    """

    rows: int = 100
    fraction: float = 0.01


@dataclasses.dataclass
class ReadReport:
    """What reading came across: rows with content, malformed ones among them."""

    rows: int = 0
    malformed: int = 0


@runtime_checkable
class RowFormat(Protocol):
    """Which columns a file has and what a row becomes. A column in a struct is named "struct.column"."""

    columns: Mapping[str, Sequence[str]]  # what a file must have: name -> the columns of which any will do
    optional: Sequence[str]  # columns that are read where there are any
    train_files: Sequence[str]  # names of a corpus's files, with *
    validation_files: Sequence[str]
    suffixes: tuple[str, ...]  # those of SUFFIXES that such names may have

    def parse(self, row: Any) -> Document:
        """One row's document; raises MalformedRowError."""


@dataclasses.dataclass(frozen=True)
class WebDocuments:
    """Rows with `id`, `text` and, if needed, a harm score."""

    needs_score: bool = False
    train_files: Sequence[str] = ("train-*",)
    validation_files: Sequence[str] = ("validation-*",)
    suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz", ".parquet")

    @property
    def columns(self) -> Mapping[str, Sequence[str]]:
        """`id`, `text` and the harm score where it is needed."""
        return {"id": ("id",), "text": ("text",)} | ({"harm score": SCORE_FIELDS} if self.needs_score else {})

    @property
    def optional(self) -> Sequence[str]:
        """The harm score."""
        return SCORE_FIELDS

    def parse(self, row: Any) -> Document:
        """As `parse_document`."""
        return parse_document(row, needs_score=self.needs_score)


def parse_document(row: Any, *, needs_score: bool) -> Document:
    """One row's document; raises MalformedRowError. `needs_score`: a row without a harm score is malformed."""
    if not isinstance(row, Mapping):
        raise MalformedRowError(f"not an object but {type(row).__name__}")
    doc_id, text = row.get("id"), row.get("text")
    if isinstance(doc_id, int) and not isinstance(doc_id, bool):
        doc_id = str(doc_id)
    for name, value in (("id", doc_id), ("text", text)):
        if not isinstance(value, str):
            raise MalformedRowError(
                f"field {name!r} is missing" if value is None else f"field {name!r} is not a string"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise MalformedRowError(f"field {name!r} holds half a Unicode pair") from None
        if not value.strip():
            raise MalformedRowError(f"field {name!r} is empty")
    return Document(doc_id, text, harm_score(row, needed=needs_score))


def harm_score(row: Mapping[str, Any], *, needed: bool = False) -> int:
    """The row's harm score by the order of SCORE_FIELDS.

    NO_SCORE if it has none that can be used, or MalformedRowError where it is `needed`.
    """
    field, value = next(
        ((name, _field(row, name)) for name in SCORE_FIELDS if _field(row, name) is not None), ("", None)
    )
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_SCORE:
        return int(value + 0.5)
    if needed:
        missing = f"no harm score (looked for {', '.join(SCORE_FIELDS)})"
        raise MalformedRowError(f"field {field!r} is not a number from 0 to {MAX_SCORE}" if field else missing)
    return NO_SCORE


def read_documents(
    path: str,
    *,
    limit: MalformedLimit,
    report: ReadReport,
    needs_score: bool = False,
    row_format: RowFormat | None = None,
    quarantine: str | None = None,
) -> Iterator[Document]:
    """Streams one file's documents in file order, adding to `report`.

    `path` is an fsspec URL ending in one of SUFFIXES; its rows are web documents unless `row_format` says otherwise.
    Malformed rows go to the local file `quarantine` (JSON lines:
    file, row from 1, reason, raw), replaced by each reading and made when the first one turns up; None only counts
    them.

    Raises FileNotFoundError, and ValueError for a file that is damaged, lacks a column or has too many malformed rows.
    """
    row_format = row_format or WebDocuments(needs_score)
    rows = read_rows(path, functools.partial(_choose_columns, path, row_format))
    columns = _ColumnCheck(path, row_format)
    mine = ReadReport()
    with _Quarantine(path, quarantine) as rejected:
        for number, raw, parse in rows:
            mine.rows, report.rows = mine.rows + 1, report.rows + 1
            try:
                row = parse()
                columns.see(row)
                document = row_format.parse(row)
            except MalformedRowError as error:
                mine.malformed, report.malformed = mine.malformed + 1, report.malformed + 1
                rejected.add(number, str(error), raw)
                if mine.rows >= _ROWS_BEFORE_JUDGING:
                    _check_limit(path, mine, limit)
                continue
            yield document
        columns.finish()
        _check_limit(path, mine, limit)
        if mine.malformed > _FEW_ROWS and 2 * mine.malformed > mine.rows:
            raise ValueError(f"{path}: {mine.malformed} of {mine.rows} rows are malformed, more than half of the file")
    if mine.malformed:
        where = f", kept in {quarantine}" if quarantine else ""
        _logger.warning("%s: %d of %d rows are malformed%s", path, mine.malformed, mine.rows, where)


def _check_limit(path: str, report: ReadReport, limit: MalformedLimit) -> None:
    if report.malformed > limit.rows and report.malformed > limit.fraction * report.rows:
        raise ValueError(
            f"{path}: {report.malformed} of the first {report.rows} rows are malformed, "
            f"more than {limit.rows} rows and {limit.fraction:.2%}"
        )


class _ColumnCheck:
    """Tells a missing column (an error) from rows that lack a field (malformed)."""

    def __init__(self, path: str, row_format: RowFormat):
        self._path = path
        self._wanted = dict(row_format.columns)
        self._objects = 0
        self._present: set[str] = set()

    def see(self, row: Any) -> None:
        if not self._wanted or not isinstance(row, Mapping):
            return
        self._objects += 1
        self._present.update(row)
        found = [name for name, fields in self._wanted.items() if any(_has(row, field) for field in fields)]
        self._wanted = {name: fields for name, fields in self._wanted.items() if name not in found}
        if self._objects >= _ROWS_WITHOUT_COLUMN:
            self.finish()

    def finish(self) -> None:
        if self._objects and self._wanted:
            name, fields = next(iter(self._wanted.items()))
            raise missing_column(self._path, name, fields, self._present)


def _choose_columns(path: str, row_format: RowFormat, fields: Sequence[str]) -> list[str]:
    """The columns of a Parquet file to read; ValueError if one that rows must have isn't there."""
    chosen: dict[str, None] = {}
    for name, wanted in row_format.columns.items():
        found = [field for field in wanted if field in fields]
        if not found:
            raise missing_column(path, name, wanted, [field for field in fields if "." not in field])
        chosen |= dict.fromkeys(found)
    return list(chosen | dict.fromkeys(field for field in row_format.optional if field in fields))


def missing_column(path: str, name: str, fields: Sequence[str], present: Any) -> ValueError:
    """The error for a corpus that lacks a column altogether."""
    looked = "" if len(fields) == 1 else f" (one of {', '.join(fields)})"
    return ValueError(f"{path}: missing column {name!r}{looked}; it has {', '.join(sorted(present)) or 'none'}")


def _field(row: Mapping[str, Any], field: str) -> Any:
    outer, _, inner = field.rpartition(".")
    if outer:
        row = row.get(outer)
    return row.get(inner) if isinstance(row, Mapping) else None


def _has(row: Mapping[str, Any], field: str) -> bool:
    outer, _, inner = field.rpartition(".")
    if outer:
        row = row.get(outer)
    return isinstance(row, Mapping) and inner in row


class _Quarantine:
    """The rows of one file that can't be used, in a file of their own."""

    def __init__(self, path: str, target: str | None):
        self._path, self._target, self._file = path, target, None
        if target and os.path.exists(target):
            os.remove(target)

    def add(self, number: int, reason: str, raw: Any) -> None:
        if not self._target:
            return
        if self._file is None:
            os.makedirs(os.path.dirname(self._target) or ".", exist_ok=True)
            self._file: BinaryIO | None = open(self._target, "wb")
        text = raw.decode("utf-8", "backslashreplace").rstrip("\r\n") if isinstance(raw, bytes) else _raw_parquet(raw)
        record = {"file": self._path, "row": number, "reason": reason, "raw": text}
        self._file.write((json.dumps(record) + "\n").encode())

    def __enter__(self) -> "_Quarantine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _raw_parquet(row: Any) -> str:
    if isinstance(row, Mapping):
        return json.dumps(row, default=str)
    import pyarrow

    strings = [
        column.cast(pyarrow.binary()).to_pylist()[0] for column in row.columns if column.type == pyarrow.string()
    ]
    return " | ".join(string.decode("utf-8", "backslashreplace") for string in strings if string is not None)
