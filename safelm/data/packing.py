"""Packing whole documents into rows: no document that fits a row is ever cut.

Documents are taken in windows of the store's order and placed best-fit, longest first: each goes into the fullest
row of the window that still has room for it. A document longer than a row is cut into full rows; what is left of it
is placed like a short document. Deterministic, O(n log n), and each shard is packed by itself.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from safelm.data.rows import ConcatRows, Pieces, RowPlan
from safelm.data.store import TokenStore
from safelm.data.stream import Stream
from safelm.data.windows import WindowRows

WINDOW_PIECES = 4096


class FitRows:
    """Rows of whole documents, from an index of 13 bytes a piece built when the store is opened."""

    def __init__(self, store: TokenStore, seq_len: int):
        """`seq_len` in tokens; packing takes about a microsecond a document."""
        self.store, self.seq_len = store, int(seq_len)
        shards = [_pack_shard(bounds, self.seq_len) for bounds in store.shard_bounds]
        offsets = store.token_offsets[:-1]
        self._start = np.concatenate([start + at for (start, *_), at in zip(shards, offsets, strict=True)])
        self._length = np.concatenate([length for _, length, _, _ in shards])
        self._begins = np.concatenate([begins for _, _, begins, _ in shards])
        row_sizes = np.concatenate([row_sizes for *_, row_sizes in shards])
        self._row_first = np.concatenate([[0], np.cumsum(row_sizes)])
        self.num_rows = len(row_sizes)

    @staticmethod
    def pieces(
        plans: Sequence["FitRows"], stream: Stream, source_ids_b: Int[np.ndarray, " b"], rows_b: Int[np.ndarray, " b"]
    ) -> Pieces:
        """The pieces of the given rows."""
        offsets = stream.store_start.tolist()
        counts, offset, start, length, begins = [], [], [], [], []
        for source, row in zip(source_ids_b.tolist(), rows_b.tolist(), strict=True):
            plan = plans[source]
            first, stop = plan._row_first[row : row + 2].tolist()
            counts.append(stop - first)
            offset.append(offsets[source])
            start.append(plan._start[first:stop])
            length.append(plan._length[first:stop])
            begins.append(plan._begins[first:stop])
        counts_b = np.array(counts)
        row = np.repeat(np.arange(len(counts_b)), counts_b)
        start = np.concatenate(start) + np.array(offset)[row]
        length = np.concatenate(length).astype(np.int64)
        before = np.cumsum(length) - length
        place = row * plans[0].seq_len + before - before[np.cumsum(counts_b) - counts_b][row]
        return Pieces(place, stream.find_shards(start), start, length, np.concatenate(begins))


PACKINGS: Mapping[str, Callable[[TokenStore, int], RowPlan]] = {
    "concat": ConcatRows,
    "fit": FitRows,
    "window": WindowRows,
}


def make_rows(store: TokenStore, seq_len: int, packing: str = "concat") -> RowPlan:
    """The row plan named by `packing`: "concat", "fit" or, for a store of windows and only that, "window".

    ValueError for another name, a `seq_len` below 1, or a packing that doesn't go with the store.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {sorted(PACKINGS)}, got {packing!r}")
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1 token, got {seq_len}")
    if (unit := store.manifest.unit) != ("window" if packing == "window" else "document"):
        place = store.url or store.directory
        wanted = "packing 'window' keeps them" if unit == "window" else "they have no rows: choose concat or fit"
        raise ValueError(f"packing is {packing!r}, but {place} holds {unit}s: {wanted}")
    return PACKINGS[packing](store, seq_len)


def _pack_shard(bounds: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of a shard in the order of its rows (start, length, begins), and the number of pieces of each row."""
    document_start, length = bounds[:-1], np.diff(bounds)
    full = np.where(length > seq_len, length // seq_len, 0)
    index = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    full_start = np.repeat(document_start, full) + index * seq_len
    rest_start, rest = document_start + full * seq_len, length - full * seq_len
    has_rest = rest > 0
    rest_start, rest, rest_begins = rest_start[has_rest], rest[has_rest], full[has_rest] == 0
    row, num_rows = np.empty(len(rest), np.int64), 0
    for at in range(0, len(rest), WINDOW_PIECES):
        window, used = best_fit(rest[at : at + WINDOW_PIECES], seq_len)
        row[at : at + WINDOW_PIECES] = window + num_rows
        num_rows += used
    order = np.lexsort((-rest, row))
    start = np.concatenate([full_start, rest_start[order]])
    lengths = np.concatenate([np.full(len(full_start), seq_len, np.int32), rest[order].astype(np.int32)])
    begins = np.concatenate([index == 0, rest_begins[order]])
    row_sizes = np.concatenate([np.ones(len(full_start), np.int64), np.bincount(row, minlength=num_rows)])
    return start, lengths, begins, row_sizes


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each piece when placed longest first into the fullest row that has room, and the rows used."""
    order = np.argsort(-lengths, kind="stable")
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by their free positions
    occupied, num_rows, rows = 0, 0, []  # bit i of `occupied`: some row has i free positions
    for length in lengths[order].tolist():
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
        else:
            room, row, num_rows = capacity, num_rows, num_rows + 1
        rows.append(row)
        if room > length:
            with_room[room - length].append(row)
            occupied |= 1 << (room - length)
    result = np.empty(len(lengths), np.int64)
    result[order] = rows
    return result, num_rows
