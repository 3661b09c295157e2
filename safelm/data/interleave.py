"""Places the sources' rows within a global batch so that every part of it is a fair sample of the mixture.

Hosts take contiguous shares of a batch, gradient accumulation takes contiguous or strided ones of those. The rows
of a batch are therefore laid out along a digital net: for a batch of 2^m rows any aligned contiguous share of 2^k
rows holds each source's proportion to within one row, any strided share (row mod 2^k) to within two. Other batch
sizes use the golden ratio's sequence, within three rows for contiguous shares (measured up to 1,024 rows). The
layout is turned by a hash of the step, so a source with less than a row per host visits all hosts alike.
"""

import functools

import numpy as np
from jaxtyping import Int

_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def arrange(counts: Int[np.ndarray, " sources"], step: int) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """For each row of the batch: its source, and how many earlier rows of the batch have that source."""
    batch_size = int(counts.sum())
    by_slot = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    source_ids_B = by_slot[(_slots(batch_size) + _hash64(step) % batch_size) % batch_size]
    order = np.argsort(source_ids_B, kind="stable")
    ranks_B = np.empty(batch_size, np.int64)
    ranks_B[order] = np.arange(batch_size) - np.repeat(np.cumsum(counts) - counts, counts)
    return source_ids_B, ranks_B


@functools.lru_cache(maxsize=8)
def _slots(batch_size: int) -> Int[np.ndarray, " B"]:
    """A permutation whose aligned contiguous and strided parts are evenly spread over 0..batch_size - 1."""
    rows = np.arange(batch_size)
    if batch_size & (batch_size - 1):
        keys = rows.astype(np.uint64) * np.uint64(_GOLDEN_RATIO)  # modulo 2^64
        slots = np.empty(batch_size, np.int64)
        slots[np.argsort(keys, kind="stable")] = rows
        return slots
    # The second coordinate of the Sobol' sequence: its generator is Pascal's triangle modulo 2, in which the first
    # r rows of any r neighbouring columns are invertible. C(column, row) is odd if row's bits are among column's.
    bits, slots = batch_size.bit_length() - 1, np.zeros(batch_size, np.int64)
    for row in range(bits):
        parity = np.zeros(batch_size, np.int64)
        for column in range(bits):
            if column & row == row:
                parity ^= (rows >> column) & 1
        slots |= parity << (bits - 1 - row)
    return slots


def _hash64(value: int) -> int:
    """SplitMix64: an even spread of consecutive integers over 64 bits."""
    mask = (1 << 64) - 1
    value = (value + 1) * _GOLDEN_RATIO & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31
