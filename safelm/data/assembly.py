"""The arrays of a batch from rows of several stores.

inputs_BT, targets_BT, positions_BT, segment_ids_BT (int32), loss_mask_BT (float32, 1 where there is a target) and
source_ids_B (int32). See `safelm.data.rows` for what they hold.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from safelm.data.buffers import Buffers
from safelm.data.rows import Pieces, RowPlan
from safelm.data.store import MENDING
from safelm.data.stream import Stream

BATCH_FIELDS = ("inputs_BT", "targets_BT", "positions_BT", "segment_ids_BT", "loss_mask_BT")
_STRIP_TOKENS = 1 << 14  # what is computed at a time: 64 KiB, which stay in the processor's cache and in malloc's heap


class Assembly:
    """Makes batches of rows of several plans, all of one kind and of one `seq_len`."""

    def __init__(self, plans: Sequence[RowPlan]):
        """`plans` by source."""
        self.plans = tuple(plans)
        self._seq_len = plans[0].seq_len
        self._vocab_size = min(plan.store.manifest.vocab_size for plan in plans)
        self._stream, self._buffers = Stream([plan.store for plan in plans]), Buffers()

    def batch(
        self, source_ids_b: Int[np.ndarray, " b"], rows_b: Int[np.ndarray, " b"], batch_size: int
    ) -> dict[str, np.ndarray]:
        """The given rows of the sources' plans, then rows of padding up to `batch_size`."""
        arrays_5N = self._buffers.take(len(BATCH_FIELDS), batch_size * self._seq_len)
        if len(rows_b):
            self._fill(arrays_5N, type(self.plans[0]).pieces(self.plans, self._stream, source_ids_b, rows_b))
        else:
            arrays_5N.fill(0)
        batch = {name: array.reshape(batch_size, -1) for name, array in zip(BATCH_FIELDS, arrays_5N, strict=True)}
        batch["loss_mask_BT"] = batch["loss_mask_BT"].view(np.float32)
        source_ids_B = np.zeros(batch_size, np.int32)
        source_ids_B[: len(source_ids_b)] = source_ids_b
        return batch | {"source_ids_B": source_ids_B}

    def _fill(self, arrays_5N: np.ndarray, pieces: Pieces) -> None:
        inputs, targets, positions, segments, mask = arrays_5N
        mask = mask.view(np.float32)
        ends = pieces.place + pieces.length
        continued, before = self._copy_tokens(pieces, targets)
        self._check_ids(pieces, targets, before)
        inputs[1:] = targets[:-1]
        inputs[continued] = before
        inputs[pieces.place[pieces.begins]] = self._stream.eos_id[pieces.shard[pieces.begins]]
        mask.fill(1)
        self._drop_unlearned(pieces, targets, mask)
        _number(pieces, ends, self._seq_len, segments, positions)
        _clear_padding(pieces.place, ends, arrays_5N)

    def _copy_tokens(self, pieces: Pieces, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies each piece into place, merging adjacent ones; returns where runs go on with a document, and its token
        before each."""
        place, shard, start, length = pieces.place, pieces.shard, pieces.start, pieces.length
        stop = start + length
        heads = np.ones(len(place) + 1, bool)
        heads[1:-1] = (start[1:] != stop[:-1]) | (place[1:] != place[:-1] + length[:-1]) | (shard[1:] != shard[:-1])
        first, last = np.flatnonzero(heads[:-1]), np.flatnonzero(heads[1:])
        place, shard, start, stop = place[first], shard[first], start[first], stop[last]
        goes_on = ~pieces.begins[first]
        self._stream.prefetch(shard, start - goes_on, stop)
        local, length = start - self._stream.shard_start[shard], stop - start
        before, tokens = [], self._stream.tokens
        for to, at, count, number, continues in zip(
            place.tolist(), local.tolist(), length.tolist(), shard.tolist(), goes_on.tolist(), strict=True
        ):
            if continues:
                run = tokens[number][at - 1 : at + count]
                out[to : to + count] = run[1:]
                before.append(run[0])
            else:
                out[to : to + count] = tokens[number][at : at + count]
        return place[goes_on], np.array(before, np.int32)

    def _check_ids(self, pieces: Pieces, targets: np.ndarray, before: np.ndarray) -> None:
        """ValueError names the shard if a token is not in the vocabulary: the model would compute with garbage."""
        highest = max((int(array.view(np.uint32).max()) for array in (targets, before) if len(array)), default=0)
        if highest < self._vocab_size:
            return
        columns = (pieces.place, pieces.length, pieces.shard)
        for place, length, shard in zip(*(column.tolist() for column in columns), strict=True):
            token = int(targets[place : place + length].view(np.uint32).max())
            if token >= self._vocab_size:
                raise ValueError(
                    f"{self._stream.path(shard)}: damaged: token id {token}, the vocabulary has {self._vocab_size}; "
                    f"{MENDING}"
                )

    def _drop_unlearned(self, pieces: Pieces, targets: np.ndarray, mask: np.ndarray) -> None:
        """Takes away the targets that are not to be learned."""
        masked = np.flatnonzero(self._stream.is_masked[pieces.shard])
        if not len(masked):
            return
        length = pieces.length[masked]
        index = np.repeat(masked, length)
        column = np.arange(len(index)) - np.repeat(np.cumsum(length) - length, length)
        unlearned = self._stream.unlearned(pieces.shard[index], pieces.start[index] + column)
        places = pieces.place[index[unlearned]] + column[unlearned]
        targets[places] = mask[places] = 0


def _number(pieces: Pieces, ends: np.ndarray, seq_len: int, segments: np.ndarray, positions: np.ndarray) -> None:
    """Fills in segment ids and positions; padding behind a piece counts on and is cleared later."""
    row = pieces.place // seq_len
    number = (np.arange(1, len(row) + 1) - np.searchsorted(row, row)).astype(np.int32)
    spans = np.diff(pieces.place, append=ends[-1:])
    start = pieces.place.astype(np.int32)
    strips = np.searchsorted(pieces.place, np.arange(0, len(segments), _STRIP_TOKENS))
    cuts = np.unique(np.append(strips, len(row))).tolist()
    begins = np.append(pieces.place, ends[-1:])[cuts].tolist()
    for first, stop, begin, end in zip(cuts[:-1], cuts[1:], begins[:-1], begins[1:], strict=True):
        segments[begin:end] = np.repeat(number[first:stop], spans[first:stop])
        strip = positions[begin:end]
        strip[:] = np.arange(begin, end, dtype=np.int32)
        strip -= np.repeat(start[first:stop], spans[first:stop])


def _clear_padding(place: np.ndarray, ends: np.ndarray, arrays_5N: np.ndarray) -> None:
    """Zeros in every array wherever no piece is."""
    begins, stops = np.append(0, ends), np.append(place, arrays_5N.shape[1])
    for gap in np.flatnonzero(begins < stops).tolist():
        arrays_5N[:, begins[gap] : stops[gap]] = 0
