"""Finds all queries in many documents in one pass: an Aho-Corasick automaton (`ahocorasick_rs`) over normal forms."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from safelm.safety.report_card import normal_form
from safelm.safety.report_card.queries import QuerySet

WINDOW_BYTES = 4 << 20  # matches are collected for so much text at a time, whatever a document's length


@dataclasses.dataclass(frozen=True)
class Found:
    """Words of each of D documents in a batch, and the M matches as (document, query)."""

    words_D: Int64[np.ndarray, " D"]
    document_M: Int64[np.ndarray, " M"]
    query_M: Int64[np.ndarray, " M"]
    position_M: Int64[np.ndarray, " M"]
    normal: bytes = dataclasses.field(repr=False)


class Matcher:
    """Finds the queries of a QuerySet by the rules of `normal_form`."""

    def __init__(self, queries: QuerySet):
        try:
            import ahocorasick_rs
        except ModuleNotFoundError as error:
            raise OSError("the report card needs ahocorasick_rs: scripts/install.sh scoring") from error
        patterns = queries.patterns()
        self._automaton = ahocorasick_rs.BytesAhoCorasick(
            [pattern for pattern, _ in patterns], implementation=ahocorasick_rs.Implementation.DFA
        )
        self._query_of = [query for _, query in patterns]
        self._longest = max(len(pattern) for pattern, _ in patterns)

    def find(self, texts: Sequence[str]) -> Found:
        """Every occurrence of every query in each text, and each text's number of words."""
        data = normal_form.normal(texts)
        ends_D = np.flatnonzero(np.frombuffer(data, np.uint8) == normal_form.END[0])
        starts, stops = normal_form.starts_of_words(data), ends_D.tolist()
        words = [np.count_nonzero(starts[start:stop]) for start, stop in zip([0, *stops], stops, strict=False)]
        matches = self._matches(data)
        position_M = np.array([start for _, start in matches], np.int64)
        return Found(
            words_D=np.array(words, np.int64),
            document_M=np.searchsorted(ends_D, position_M).astype(np.int64),
            query_M=np.array([query for query, _ in matches], np.int64),
            position_M=position_M,
            normal=data,
        )

    def _matches(self, data: bytes) -> list[tuple[int, int]]:
        """(query, start) of the matches of whole words."""
        view, found = memoryview(data), []
        word = normal_form.FIRST_WORD_BYTE
        for at in range(0, len(data), WINDOW_BYTES):
            window = view[at : at + WINDOW_BYTES + self._longest - 1]
            for pattern, start, stop in self._automaton.find_matches_as_indexes(window, overlapping=True):
                start, stop = start + at, stop + at
                own = start < at + WINDOW_BYTES
                if own and data[stop] < word and (start == 0 or data[start - 1] < word):
                    found.append((self._query_of[pattern], start))
        return found
