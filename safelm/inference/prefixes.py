"""Beginnings of prompts whose keys and values are kept: rubrics, system messages, chats that go on.

What is kept are whole rows, found by their tokens: a prompt starts from the row that it shares the most tokens with,
whichever these are, since what stands at the beginning of a row doesn't depend on what follows.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from safelm.inference.kv_cache import Cache

SHORTEST_SHARED = 32  # tokens, below which looking at another row costs more than reading them


@dataclasses.dataclass(frozen=True, eq=False)
class Behind:
    """What stands before tokens that are yet to be read: the first `length` positions of a row."""

    cache: Cache
    length: int

    def is_same(self, other: "Behind | None") -> bool:
        """Whether tokens behind both can be read together."""
        return other is not None and self.cache is other.cache and self.length == other.length


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    ids_T: Int32[np.ndarray, " T"]
    cache: Cache
    is_pinned: bool

    def shared_with(self, ids_T: Int32[np.ndarray, " T"]) -> int:
        """The number of tokens at the beginning of both."""
        length = min(len(self.ids_T), len(ids_T))
        differs_T = self.ids_T[:length] != ids_T[:length]
        return int(differs_T.argmax()) if differs_T.any() else length


class Prefixes:
    """The rows that an engine keeps: pinned ones until they are dropped, others until newer ones need their room.

    Attributes:
      num_asked, num_found: prompts that looked for a beginning, and those that found one.
      num_tokens_found: tokens that these didn't have to read.
    """

    def __init__(self, most_tokens: int = 0):
        """`most_tokens`: positions of all rows that aren't pinned together; 0 keeps pinned ones only."""
        self._most_tokens = most_tokens
        self._kept: dict[int, _Kept] = {}  # the least recently used first
        self._numbers = itertools.count()
        self.num_asked = self.num_found = self.num_tokens_found = 0

    @property
    def num_tokens(self) -> int:
        """Number of cache positions of the rows that aren't pinned."""
        return sum(kept.cache.max_len for kept in self._kept.values() if not kept.is_pinned)

    def wants(self, ids: Sequence[int], max_len: int) -> bool:
        """Whether a row of `max_len` positions would be kept: it is long enough, fits, and no kept one begins so."""
        if not SHORTEST_SHARED <= len(ids) or max_len > self._most_tokens:
            return False
        ids_T = np.asarray(ids, np.int32)
        return all(kept.is_pinned or kept.shared_with(ids_T) < len(ids) for kept in self._kept.values())

    def pin(self, ids: Sequence[int], cache: Cache) -> None:
        """Keeps a row until it is dropped."""
        self._kept[next(self._numbers)] = _Kept(np.asarray(ids, np.int32), cache, is_pinned=True)

    def add(self, ids: Sequence[int], cache: Cache) -> None:
        """Keeps a row that is wanted; rows that it goes on from, and the least recently used, make room for it."""
        ids_T = np.asarray(ids, np.int32)
        for number, kept in list(self._kept.items()):
            if not kept.is_pinned and kept.shared_with(ids_T) == len(kept.ids_T):
                del self._kept[number]
        left = self.num_tokens + cache.max_len - self._most_tokens
        for number, kept in list(self._kept.items()):
            if left > 0 and not kept.is_pinned:
                left -= kept.cache.max_len
                del self._kept[number]
        self._kept[next(self._numbers)] = _Kept(ids_T, cache, is_pinned=False)

    def is_pinned(self, ids: Sequence[int]) -> bool:
        """Whether exactly this row is pinned."""
        return any(kept.is_pinned and kept.ids_T.tolist() == list(ids) for kept in self._kept.values())

    def unpin(self, ids: Sequence[int]) -> None:
        """Drops a pinned row; prompts that start from it aren't affected."""
        self._kept = {
            number: kept
            for number, kept in self._kept.items()
            if not (kept.is_pinned and kept.ids_T.tolist() == list(ids))
        }

    def longest(self, prompt: Sequence[int]) -> Behind | None:
        """The most tokens of a prompt, but its last, that a row begins with; of a pinned row all or nothing."""
        ids_T, best = np.asarray(prompt[:-1], np.int32), (0, -1)
        for number, kept in self._kept.items():
            shared = kept.shared_with(ids_T)
            least = len(kept.ids_T) if kept.is_pinned else SHORTEST_SHARED
            best = max(best, (shared, number)) if shared >= least else best
        length, number = best
        if number < 0:
            return None
        return Behind(self._kept[number].cache, length)

    def count(self, behind: Behind | None) -> None:
        """Counts a prompt that asked, and moves the row that it found to the end of the queue to be dropped."""
        self.num_asked += 1
        if behind is None:
            return
        self.num_found, self.num_tokens_found = self.num_found + 1, self.num_tokens_found + behind.length
        number = next((number for number, kept in self._kept.items() if kept.cache is behind.cache), None)
        if number is not None:
            self._kept[number] = self._kept.pop(number)
