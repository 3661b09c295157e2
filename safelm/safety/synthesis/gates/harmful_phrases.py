"""Counts the report card's harmful n-grams in pieces of text."""

from collections.abc import Sequence

import numpy as np

from safelm.safety.report_card import queries as query_sets
from safelm.safety.report_card.matching import Matcher


class HarmfulPhrases:
    """Counts the n-grams of a query list: the report card's, or your own (a JSON file)."""

    def __init__(self, path: str | None = None):
        queries = query_sets.load_queries(path)
        self.fingerprint = queries.sha256
        self._matcher = Matcher(queries)

    def hits(self, texts: Sequence[str]) -> list[int]:
        """The number of occurrences of the n-grams in each text."""
        if not texts:
            return []
        found = self._matcher.find(texts)
        return np.bincount(found.document_M, minlength=len(texts)).tolist()
