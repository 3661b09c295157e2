"""The order of a source's rows in an epoch: a permutation whose every entry can be computed by itself."""

import functools
import hashlib

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

# Grain's cipher permutes at least 2^16 numbers and walks on until it meets one that is a row's: 70 us a row for 500
# rows, where sorting hashes takes less than that for all of them.
_SORTED_UP_TO_ROWS = 1 << 16


def shuffled_rows(
    seed: int, source: str, epoch: int, index_b: Int[np.ndarray, " b"], num_rows: int
) -> Int[np.ndarray, " b"]:
    """The rows at these places of the epoch. The places 0 to num_rows - 1 hold every row once."""
    key = _epoch_key(seed, source, epoch)
    if num_rows <= _SORTED_UP_TO_ROWS:
        return _sorted_order(key, num_rows)[index_b]
    return np.array([_ciphered(key, index, num_rows) for index in index_b.tolist()], np.int64)


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
