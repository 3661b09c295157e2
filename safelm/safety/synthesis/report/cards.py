"""The report cards of sources and published texts, and their difference (Maini et al. 2025, section 3.5).

A published text counts with its own score (`text_harm_score`), a source with its original one.
"""

from collections.abc import Sequence
from typing import Any

from safelm.jobs import beam_runner
from safelm.jobs.output import OutputFolder
from safelm.safety.report_card import card, corpus, difference
from safelm.safety.report_card import queries as query_sets
from safelm.safety.report_card.corpus import Counted, SliceInput
from safelm.safety.report_card.counting import Counter, CountSettings, Piece
from safelm.safety.report_card.tally import Count
from safelm.safety.synthesis.kinds import Source

SOURCES, PUBLISHED = "sources", "published"
COUNTS_FOLDER = "_counted"
_SETTINGS = CountSettings()


class SourceCounter:
    """Counts the source texts of a shard.

    Attributes:
      documents: the number of sources.
    """

    def __init__(self, path: str):
        self.documents = 0
        self._counter = Counter(Piece(SOURCES, path, 0), _SETTINGS)

    def add(self, row: int, source: Source) -> None:
        """Counts a source; `row` is its place in its file."""
        self.documents += 1
        self._counter.add(row, {"id": source.id, "text": source.text, "harm_score": source.harm_score})

    def to_json(self) -> str:
        """The counts for the shard's record."""
        self._counter.flush()
        return self._counter.count.to_json()


def sources_card(counts: Sequence[str], paths: Sequence[str]) -> dict[str, Any]:
    """The card of all sources from the counts of `SourceCounter` in each shard."""
    whole = Count()
    for text in counts:
        whole.merge(Count.from_json(text), _SETTINGS.top)
    return _card(SliceInput(SOURCES, tuple(paths)), Counted(files=len(paths), count=whole))


def published_card(out: OutputFolder, files: Sequence[str], runner: beam_runner.Runner) -> dict[str, Any] | None:
    """The card of the published files, or None without files. Its counts are kept until `forget`."""
    if not files:
        return None
    one = SliceInput(PUBLISHED, tuple(out.path(name) for name in files))
    (counted,) = corpus.count_corpus([one], _SETTINGS, out.path(COUNTS_FOLDER), runner)
    return _card(one, counted)


def forget(out: OutputFolder) -> None:
    """Removes the counts that `published_card` kept."""
    corpus.forget(out.path(COUNTS_FOLDER))


def compare(before: dict[str, Any], after: dict[str, Any] | None) -> dict[str, Any] | None:
    """The difference of the two cards; None without the second."""
    if after is None:
        return None
    return difference.compare(before | {"path": SOURCES}, after | {"path": PUBLISHED})


def _card(one: SliceInput, counted: Counted) -> dict[str, Any]:
    return card.build([one], [counted], query_sets.load_queries(None), _SETTINGS)
