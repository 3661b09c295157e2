"""Turns rows that `safelm.documents` reads into documents of the tasks: chooses columns and rows.

Columns of web documents: `text`; `id`, which defaults to a hash of the text; the harm score of `safelm.documents.harm`.

An unusable row (malformed as defined in `safelm.documents`, with an empty text, an id of another type, or a needed
score outside 0 to 5) is counted and copied to a quarantine file with its row number and the reason; reading goes on
until `MalformedLimit` is passed. A file without a required column is an error. No message or log line contains a
document's text.
"""

import collections
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from data_tasks.preprocessors import NO_SCORE
from safelm import documents
from safelm.documents import Malformed, MalformedError, MalformedLimit, Quarantine, RowTally, harm, notes, spans
from safelm.documents.annotations import AnnotationFolder
from safelm.documents.notes import Note
from safelm.documents.spans import Span

__all__ = ["Document", "MalformedError", "MalformedLimit", "ReadReport", "RowFormat", "WebDocuments", "read_documents"]

_HARM_SCORE, _SPANS, _NOTES, _METADATA = "harm score", "spans", "notes", "metadata"

_NOTES_ADVICE = "`safelm.synthesize --kind=reflection` writes some, --annotations names them"
_SOURCE_ID = "source_id"
_SHOWN = 40  # characters of an annotator's name for something
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Document:
    """A web document.

    Attributes:
      harm_score: 0 to 5, or NO_SCORE if the corpus has none.
      source_id: of a rewrite, the id of the page that it was made from, where the row says so.
      score_column: the column that it was read from.
      spans: what annotators say of parts of the text, where the format reads them.
      notes: remarks for places in the text, likewise.
      metadata: such as its URL, likewise; "" without any.
    """

    id: str
    text: str
    harm_score: int
    score_column: str = dataclasses.field(default="", compare=False)
    spans: tuple[Span, ...] = ()
    notes: tuple[Note, ...] = ()
    metadata: str = ""
    source_id: str = ""

    @property
    def split_id(self) -> str:
        """What decides whether it is held out: a page's rewrites go where the page goes."""
        return self.source_id or self.id

    def beside(self) -> list[str]:
        """What there is beside the text, a name for each, to be counted."""
        found = [f"spans of kind {span.kind[:_SHOWN]!r} and label {span.label[:_SHOWN]!r}" for span in self.spans]
        found += [f"notes of kind {note.kind!r}" for note in self.notes]
        return found + (["values of metadata"] if self.metadata else [])


@dataclasses.dataclass
class ReadReport:
    """Statistics of reading: rows with content, malformed rows among them, and the columns of harm scores.

    `beside` counts what the documents that were taken have beside their text (`Document.beside`).
    """

    rows: int = 0
    malformed: int = 0
    score_columns: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    beside: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@runtime_checkable
class RowFormat(Protocol):
    """The columns of a file and the document of a row. A column in a struct is named "struct.column"."""

    text_column: str | None  # that must hold a string, if any
    optional: Sequence[str]  # columns that are read where there are any
    train_files: Sequence[str]  # names of a corpus's files, with *
    validation_files: Sequence[str]
    suffixes: tuple[str, ...]  # that such names may have
    annotations: Sequence[AnnotationFolder]  # which may hold the optional columns

    def required(self, path: str) -> Mapping[str, Sequence[str]]:
        """The file's required columns beside the text: name -> the columns of which any will do."""

    def parse(self, row: Mapping[str, Any], path: str) -> Document:
        """The document of a row of the file `path`. Raises MalformedError."""


@dataclasses.dataclass(frozen=True)
class WebDocuments:
    """The format of rows with a text, perhaps an id and, if needed, a harm score and more.

    Attributes:
      id_column: a name other than "id" is required in every file.
      score_column: the only column to read harm scores from; None for those of `safelm.documents.harm`.
      has_spans, has_notes: read the spans or notes of the annotations, of which one folder must have some.
      metadata_columns: the first that a row has is its metadata; a file must have one of them.
      are_rewrites: the column `source_id`, where a row has one, is the id of the page that its text was made from.
    """

    needs_score: bool = False
    text_column: str = "text"
    id_column: str = documents.ID_COLUMN
    score_column: str | None = None
    train_files: Sequence[str] = ("train-*", "c4-train.*")
    validation_files: Sequence[str] = ("validation-*", "c4-validation.*")
    suffixes: tuple[str, ...] = documents.SUFFIXES
    annotations: Sequence[AnnotationFolder] = ()
    has_spans: bool = False
    has_notes: bool = False
    metadata_columns: Sequence[str] = ()
    are_rewrites: bool = False

    @property
    def optional(self) -> Sequence[str]:
        """The id, the harm score, the spans, the notes, the metadata and a rewrite's source."""
        beside = (*self.span_columns, *self.note_columns, *self.metadata_columns)
        named = (self.id_column, *harm.score_columns(self.score_column), *beside)
        return tuple(dict.fromkeys((*named, _SOURCE_ID) if self.are_rewrites else named))

    @property
    def span_columns(self) -> Sequence[str]:
        """What spans may be called, by the folders' names."""
        return [each.column(spans.COLUMN) for each in self.annotations] if self.has_spans else []

    @property
    def note_columns(self) -> Sequence[str]:
        """What notes may be called, by the folders' names."""
        return [each.column(notes.COLUMN) for each in self.annotations] if self.has_notes else []

    def required(self, path: str) -> Mapping[str, Sequence[str]]:
        """A non-default id column, and the harm score if it is needed."""
        named = documents.required_id(self.id_column)
        named |= {_HARM_SCORE: harm.required_columns(path, self.score_column)} if self.needs_score else {}
        named |= {_SPANS: self.span_columns or [spans.COLUMN]} if self.has_spans else {}
        named |= {_METADATA: self.metadata_columns} if self.metadata_columns else {}
        return named | ({_NOTES: self.note_columns or [notes.COLUMN]} if self.has_notes else {})

    def parse(self, row: Mapping[str, Any], path: str) -> Document:
        """See `RowFormat.parse`."""
        text = row[self.text_column]
        if not text.strip():
            raise MalformedError(f"field {self.text_column!r} is empty")
        identity, score = (
            documents.row_id(row, text, self.id_column),
            documents.harm_score(row, path, self.score_column),
        )
        if score.value is None and self.needs_score:
            raise MalformedError(score.problem)
        value = NO_SCORE if score.value is None else score.value
        where = f"{path}, id {identity}"
        noted = notes.merged(
            [notes.parse(row.get(name), text, f"{where}, {name}") for name in self.note_columns], where
        )
        metadata = next(filter(None, (documents.field(row, name) for name in self.metadata_columns)), "")
        if not isinstance(metadata, str):
            raise MalformedError(f"metadata are no string but {type(metadata).__name__}")
        marked = self._spans(row, text, where)
        return Document(identity, text, value, score.column, marked, noted, metadata, self._source_id(row))

    def _source_id(self, row: Mapping[str, Any]) -> str:
        is_told = self.are_rewrites and row.get(_SOURCE_ID) not in (None, "")
        return documents.row_id(row, row[self.text_column], _SOURCE_ID) if is_told else ""

    def _spans(self, row: Mapping[str, Any], text: str, where: str) -> tuple[Span, ...]:
        """The spans of all annotators. ValueError for those that don't fit the text or each other, malformed or not."""
        found = [(name, spans.parse(row.get(name), text, f"{where}, {name}")) for name in self.span_columns]
        return spans.merged([each for _, each in found], where)


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

    Rows are web documents unless `row_format` says otherwise. Malformed rows go to the local file `quarantine` (see
    `safelm.documents.Quarantine`); with None they are only counted.

    Raises FileNotFoundError, and ValueError for a file that is damaged, lacks a column or has too many malformed rows.
    """
    row_format = row_format or WebDocuments(needs_score)
    tally = RowTally(path, limit)
    with Quarantine(path, quarantine) as rejected:

        def reject(malformed: Malformed) -> None:
            report.rows, report.malformed = report.rows + 1, report.malformed + 1
            rejected.add(malformed)
            tally.add(malformed)

        for row in _rows(path, row_format, reject):
            try:
                document = row_format.parse(row.values, path)
            except MalformedError as error:
                reject(row.malformed(str(error)))
                continue
            report.rows += 1
            tally.add()
            if document.score_column:
                report.score_columns[document.score_column] += 1
            yield document
        tally.finish()
    if tally.malformed:
        where = f", kept in {quarantine}" if quarantine else ""
        _logger.warning("%s: %d of %d rows are malformed%s", path, tally.malformed, tally.rows, where)


def _rows(path: str, row_format: RowFormat, reject: documents.OnMalformed) -> Iterator[documents.Row]:
    try:
        yield from documents.iter_rows(
            path,
            reject,
            text_column=row_format.text_column,
            columns=row_format.optional,
            required=row_format.required(path),
            annotated=row_format.annotations,
        )
    except documents.MissingColumnError as error:
        more = f"; {harm.advice(error.present)}" if error.name == _HARM_SCORE else ""
        more += (
            "; `safelm.annotate --unit=sentence` writes some, --annotations names them" if error.name == _SPANS else ""
        )
        more += f"; {_NOTES_ADVICE}" if error.name == _NOTES else ""
        raise ValueError(f"{error}{more}") from None  # by a name that `safelm.caching.shards` finds in tf.data's error
