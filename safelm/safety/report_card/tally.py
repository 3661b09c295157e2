"""Counts of one slice's documents; tallies of parts of a corpus add up to the corpus's tally."""

import collections
import dataclasses
import heapq
import json
from collections.abc import Iterable, Mapping
from typing import Any

from safelm.tags import MAX_SCORE

SCORES = (*(str(score) for score in range(MAX_SCORE + 1)), "unscored")
ALL = "all"


@dataclasses.dataclass
class Hits:
    """Occurrences of one query or category over documents d with h_d hits each.

    Attributes:
      hits: sum of h_d.
      documents: number of d with h_d > 0.
      squares: sum of h_d squared, for the interval.
      largest: greatest h_d.
    """

    hits: int = 0
    documents: int = 0
    squares: int = 0
    largest: int = 0

    def add(self, hits_in_document: int) -> None:
        self.hits += hits_in_document
        self.documents += 1
        self.squares += hits_in_document**2
        self.largest = max(self.largest, hits_in_document)

    def merge(self, other: "Hits") -> None:
        self.hits += other.hits
        self.documents += other.documents
        self.squares += other.squares
        self.largest = max(self.largest, other.largest)


@dataclasses.dataclass(frozen=True, order=True)
class TopDocument:
    """The place of a document with many hits, without its text.

    Attributes:
      excerpt: on request, words of the normal form around the first hit.
    """

    hits: int
    file: str
    row: int
    id: str
    score: str
    queries: tuple[tuple[str, int], ...]
    excerpt: str = dataclasses.field(default="", repr=False)


@dataclasses.dataclass
class Tally:
    """Counts over one slice's documents. Keys of `found`: "all", "category:NAME" and "query:NORMAL FORM"."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    bytes: int = 0
    documents_by_score: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tokens_by_score: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    found: dict[str, Hits] = dataclasses.field(default_factory=dict)
    top: list[TopDocument] = dataclasses.field(default_factory=list)

    def add_document(self, score: str, tokens: int, num_bytes: int) -> None:
        self.documents += 1
        self.empty += num_bytes == 0
        self.tokens += tokens
        self.bytes += num_bytes
        self.documents_by_score[score] += 1
        self.tokens_by_score[score] += tokens

    def add_hits(self, key: str, hits_in_document: int) -> None:
        self.found.setdefault(key, Hits()).add(hits_in_document)

    def add_top(self, documents: Iterable[TopDocument], keep: int) -> None:
        """Keeps the documents with the most hits; ties go by file and row, so the order of adding doesn't matter."""
        self.top = heapq.nsmallest(keep, [*self.top, *documents], key=lambda one: (-one.hits, one.file, one.row))

    def merge(self, other: "Tally", keep: int) -> None:
        self.documents += other.documents
        self.empty += other.empty
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.documents_by_score.update(other.documents_by_score)
        self.tokens_by_score.update(other.tokens_by_score)
        for key, hits in other.found.items():
            self.found.setdefault(key, Hits()).merge(hits)
        self.add_top(other.top, keep)


@dataclasses.dataclass
class Count:
    """The counts of files or of a part of one: a tally per slice, and statistics of reading.

    Attributes:
      score_columns: number of rows whose harm score came from each column.
      passed_over: number of unscored rows with each column that may be mistaken for a harm score.
    """

    tallies: dict[str, Tally] = dataclasses.field(default_factory=dict)
    rows: int = 0
    malformed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unusable_scores: int = 0
    score_columns: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    passed_over: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def merge(self, other: "Count", keep: int) -> None:
        for name, tally in other.tallies.items():
            self.tallies.setdefault(name, Tally()).merge(tally, keep)
        self.rows += other.rows
        self.malformed.update(other.malformed)
        self.unusable_scores += other.unusable_scores
        self.score_columns.update(other.score_columns)
        self.passed_over.update(other.passed_over)

    def to_json(self) -> str:
        return json.dumps(self, default=vars)

    @classmethod
    def from_json(cls, text: str) -> "Count":
        """Reads what `to_json` returned. Raises ValueError, KeyError or TypeError for other text."""
        value = json.loads(text)
        tallies = {name: _tally(facts) for name, facts in value["tallies"].items()}
        counters = {name: collections.Counter(value[name]) for name in ("malformed", "score_columns", "passed_over")}
        return cls(tallies=tallies, rows=value["rows"], unusable_scores=value["unusable_scores"], **counters)


def _tally(facts: Mapping[str, Any]) -> Tally:
    top = [TopDocument(**{**one, "queries": tuple(map(tuple, one["queries"]))}) for one in facts["top"]]
    counters = {name: collections.Counter(facts[name]) for name in ("documents_by_score", "tokens_by_score")}
    found = {key: Hits(**hits) for key, hits in facts["found"].items()}
    return Tally(**{**facts, **counters, "found": found, "top": top})
