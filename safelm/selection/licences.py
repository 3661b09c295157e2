"""The licences of rows, which a data card counts; they decide nothing about a row, so any value will do."""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from safelm import documents
from safelm.selection.settings import NONE

OTHER = "(other)"
MAX_OF_SHARD, MAX_OF_CARD = 1000, 100  # different ones; further ones are counted together
_MAX_CHARACTERS = 100
COUNTS = ("documents_read", "tokens_read", "documents", "tokens")


class ShardLicences:
    """The licences of a shard's rows so far.

    Attributes:
      rows: by name how many rows have it.
    """

    def __init__(self, columns: Sequence[str]):
        self._columns = columns
        self.rows: collections.Counter[str] = collections.Counter()
        self._places: dict[str, int] = {}
        self._place: list[int] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes the licence of the next row: the value of the first column that has one."""
        found = (documents.field(row, column) for column in self._columns)
        name = _name(next((value for value in found if value is not None), None))
        if name not in self._places and len(self._places) >= MAX_OF_SHARD:
            name = OTHER
        self._place.append(self._places.setdefault(name, len(self._places)))
        self.rows[name] += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Each row's place in `named`; nothing where no column is read."""
        return {"licence": np.array(self._place, np.uint16)} if self._columns else {}

    def named(self) -> list[tuple[str, int]]:
        """The names in their places, with the number of rows."""
        return [(name, self.rows[name]) for name in self._places] if self._columns else []


class CorpusLicences:
    """Counts by licence over all shards: the most frequent ones by name, the others together."""

    def __init__(self, named: Mapping[str, Sequence[Sequence[Any]]]):
        """`named`: by shard what `ShardLicences.named` gave."""
        rows: collections.Counter[str] = collections.Counter()
        for found in named.values():
            for name, count in found:
                rows[name] += count
        del rows[OTHER]
        frequent = sorted(rows, key=lambda name: (-rows[name], name))[:MAX_OF_CARD]
        places = {name: at for at, name in enumerate([*frequent, OTHER])}
        self._names = list(places)
        self._place_of = {
            shard: np.array([places.get(name, places[OTHER]) for name, _ in found], np.int64)
            for shard, found in named.items()
        }
        self._count_LC = np.zeros((len(places), len(COUNTS)), np.int64)

    def add(
        self,
        shard: str,
        arrays: Mapping[str, np.ndarray],
        tokens_N: Int[np.ndarray, " N"],
        is_selected_N: np.ndarray,
    ) -> None:
        """Counts a shard's rows."""
        if "licence" not in arrays:
            return
        place_N = self._place_of[shard][arrays["licence"]]
        ones_N = np.ones(len(place_N), np.int64)
        columns = (ones_N, tokens_N, ones_N * is_selected_N, tokens_N * is_selected_N)
        for column, count_N in enumerate(columns):
            np.add.at(self._count_LC[:, column], place_N, count_N)

    def counts(self) -> dict[str, dict[str, int]]:
        """By name, in alphabetical order, what was read and what was selected; {} where no column was read."""
        found = zip(self._names, self._count_LC.tolist(), strict=True)
        return {name: dict(zip(COUNTS, counts, strict=True)) for name, counts in sorted(found) if counts[0]}


def _name(value: Any) -> str:
    """Any value in at most 100 characters: lists joined, structures as JSON."""
    if isinstance(value, Mapping):
        value = json.dumps(value, sort_keys=True, default=str)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        value = ", ".join(str(each) for each in value if each is not None)
    text = "" if value is None else str(value).encode("utf-8", "replace").decode()
    text = " ".join(text.split())
    return (text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…") or NONE
