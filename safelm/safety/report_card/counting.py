"""Counts one file, or a part of one: a pure function of its arguments."""

import collections
import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm import documents
from safelm.documents import harm
from safelm.documents.annotations import AnnotationFolder, FileAnnotations
from safelm.safety.report_card import queries as query_sets
from safelm.safety.report_card.matching import Found, Matcher
from safelm.safety.report_card.queries import QuerySet
from safelm.safety.report_card.tally import ALL, Count, Tally, TopDocument

SCORE_SLICES = {"score 0": (0, 0), "score 1 to 3": (1, 3), "score 4 to 5": (4, 5)}
UNSCORED_SLICE = "unscored"
_SLICE_OF = {UNSCORED_SLICE: UNSCORED_SLICE} | {
    str(score): name for name, (low, high) in SCORE_SLICES.items() for score in range(low, high + 1)
}
WORD_TOKENS = "words by the matching rules (runs of letters and digits)"
_BATCH_CHARACTERS = 1 << 19
_EXCERPT_BYTES = 80


@dataclasses.dataclass(frozen=True)
class CountSettings:
    """The settings that decide a count.

    `tokenizer` is a path, or None to count words; `annotations` are of the files that are sliced by harm score.
    """

    queries: str | None = None
    tokenizer: str | None = None
    text_column: str = "text"
    id_column: str = "id"
    score_column: str | None = None
    top: int = 20
    show_text: bool = False
    annotations: tuple[AnnotationFolder, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A file or a part of one. With `slice` None, each document's harm score gives its slice."""

    slice: str | None
    path: str
    bytes: int
    part: documents.Part | None = None
    version: str = ""


def token_definition(settings: CountSettings) -> str:
    """The definition of a token; a tokenizer is named by its hash."""
    if settings.tokenizer is None:
        return WORD_TOKENS
    return f"tokens of the tokenizer with hash {_tokenizer(settings.tokenizer).hash}"


@functools.lru_cache(1)
def _matcher(path: str | None) -> tuple[QuerySet, Matcher]:
    queries = query_sets.load_queries(path)
    return queries, Matcher(queries)


@functools.lru_cache(1)
def _tokenizer(path: str) -> Any:
    from safelm.text.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(path)


def count_piece(piece: Piece, settings: CountSettings) -> tuple[Count, int]:
    """Counts a piece; returns the counts and the number of JSON lines read.

    TopDocument.row counts from the piece's first JSON line. Rows of Parquet are counted from the file's first row in
    every piece (and no lines are read).

    Raises ValueError or OSError naming the file if it is damaged or has no text column.
    """
    counter = Counter(piece, settings)
    for number, row in counter.rows():
        counter.add(number, row)
    counter.flush()
    return counter.count, counter.lines


class Counter:
    """Counts the rows it is given. Rows are buffered; call `flush` to include them all.

    Attributes:
      lines: number of JSON lines that `rows` has read.
    """

    def __init__(self, piece: Piece, settings: CountSettings):
        self.count, self.lines = Count(), 0
        self._piece, self._settings = piece, settings
        self._queries, self._matcher = _matcher(settings.queries)
        self._mistakable: Sequence[str] = ()
        self._annotated: Sequence[str] = ()
        self._texts: list[str] = []
        self._facts: list[tuple[int, str, str]] = []
        self._characters = 0

    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The piece's rows with their numbers and what annotations say of their harm."""
        piece, settings = self._piece, self._settings
        if piece.slice is not None or not settings.annotations:
            yield from self._rows()
            return
        starts_inside = piece.part and piece.part.start and not piece.path.endswith(documents.PARQUET)
        before = documents.lines_before(piece.path, piece.part.start) if starts_inside else 0
        wanted = (*harm.score_columns(settings.score_column), *harm.TEXT_COLUMNS)
        with contextlib.ExitStack() as files:
            joined = FileAnnotations(piece.path, settings.annotations, files, wanted)
            self._annotated = joined.names
            for number, row in self._rows():
                yield number, joined.join(before + number, row)

    def _rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        piece, text = self._piece, self._settings.text_column
        required = documents.required_id(self._settings.id_column)
        if documents.suffix(piece.path) != documents.PARQUET:
            for row in documents.iter_json(
                piece.path,
                self._malformed,
                text_column=text,
                part=piece.part,
                on_bytes=self._line,
                required=required,
            ):
                yield row.number, row.row
            return

        def choose(table: Any) -> list[str]:
            documents.check_columns(piece.path, table.schema_arrow, list(required), text)
            present = documents.field_names(table.schema_arrow)
            self._mistakable = harm.mistakable(present)
            wanted = [text, self._settings.id_column, *harm.text_score_columns(present, self._settings.score_column)]
            return [name for name in dict.fromkeys(wanted) if name in present]

        for first, batch in documents.iter_parquet(piece.path, choose, text_column=text, groups=piece.part):
            yield from documents.batch_rows(first, batch, text, self._malformed)

    def _line(self, _: int) -> None:
        self.lines += 1

    def _malformed(self, malformed: documents.Malformed) -> None:
        self.count.rows += 1
        self.count.malformed[re.sub(r" at column \d+", "", malformed.reason)] += 1

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Takes a row with the columns that the settings name; `number` is its place in the piece's file."""
        text = row[self._settings.text_column]
        try:
            identity = documents.row_id(row, text, self._settings.id_column)
        except documents.MalformedError as error:
            self._malformed(documents.Malformed(number, str(error), ""))
            return
        self.count.rows += 1
        self._texts.append(text)
        self._facts.append((number, identity, self._score(row)))
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS or len(self._texts) >= 4096:
            self.flush()

    def _score(self, row: Mapping[str, Any]) -> str:
        score = harm.text_harm_score(row, self._piece.path, self._settings.score_column, self._annotated)
        if not score.column:
            if not harm.is_rewritten(row, self._piece.path):
                self.count.passed_over.update(self._mistakable or harm.mistakable(row))
            return UNSCORED_SLICE
        self.count.score_columns[score.column] += 1
        if score.value is None:
            self.count.unusable_scores += 1
            return UNSCORED_SLICE
        return str(score.value)

    def flush(self) -> None:
        """Counts the buffered rows."""
        if not self._texts:
            return
        found = self._matcher.find(self._texts)
        tokens = found.words_D.tolist() if self._settings.tokenizer is None else self._count_tokens()
        tallies = [self._tally(score) for _, _, score in self._facts]
        for tally, (_, _, score), num_tokens, text in zip(tallies, self._facts, tokens, self._texts, strict=True):
            tally.add_document(score, num_tokens, len(text) if text.isascii() else len(text.encode()))
        by_document: dict[int, list[int]] = collections.defaultdict(list)
        for match, document in enumerate(found.document_M.tolist()):
            by_document[document].append(match)
        for document, matches in by_document.items():
            self._add_hits(tallies[document], self._facts[document], found, matches)
        self._texts, self._facts, self._characters = [], [], 0

    def _count_tokens(self) -> list[int]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # every core has a process already
        return [len(ids) for ids in _tokenizer(self._settings.tokenizer).encode_batch(self._texts)]

    def _tally(self, score: str) -> Tally:
        name = _SLICE_OF[score] if self._piece.slice is None else self._piece.slice
        return self.count.tallies.setdefault(name, Tally())

    def _add_hits(self, tally: Tally, facts: tuple[int, str, str], found: Found, matches: list[int]) -> None:
        names = self._queries.queries
        by_query = collections.Counter(found.query_M[matches].tolist())
        by_category: collections.Counter[int] = collections.Counter()
        for query, hits in by_query.items():
            tally.add_hits(f"query:{names[query]}", hits)
            by_category.update(dict.fromkeys(self._queries.categories_of[query], hits))
        for category, hits in by_category.items():
            tally.add_hits(f"category:{self._queries.categories[category]}", hits)
        tally.add_hits(ALL, len(matches))
        top = self._settings.top
        if not top or (len(tally.top) == top and len(matches) < tally.top[-1].hits):
            return
        number, identity, score = facts
        counts = tuple((names[query], hits) for query, hits in by_query.most_common())
        excerpt = self._excerpt(found, matches) if self._settings.show_text else ""
        document = TopDocument(len(matches), self._piece.path, number, identity, score, counts, excerpt)
        tally.add_top([document], top)

    @staticmethod
    def _excerpt(found: Found, matches: list[int]) -> str:
        at = int(found.position_M[matches].min())
        start = max(found.normal.rfind(b"\n", 0, at) + 1, at - _EXCERPT_BYTES)
        stop = min(found.normal.find(b"\n", at), at + 2 * _EXCERPT_BYTES)
        return found.normal[start:stop].decode("utf-8", "ignore")
