"""Rows of a token store for a sequence length: which pieces of which documents make up a row, and their arrays.

A piece is a run of one document's tokens inside a row. Inputs are the stored tokens; a token's target is the next
token of the same document. The last position of a row whose document goes on still has its target (the store is read
one token further), and a document's last token has none, so every document's tokens 2..n are a target exactly once
an epoch and nothing is predicted across documents. There is no begin-of-document token: a first token is never a
target. Positions start at 0 with every piece; segment ids count a row's pieces from 1, and 0 is padding. Where a store
says which tokens are to be learned (a chat's assistant), only those are targets.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from safelm.data.store import TokenStore


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces in row-major order: which of the asked rows, column in it, first token in the store, length (tokens),
    and whether the document goes on after the piece. Every row has a piece at column 0."""

    row: Int[np.ndarray, " pieces"]
    column: Int[np.ndarray, " pieces"]
    start: Int[np.ndarray, " pieces"]
    length: Int[np.ndarray, " pieces"]
    goes_on: Bool[np.ndarray, " pieces"]


@runtime_checkable
class RowPlan(Protocol):
    """How a store is cut into rows of `seq_len` positions; a pure function of the store and `seq_len`."""

    store: TokenStore
    seq_len: int
    num_rows: int

    def pieces(self, rows: Int[np.ndarray, " b"]) -> Pieces:
        """The pieces of the given rows of the store."""


class ConcatRows:
    """Concatenate and split: row r is tokens [r * seq_len, (r + 1) * seq_len) of the store's stream of documents.

    Only the last row has padding. Documents are found by binary search in the store's bounds; there is no index.
    """

    def __init__(self, store: TokenStore, seq_len: int):
        """`seq_len` in tokens."""
        self.store, self.seq_len = store, int(seq_len)
        self.num_rows = -(-store.num_tokens // self.seq_len)

    def pieces(self, rows: Int[np.ndarray, " b"]) -> Pieces:
        """The pieces of the given rows of the store."""
        row_start = rows.astype(np.int64) * self.seq_len
        row_stop = np.minimum(row_start + self.seq_len, self.store.num_tokens)
        first, last = self.store.find_documents(row_start), self.store.find_documents(row_stop - 1)
        counts = last - first + 1
        row = np.repeat(np.arange(len(rows)), counts)
        documents = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts)
        document_start, document_stop = self.store.document_bounds(documents)
        start = np.maximum(document_start, row_start[row])
        stop = np.minimum(document_stop, row_stop[row])
        return Pieces(row, start - row_start[row], start, stop - start, document_stop > stop)


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a store that go into a batch, and the rows of the batch they fill."""

    plan: RowPlan
    rows: Int[np.ndarray, " b"]
    batch_rows: Int[np.ndarray, " b"]


def assemble(parts: Sequence[Part], batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    """The arrays of a batch from its parts; rows that no part fills are padding.

    Keys: inputs_BT, targets_BT, positions_BT, segment_ids_BT (int32), loss_mask_BT (float32, 1 where there is a
    target) and source_ids_B (int32, the part's index).
    """
    inputs = np.zeros(batch_size * seq_len, np.int32)
    source_ids_B = np.zeros(batch_size, np.int32)
    learned = np.ones(batch_size * seq_len, bool)
    placed = []
    for source, part in enumerate(parts):
        plan, batch_rows, pieces = part.plan, part.batch_rows, part.plan.pieces(part.rows)
        flat = batch_rows[pieces.row] * seq_len + pieces.column
        plan.store.prefetch(pieces.start, pieces.start + pieces.length + pieces.goes_on)
        _copy_tokens(plan.store, pieces, flat, inputs)
        if plan.store.has_loss_mask:
            _drop_unlearned(plan.store, pieces, flat, learned)
        after = np.zeros(len(flat), np.int32)
        after[pieces.goes_on] = plan.store.take((pieces.start + pieces.length)[pieces.goes_on])
        placed.append((batch_rows[pieces.row], flat, pieces.length, pieces.goes_on, after))
        source_ids_B[batch_rows] = source
    row, flat, length, goes_on, after = (np.concatenate(columns) for columns in zip(*placed, strict=True))
    order = np.argsort(flat)
    row, flat, length = row[order], flat[order], length[order]
    targets = np.zeros_like(inputs)
    targets[:-1] = inputs[1:]
    segments, positions = _spread(row, flat, length, len(inputs))
    mask = (segments > 0).astype(np.float32)
    ends = flat + length - 1
    targets[ends], mask[ends] = after[order], goes_on[order]
    mask[~learned] = 0
    targets[mask == 0] = 0
    arrays = {
        "inputs_BT": inputs,
        "targets_BT": targets,
        "positions_BT": positions,
        "segment_ids_BT": segments,
        "loss_mask_BT": mask,
    }
    batch = {name: array.reshape(batch_size, seq_len) for name, array in arrays.items()}
    return batch | {"source_ids_B": source_ids_B}


def _copy_tokens(store: TokenStore, pieces: Pieces, flat: np.ndarray, out: np.ndarray) -> None:
    """Copies every piece to its place in `out`, neighbours in one go."""
    if not len(flat):
        return
    shard = store.find_shards(pieces.start)
    joins = (pieces.start[1:] == pieces.start[:-1] + pieces.length[:-1]) & (flat[1:] == flat[:-1] + pieces.length[:-1])
    heads = np.flatnonzero(np.concatenate([[True], ~(joins & (shard[1:] == shard[:-1]))]))
    lengths = np.add.reduceat(pieces.length, heads)
    source = (pieces.start - store.token_offsets[shard])[heads]
    for to, start, length, index in zip(
        flat[heads].tolist(), source.tolist(), lengths.tolist(), shard[heads].tolist(), strict=True
    ):
        out[to : to + length] = store.shard_tokens[index][start : start + length]


def _drop_unlearned(store: TokenStore, pieces: Pieces, flat: np.ndarray, learned: np.ndarray) -> None:
    """Sets `learned` to False at the places whose target, the token one further, is not to be learned."""
    before = np.cumsum(pieces.length) - pieces.length
    index = np.arange(pieces.length.sum()) - np.repeat(before, pieces.length)
    target = np.repeat(pieces.start, pieces.length) + index + 1
    # Behind the store's last token there is nothing; that place has no target whatever is said of it here.
    mask = store.loss_mask(np.minimum(target, store.num_tokens - 1))
    learned[np.repeat(flat, pieces.length) + index] = mask


def _spread(row: np.ndarray, flat: np.ndarray, length: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of all `size` tokens from the pieces sorted by their place `flat`."""
    number = np.arange(1, len(row) + 1) - np.searchsorted(row, row)
    gap = np.diff(flat, append=size) - length  # padding between a piece and the next
    first = flat[0] if len(flat) else size  # padding before the first piece
    spans = np.concatenate([[first], np.stack([length, gap], axis=1).ravel()])
    segments = np.concatenate([[0], np.stack([number, np.zeros_like(number)], axis=1).ravel()])
    starts = np.concatenate([[0], np.repeat(flat, 2)])
    segments = np.repeat(segments.astype(np.int32), spans)
    positions = np.arange(size, dtype=np.int32) - np.repeat(starts.astype(np.int32), spans)
    if first or gap.any():
        positions[segments == 0] = 0
    return segments, positions
