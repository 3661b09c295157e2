"""Rows of a store of windows: each is one window as it was cut elsewhere, never cut or packed again.

A window of T + 1 tokens is a row of T positions: its inputs are the first T tokens, its targets the last T, as in
Megatron. A token right behind an end-of-document token begins a new piece (position 0, attention from there on), and
what follows the window's `real_tokens` is padding.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from safelm.data.channels import REAL_TOKENS
from safelm.data.rows import Pieces
from safelm.data.store import TokenStore
from safelm.data.stream import Stream


class WindowRows:
    """A row for every window, with an index of 16 bytes each."""

    def __init__(self, store: TokenStore, seq_len: int):
        """`seq_len` in tokens; ValueError names a window that is longer than a row, or too short to have a target."""
        self.store, self.seq_len = store, int(seq_len)
        bounds = [shard + at for shard, at in zip(store.shard_bounds, store.token_offsets[:-1], strict=True)]
        self._start = np.concatenate([shard[:-1] for shard in bounds])
        self._stop = np.concatenate([shard[1:] for shard in bounds])
        if any(channel.name == REAL_TOKENS.name for channel in store.channels):
            real = store.channel(REAL_TOKENS.name).astype(np.int64)
            self._stop = np.where(real > 0, np.minimum(self._start + real, self._stop), self._stop)
        self.num_rows = len(self._start)
        length = self._stop - self._start
        for row in (int(np.argmax(length)), int(np.argmin(length))):
            if not 2 <= length[row] <= self.seq_len + 1:
                raise ValueError(
                    f"{store.url or store.directory}: window {row} has {length[row]} tokens, a row of seq_len "
                    f"{self.seq_len} holds 2 to {self.seq_len + 1} and no window is cut: set seq_len by them"
                )

    @staticmethod
    def pieces(
        plans: Sequence["WindowRows"],
        stream: Stream,
        source_ids_b: Int[np.ndarray, " b"],
        rows_b: Int[np.ndarray, " b"],
    ) -> Pieces:
        """The pieces of the given rows."""
        seq_len = plans[0].seq_len
        chosen = list(zip(source_ids_b.tolist(), rows_b.tolist(), strict=True))
        start_b = np.array([stream.store_start[source] + plans[source]._start[row] for source, row in chosen])
        stop_b = np.array([stream.store_start[source] + plans[source]._stop[row] for source, row in chosen])
        shard_b = stream.find_shards(start_b)
        stream.prefetch(shard_b, start_b, stop_b)
        starts, lengths, begins = [], [], []
        for start, stop, shard in zip(start_b.tolist(), stop_b.tolist(), shard_b.tolist(), strict=True):
            at = start - int(stream.shard_start[shard])
            ended = np.flatnonzero(np.asarray(stream.tokens[shard][at : at + stop - start - 1]) == stream.eos_id[shard])
            first_token_ends = len(ended) and ended[0] == 0
            piece_start = ended if first_token_ends else np.concatenate([[0], ended])
            starts.append(start + 1 + piece_start)
            lengths.append(np.diff(piece_start, append=stop - start - 1))
            begins.append(np.arange(len(piece_start)) >= (0 if first_token_ends else 1))
        row = np.repeat(np.arange(len(chosen)), [len(each) for each in starts])
        start = np.concatenate(starts)
        place = row * seq_len + start - (start_b[row] + 1)
        return Pieces(place, shard_b[row], start, np.concatenate(lengths), np.concatenate(begins))
