"""Turns scored rows into sources: uses some rows, leaves others out, and refuses bad ones by file and row.

`safelm.documents` reads a row's harm score and id. Rows of RefuseWeb that this package wrote have a prompt_version:
Moral Education takes them as dialogues (Maini et al. 2025, section 3.4), the other kinds refuse them.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from safelm import documents
from safelm.documents import Malformed, MalformedError, MalformedLimit, RowTally, harm
from safelm.documents.annotations import AnnotationFolder, FileAnnotations
from safelm.jobs.file_shards import ShardJob
from safelm.safety.synthesis.kinds import Kind, Source


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of the input that a run uses.

    Attributes:
      scores: the harm scores to use.
      leaves_out: whether rows with other scores are left out, because scores were asked for, rather than refused.
      score_column: perhaps a field of a struct, e.g. "metadata.harm_score"; None for the first that exists.
      are_dialogues: whether every row is a RefuseWeb dialogue, even if it doesn't say so.
      limit: of malformed rows of one file or part.
      annotations: folders that hold harm scores of the input beside its text.
    """

    kind: Kind
    scores: tuple[int, ...]
    leaves_out: bool = False
    text_column: str = "text"
    id_column: str = "id"
    score_column: str | None = None
    are_dialogues: bool = False
    limit: MalformedLimit = dataclasses.field(default_factory=MalformedLimit)
    annotations: tuple[AnnotationFolder, ...] = ()


class ShardRows:
    """The rows of one shard of the input.

    Attributes:
      left_out: number of rows left out, by harm score.
      repeats: number of rows left out as copies.
      unscored: number of rows left out because the input's annotations give them no score.
      score_columns: number of rows whose harm score came from each column.
    """

    def __init__(
        self,
        job: ShardJob,
        selection: Selection,
        on_malformed: documents.OnMalformed = lambda malformed: None,
        copies: Collection[int] = (),
    ):
        """`copies` are the rows to leave out, numbered from the shard's first row."""
        self.left_out: dict[int, int] = {}
        self.repeats = self.unscored = 0
        self._copies = copies
        self._tally = RowTally(job.path, selection.limit)
        self.score_columns: dict[str, int] = {}
        self._job, self._selection, self._on_malformed = job, selection, on_malformed
        self._is_parquet = documents.suffix(job.path) == ".parquet"

    def sources(self) -> Iterator[tuple[int, Source]]:
        """Yields (row number from 1 in the file, source) of the rows to use.

        Raises ValueError naming file and row for an unscored row, an invalid score or one of another kind, and text
        that is already synthetic; ValueError or OSError for a file that is damaged, lacks a column or has too many
        malformed rows.
        """
        for number, row in self._rows(None, self._selection.text_column):
            try:
                score = self._score(number, row)
                if number in self._copies:
                    self.repeats += 1
                    continue
                source = self._source(row, score or 0)
                if score is None:
                    continue
                if not source.text.strip():
                    raise MalformedError(f"field {self._selection.text_column!r} is empty")
            except MalformedError as error:
                self._malformed(Malformed(number, str(error), json.dumps(row, default=str)))
                continue
            self._tally.add()
            yield self.number(number), source
        self._tally.finish()

    def ids(self) -> Iterator[tuple[int, str]]:
        """Yields (row number from 1 in the shard, source id) of the same rows without reading their texts.

        Checks what `sources` does, except for malformed texts.
        """
        selection = self._selection
        names = [selection.id_column, *harm.score_columns(selection.score_column), *harm.SYNTHETIC]
        for number, row in self._rows(names, None):
            try:
                score, identity = self._score(number, row), self._source_id(row)
            except MalformedError as error:
                self._malformed(Malformed(number, str(error), ""))
                continue
            self._tally.add()
            if score is not None:
                yield number, identity
        self._tally.finish()

    def number(self, in_shard: int) -> int:
        """A row's number in the file, from its number in the shard."""
        return in_shard + self._before

    @functools.cached_property
    def _before(self) -> int:
        part = self._job.part
        return (
            0
            if part is None or not part.start or self._is_parquet
            else documents.lines_before(self._job.path, part.start)
        )

    def _rows(self, columns: list[str] | None, text_column: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
        folders, wanted = self._selection.annotations, harm.score_columns(self._selection.score_column)
        if not folders:
            yield from self._own_rows(columns, text_column)
            return
        with contextlib.ExitStack() as files:
            joined = FileAnnotations(self._job.path, folders, files, wanted)
            for number, row in self._own_rows(columns, text_column):
                row = joined.join(self.number(number), row)
                if documents.harm_score(row, self._job.path, self._selection.score_column).column:
                    yield number, row
                else:  # of a whole scored folder they lie in `unscored`, which is not read
                    self.unscored += 1

    def _own_rows(self, columns: list[str] | None, text_column: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
        path, part, selection = self._job.path, self._job.part, self._selection
        required = documents.required_id(selection.id_column)
        if not self._is_parquet:
            for row in documents.iter_json(
                path, self._malformed, text_column=text_column, part=part, required=required
            ):
                yield row.number, row.row
            return

        def choose(table: Any) -> list[str] | None:
            documents.check_columns(path, table.schema_arrow, list(required), selection.text_column)
            if columns is None:
                return None
            present = documents.field_names(table.schema_arrow)
            lacks_ids = documents.may_be_null(path, selection.id_column)
            more = [selection.text_column] if lacks_ids else []  # which then gives the id
            return [name for name in dict.fromkeys([*columns, *more]) if name in present]

        for first, batch in documents.iter_parquet(path, choose, text_column=text_column, groups=part):
            yield from documents.batch_rows(first, batch, text_column, self._malformed)

    def _malformed(self, malformed: Malformed) -> None:
        placed = Malformed(self.number(malformed.row), malformed.reason, malformed.raw)
        self._on_malformed(placed)
        self._tally.add(placed)

    def _source_id(self, row: Mapping[str, Any]) -> str:
        """The row's id; for a dialogue, the id of the web document behind it."""
        text = row.get(self._selection.text_column)
        is_made = _kind_of(row) == "refuseweb" and row.get("source_id")
        column = "source_id" if is_made else self._selection.id_column
        return documents.row_id(row, text if isinstance(text, str) else "", column)

    def _source(self, row: Mapping[str, Any], score: int) -> Source:
        selection = self._selection
        others = {name: value for name, value in row.items() if name != selection.text_column}
        is_dialogue = selection.are_dialogues or _kind_of(row) == "refuseweb"
        return Source(self._source_id(row), row[selection.text_column], score, others, is_dialogue)

    def _score(self, number: int, row: Mapping[str, Any]) -> int | None:
        """The row's harm score if it is used, None if it is left out."""
        selection = self._selection
        made = _kind_of(row)
        if made and not (made == "refuseweb" and selection.kind == "moral_education"):
            raise self._refused(number, f"is text of {made} already; {selection.kind} is made from web documents")
        found = documents.harm_score(row, self._job.path, selection.score_column)
        if not found.column:
            raise self._refused(number, f"has {found.problem}: {harm.advice(row)}")
        if found.value is None:
            raise self._refused(number, found.problem)
        score = found.value
        if score in selection.scores:
            self.score_columns[found.column] = self.score_columns.get(found.column, 0) + 1
            return score
        if not selection.leaves_out:
            raise self._refused(number, wrong_score(selection, score))
        self.left_out[score] = self.left_out.get(score, 0) + 1
        return None

    def _refused(self, number: int, reason: str) -> ValueError:
        return ValueError(f"{self._job.path}: row {self.number(number)} {reason}")


def wrong_score(selection: Selection, score: int) -> str:
    """Why a document with this score is refused, with advice."""
    wanted = ",".join(map(str, selection.scores))
    also = ",".join(map(str, sorted({*selection.scores, score})))
    return (
        f"has harm score {score}, and {selection.kind} is made from {wanted}: --scores={wanted} leaves others out, "
        f"--scores={also} takes it too"
    )


def _kind_of(row: Mapping[str, Any]) -> str:
    """The kind of synthetic text that a row claims to be; "" for a web document."""
    version = row.get("prompt_version")
    return version.partition("-")[0].partition("/")[0] if isinstance(version, str) and row.get("source_id") else ""
