"""The order of a source's rows in an epoch: a permutation whose every entry can be computed by itself."""

import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

# Grain's cipher permutes at least 2^16 numbers and walks on until it meets one that is a row's: 70 us a row for 500
# rows, where sorting hashes takes less than that for all of them.
_SORTED_UP_TO_ROWS = 1 << 16
_KEPT_FROM_ROWS = 1 << 10


def shuffled_rows(
    seed: int, source: str, epoch: int, index_b: Int[np.ndarray, " b"], num_rows: int
) -> Int[np.ndarray, " b"]:
    """The rows at these places of the epoch. The places 0 to num_rows - 1 hold every row once."""
    key = _epoch_key(seed, source, epoch)
    if num_rows <= _SORTED_UP_TO_ROWS:
        return _sorted_order(key, num_rows)[index_b]
    return np.array([_ciphered(key, index, num_rows) for index in index_b.tolist()], np.int64)


class EpochOrders:
    """`shuffled_rows` of many sources at once: what a batch asks for costs about the same for one source and for many.

    The orders of the epochs under way lie end to end in one array. Only a source that enters another epoch is looked at
    by itself, and one that has too many rows for such an array or so few that it is in another epoch all the time.
    """

    def __init__(self, sources: Sequence[str], num_rows: Sequence[int]):
        """`num_rows` of each source's epoch."""
        self._sources, self._num_rows_N = tuple(sources), np.array(num_rows, np.int64)
        self._is_kept_N = (self._num_rows_N >= _KEPT_FROM_ROWS) & (self._num_rows_N <= _SORTED_UP_TO_ROWS)
        widths_N = np.where(self._is_kept_N, self._num_rows_N, 0)
        self._offset_N = np.cumsum(widths_N) - widths_N
        # Seed, the epoch of each source (-1: none yet) and the orders: replaced whole, for threads.
        self._kept = 0, np.full(len(self._sources), -1), np.zeros(int(widths_N.sum()), np.int32)

    def rows(
        self, seed: int, source_ids_b: Int[np.ndarray, " b"], stream_b: Int[np.ndarray, " b"]
    ) -> Int[np.ndarray, " b"]:
        """The store's row of each place in a source's stream, which counts rows from the start of the run."""
        epoch_b, index_b = np.divmod(stream_b, self._num_rows_N[source_ids_b])
        kept_seed, epoch_N, order = self._kept
        is_kept_b = (epoch_b == epoch_N[source_ids_b]) & (seed == kept_seed)
        place_b = self._offset_N[source_ids_b] + index_b
        if is_kept_b.all():
            return order[place_b].astype(np.int64)
        rows_b, others_b = np.empty(len(index_b), np.int64), ~is_kept_b
        rows_b[is_kept_b] = order[place_b[is_kept_b]]
        entered = {}
        for source in np.unique(source_ids_b[others_b]).tolist():
            chosen_b = others_b & (source_ids_b == source)
            for epoch in np.unique(epoch_b[chosen_b]).tolist():
                now_b = chosen_b & (epoch_b == epoch)
                rows_b[now_b] = self._order(seed, source, epoch, index_b[now_b])
            if self._is_kept_N[source]:
                entered[source] = epoch
        if entered:
            self._keep(seed, entered)
        return rows_b

    def _order(self, seed: int, source: int, epoch: int, index_b: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        return shuffled_rows(seed, self._sources[source], epoch, index_b, int(self._num_rows_N[source]))

    def _keep(self, seed: int, entered: Mapping[int, int]) -> None:
        """Puts the orders of these epochs, by source, in the place of those before."""
        kept_seed, epoch_N, order = self._kept
        epoch_N = epoch_N.copy() if seed == kept_seed else np.full_like(epoch_N, -1)
        order = order.copy()
        for source, epoch in entered.items():
            at, num_rows = int(self._offset_N[source]), int(self._num_rows_N[source])
            order[at : at + num_rows] = self._order(seed, source, epoch, np.arange(num_rows))
            epoch_N[source] = epoch
        self._kept = seed, epoch_N, order


def _ciphered(key: int, index: int, num_rows: int) -> int:
    largest = num_rows - 1
    if not largest & (largest - 1):  # a power of two: there Grain's cipher has one bit too few and loses a row
        largest += 1
    row = index_shuffle(index=index, max_index=largest, seed=key, rounds=4)
    while row >= num_rows:
        row = index_shuffle(index=row, max_index=largest, seed=key, rounds=4)
    return row


@functools.lru_cache(maxsize=256)
def _epoch_key(seed: int, source: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()[:4], "little")


@functools.lru_cache(maxsize=64)
def _sorted_order(key: int, num_rows: int) -> Int[np.ndarray, " rows"]:
    """Rows sorted by SplitMix64's output for the stream that starts at the key's own hash."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        start = _mix(np.array([key], np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        values = _mix(start + np.arange(1, num_rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(values, kind="stable").astype(np.int32)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
