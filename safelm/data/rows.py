"""Rows of a token store for a sequence length: which pieces of which documents make up a row, and their arrays.

A piece is a run of one document's tokens inside a row. Targets are the stored tokens; a position's input is the token
before its target in the same document, and before a document's first token the end-of-document token. So a row's
targets are the stored tokens that it is cut from, every stored token is a target exactly once an epoch, nothing is
predicted across documents, and a model learns to begin a text behind an end-of-document token. A run of a model whose
texts begin with another id has that one there; a document that brings it (from a chat template, say) begins with its
own, and the place before, which would hold it twice, is padding. A piece that goes on
with a document begins with the input that the piece before it ended with as a target. Positions start at 0 with every
piece; segment ids count a row's pieces from 1, and 0 is padding. A token's numbers in the store's channels stand where
it is the target; one whose loss weight is 0 (in a chat what the user says) is no target.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from safelm.data.store import TokenStore
from safelm.data.stream import Stream


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of a batch in the order of their places.

    Attributes:
      place: of the first token, in the batch's rows laid end to end.
      shard: number of the shard in the stream of all stores.
      start: first token in that stream.
      length: in tokens.
      begins: whether the document begins with the piece.
    """

    place: Int[np.ndarray, " pieces"]
    shard: Int[np.ndarray, " pieces"]
    start: Int[np.ndarray, " pieces"]
    length: Int[np.ndarray, " pieces"]
    begins: Bool[np.ndarray, " pieces"]


@runtime_checkable
class RowPlan(Protocol):
    """How a store is cut into rows of `seq_len` positions; a pure function of the store and `seq_len`."""

    store: TokenStore
    seq_len: int
    num_rows: int

    @staticmethod
    def pieces(
        plans: Sequence["RowPlan"], stream: Stream, source_ids_b: Int[np.ndarray, " b"], rows_b: Int[np.ndarray, " b"]
    ) -> Pieces:
        """The pieces of rows of several plans of this kind, given by plan and row; `stream` is that of their stores."""


class ConcatRows:
    """Concatenate and split: row r is tokens [r * seq_len, (r + 1) * seq_len) of the store's stream of documents.

    Only the last row has padding. Documents are found by binary search in the store's bounds; there is no index.
    """

    def __init__(self, store: TokenStore, seq_len: int):
        """`seq_len` in tokens."""
        self.store, self.seq_len = store, int(seq_len)
        self.num_rows = -(-store.num_tokens // self.seq_len)

    @staticmethod
    def pieces(
        plans: Sequence[RowPlan], stream: Stream, source_ids_b: Int[np.ndarray, " b"], rows_b: Int[np.ndarray, " b"]
    ) -> Pieces:
        """The pieces of the given rows; what they need for many plans they need for one."""
        seq_len = plans[0].seq_len
        row_start_b = stream.store_start[source_ids_b] + rows_b * seq_len
        stop = np.minimum(row_start_b + seq_len, stream.store_start[source_ids_b + 1])
        row, shard, start, stop = _cut_at_shards(stream, row_start_b, stop)
        ends, counts, document_start = stream.document_ends(shard, start, stop)
        run, first = np.repeat(np.arange(len(row)), counts), np.cumsum(counts) - counts
        piece_stop = np.minimum(ends, stop[run])
        piece_start, begins = np.empty_like(piece_stop), np.ones(len(run), bool)
        piece_start[1:] = piece_stop[:-1]
        piece_start[first] = start
        begins[first] = document_start == start
        row = row[run]
        place = row * seq_len + piece_start - row_start_b[row]
        return Pieces(place, shard[run], piece_start, piece_stop - piece_start, begins)


def _cut_at_shards(stream: Stream, start_b: np.ndarray, stop_b: np.ndarray) -> tuple[np.ndarray, ...]:
    """Row, shard, start and stop of the parts of rows that each lie in one shard."""
    first_b, last_b = stream.find_shards(start_b), stream.find_shards(stop_b - 1)
    row = np.arange(len(start_b))
    if (first_b == last_b).all():
        return row, first_b, start_b, stop_b
    counts_b = last_b - first_b + 1
    row = np.repeat(row, counts_b)
    shard = np.arange(len(row)) - np.repeat(np.cumsum(counts_b) - counts_b - first_b, counts_b)
    start = np.maximum(start_b[row], stream.shard_start[shard])
    stop = np.minimum(stop_b[row], stream.shard_start[shard + 1])
    real = start < stop  # some shards are empty
    return row[real], shard[real], start[real], stop[real]
