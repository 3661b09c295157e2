"""Documents of the tasks, from the rows of files as `safelm.documents` reads them: which columns, which rows are used.

Columns of web documents: `text`; `id`, without which a document is named by a hash of its text; the harm score of
`safelm.documents.harm`.

A row that can't be used (malformed as `safelm.documents` says, an empty text, an id of another type, a needed score
outside 0 to 5) is counted and copied to a quarantine file with its row number and the reason, and reading goes on; more
than `MalformedLimit` allows stops it. A file without one of the columns altogether is an error.
No message and no log line holds a document's text.
"""

import collections
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from data_tasks.preprocessors import NO_SCORE
from safelm import documents
from safelm.documents import Malformed, MalformedError, MalformedLimit, Quarantine, RowTally, harm

__all__ = ["Document", "MalformedError", "MalformedLimit", "ReadReport", "RowFormat", "WebDocuments", "read_documents"]

_HARM_SCORE = "harm score"

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Document:
    """One web document; `harm_score` is 0 to 5, or NO_SCORE where the corpus carries none; `score_column` is what it
    was read from."""

    id: str
    text: str
    harm_score: int
    score_column: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass
class ReadReport:
    """What reading came across: rows with content, malformed ones among them, and where harm scores were read from."""

    rows: int = 0
    malformed: int = 0
    score_columns: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@runtime_checkable
class RowFormat(Protocol):
    """Which columns a file has and what a row becomes. A column in a struct is named "struct.column"."""

    text_column: str | None  # that must hold a string, if any
    optional: Sequence[str]  # columns that are read where there are any
    train_files: Sequence[str]  # names of a corpus's files, with *
    validation_files: Sequence[str]
    suffixes: tuple[str, ...]  # that such names may have

    def required(self, path: str) -> Mapping[str, Sequence[str]]:
        """What a file must have beside the text: name -> the columns of which any will do."""

    def parse(self, row: Mapping[str, Any], path: str) -> Document:
        """The document of a row of the file `path`; raises MalformedError."""


@dataclasses.dataclass(frozen=True)
class WebDocuments:
    """Rows with a text, perhaps an id and, if needed, a harm score.

    Attributes:
      id_column: another name than "id" says that every file has it.
      score_column: the only column that a harm score is read from; None for those of `safelm.documents.harm`.
    """

    needs_score: bool = False
    text_column: str = "text"
    id_column: str = documents.ID_COLUMN
    score_column: str | None = None
    train_files: Sequence[str] = ("train-*", "c4-train.*")
    validation_files: Sequence[str] = ("validation-*", "c4-validation.*")
    suffixes: tuple[str, ...] = documents.SUFFIXES

    @property
    def optional(self) -> Sequence[str]:
        """The id and the harm score."""
        return (self.id_column, *harm.score_columns(self.score_column))

    def required(self, path: str) -> Mapping[str, Sequence[str]]:
        """An id of another name, and the harm score where it is needed."""
        named = documents.required_id(self.id_column)
        return named | ({_HARM_SCORE: harm.required_columns(path, self.score_column)} if self.needs_score else {})

    def parse(self, row: Mapping[str, Any], path: str) -> Document:
        """As the protocol."""
        text = row[self.text_column]
        if not text.strip():
            raise MalformedError(f"field {self.text_column!r} is empty")
        identity, score = (
            documents.row_id(row, text, self.id_column),
            documents.harm_score(row, path, self.score_column),
        )
        if score.value is None and self.needs_score:
            raise MalformedError(score.problem)
        return Document(identity, text, NO_SCORE if score.value is None else score.value, score.column)


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

    Its rows are web documents unless `row_format` says otherwise. Malformed rows go to the local file `quarantine`
    (see `safelm.documents.Quarantine`); None only counts them.

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
        )
    except documents.MissingColumnError as error:
        more = f"; {harm.advice(error.present)}" if error.name == _HARM_SCORE else ""
        raise ValueError(f"{error}{more}") from None  # by a name that `safelm.caching.shards` finds in tf.data's error
