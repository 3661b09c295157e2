"""The arrays of a `safelm.data.batch.Batch` from rows of several stores."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from safelm.data.batch import Batch
from safelm.data.buffers import Buffers
from safelm.data.channels import LOSS_WEIGHT, UNLIKELIHOOD, Channel
from safelm.data.rows import Pieces, RowPlan
from safelm.data.store import MENDING
from safelm.data.stream import Stream

_STRIP_TOKENS = 1 << 14  # what is computed at a time: 64 KiB, which stay in the processor's cache and in malloc's heap


class Assembly:
    """Makes batches of rows of several plans, all of one kind and of one `seq_len`."""

    def __init__(self, plans: Sequence[RowPlan], channels: Sequence[Channel] = (), begin_id: int | None = None):
        """`plans` by source; `channels`: what a batch has also where no store has it.

        `begin_id`: the input before a document's first token (`safelm.data.rows`); None: the end of a document.
        """
        self.plans, self._begin_id = tuple(plans), begin_id
        self._seq_len = plans[0].seq_len
        self._vocab_size = min(plan.store.manifest.vocab_size for plan in plans)
        self._stream, self._buffers = Stream([plan.store for plan in plans], channels), Buffers()

    def batch(self, source_ids_b: Int[np.ndarray, " b"], rows_b: Int[np.ndarray, " b"], batch_size: int) -> Batch:
        """The given rows of the sources' plans, then rows of padding up to `batch_size`."""
        channels = self._stream.channels
        arrays_AN = self._buffers.take(4 + len(channels), batch_size * self._seq_len)
        if len(rows_b):
            self._fill(arrays_AN, type(self.plans[0]).pieces(self.plans, self._stream, source_ids_b, rows_b))
        else:
            arrays_AN.fill(0)
        fields = [array.reshape(batch_size, -1) for array in arrays_AN]
        numbers = {each.name: array.view(each.batch_dtype) for each, array in zip(channels, fields[4:], strict=True)}
        source_ids_B = np.zeros(batch_size, np.int32)
        source_ids_B[: len(source_ids_b)] = source_ids_b
        return Batch(*fields[:4], numbers.pop(LOSS_WEIGHT.name), source_ids_B, numbers)

    def _fill(self, arrays_AN: np.ndarray, pieces: Pieces) -> None:
        inputs, targets, positions, segments, *numbers = arrays_AN
        ends, runs = pieces.place + pieces.length, _Runs(pieces)
        self._stream.prefetch(runs.shard, runs.start - runs.goes_on, runs.stop)
        before = self._copy_tokens(runs, targets)
        self._check_ids(pieces, runs, targets, before)
        inputs[1:] = targets[:-1]
        inputs[runs.place[runs.goes_on]] = before
        begins = pieces.place[pieces.begins]
        inputs[begins] = self._stream.eos_id[pieces.shard[pieces.begins]] if self._begin_id is None else self._begin_id
        doubled = begins[:0] if self._begin_id is None else begins[targets[begins] == self._begin_id]
        for channel, out in zip(self._stream.channels, numbers, strict=True):
            if channel.per == "token":
                self._copy_channel(channel, runs, out.view(channel.batch_dtype))
        self._copy_document_channels(pieces, ends, numbers)
        loss_weight = self._stream.channels[0]
        if not (self._stream.constants(loss_weight, runs.shard) > 0).all():
            targets[self._is_unused(numbers)] = 0
        _number(pieces, ends, self._seq_len, segments, positions)
        _clear_padding(pieces.place, ends, arrays_AN)
        arrays_AN[:, doubled] = 0

    def _is_unused(self, numbers: Sequence[np.ndarray]) -> np.ndarray:
        """Where no loss looks at the target: every channel that weights one is 0."""
        weighing = (LOSS_WEIGHT.name, UNLIKELIHOOD.name)
        pairs = zip(self._stream.channels, numbers, strict=True)
        weights = [array.view(channel.batch_dtype) for channel, array in pairs if channel.name in weighing]
        return np.logical_and.reduce([weight == 0 for weight in weights])

    def _copy_tokens(self, runs: "_Runs", out: np.ndarray) -> np.ndarray:
        """Copies each run into place; returns the token before each that goes on with a document."""
        before, tokens = [], self._stream.tokens
        for to, at, count, number, continues in runs.rows(self._stream):
            if continues:
                run = tokens[number][at - 1 : at + count]
                out[to : to + count] = run[1:]
                before.append(run[0])
            else:
                out[to : to + count] = tokens[number][at : at + count]
        return np.array(before, np.int32)

    def _copy_channel(self, channel: Channel, runs: "_Runs", out: np.ndarray) -> None:
        """Fills in the numbers of a channel that has one for each token; ValueError names a damaged file."""
        constants = self._stream.constants(channel, runs.shard)
        if (constants == constants[0]).all():
            out.fill(constants[0])
            return
        for (to, at, count, shard, _), constant in zip(runs.rows(self._stream), constants.tolist(), strict=True):
            if constant == constant:
                out[to : to + count] = constant
            else:
                out[to : to + count] = self._stream.read_channel(channel, shard, at, at + count)

    def _copy_document_channels(self, pieces: Pieces, ends: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        """Fills in the numbers of the channels that have one for each document, at all of its tokens."""
        chosen = [
            (channel, array)
            for channel, array in zip(self._stream.channels, arrays, strict=True)
            if channel.per == "document"
        ]
        if not chosen:
            return
        found = self._stream.document_channels([channel for channel, _ in chosen], pieces.shard, pieces.start)
        spans = np.diff(pieces.place, append=ends[-1:])
        for (channel, array), numbers in zip(chosen, found, strict=True):
            array.view(channel.batch_dtype)[pieces.place[0] : ends[-1]] = np.repeat(numbers, spans)

    def _check_ids(self, pieces: Pieces, runs: "_Runs", targets: np.ndarray, before: np.ndarray) -> None:
        """ValueError names the shard if a token is not in the vocabulary: the model would compute with garbage."""
        highest = max((int(array.view(np.uint32).max()) for array in (targets, before) if len(array)), default=0)
        if highest < self._vocab_size:
            return
        columns = (pieces.place, pieces.length, pieces.shard)  # between them is what the memory had before
        read = [(targets[at : at + n], shard) for at, n, shard in zip(*(c.tolist() for c in columns), strict=True)]
        read += zip(before[:, None], runs.shard[runs.goes_on].tolist(), strict=True)
        for tokens, shard in read:
            token = int(tokens.view(np.uint32).max())
            if token >= self._vocab_size:
                raise ValueError(
                    f"{self._stream.path(shard)}: damaged: token id {token}, the vocabulary has {self._vocab_size}; "
                    f"{MENDING}"
                )


class _Runs:
    """Pieces with adjacent ones merged: `goes_on` says which begin within a document."""

    def __init__(self, pieces: Pieces):
        place, shard, start, length = pieces.place, pieces.shard, pieces.start, pieces.length
        stop = start + length
        heads = np.ones(len(place) + 1, bool)
        heads[1:-1] = (start[1:] != stop[:-1]) | (place[1:] != place[:-1] + length[:-1]) | (shard[1:] != shard[:-1])
        first, last = np.flatnonzero(heads[:-1]), np.flatnonzero(heads[1:])
        self.place, self.shard, self.start, self.stop = place[first], shard[first], start[first], stop[last]
        self.goes_on = ~pieces.begins[first]

    def rows(self, stream: Stream) -> Iterator[tuple[int, int, int, int, bool]]:
        """Place, first token in the shard, number of tokens, shard and `goes_on` of each."""
        local, length = self.start - stream.shard_start[self.shard], self.stop - self.start
        columns = (self.place, local, length, self.shard, self.goes_on)
        return zip(*(column.tolist() for column in columns), strict=True)


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


def _clear_padding(place: np.ndarray, ends: np.ndarray, arrays_AN: np.ndarray) -> None:
    """Zeros in every array wherever no piece is."""
    begins, stops = np.append(0, ends), np.append(place, arrays_AN.shape[1])
    for gap in np.flatnonzero(begins < stops).tolist():
        arrays_AN[:, begins[gap] : stops[gap]] = 0
