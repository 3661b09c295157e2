"""Several token stores end to end as one stream, so that a batch of many sources is read in one go.

Token t of store i is token `store_start[i] + t` of the stream, and every shard of every store has one number. What is
done for a batch then costs the same for one source and for many.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float64, Int, Num

from safelm.data.channels import Channel, merge
from safelm.data.store import TokenStore


def merge_channels(stores: Iterable[TokenStore], channels: Sequence[Channel] = ()) -> tuple[Channel, ...]:
    """The channels of several stores, and others, together; ValueError names two that disagree."""
    return merge([*((store.url or store.directory, store.channels) for store in stores), ("here", channels)])


class Stream:
    """The shards of all stores by number; cheap to pickle, as the stores are."""

    def __init__(self, stores: Sequence[TokenStore], channels: Sequence[Channel] = ()):
        """Reads nothing yet; ValueError names two stores that declare a channel differently.

        `channels`: declared elsewhere, so given here too, with their defaults.
        """
        self._stores, self._declared = tuple(stores), tuple(channels)
        self.channels = merge_channels(stores, channels)
        self.store_start = np.cumsum([0] + [store.num_tokens for store in stores], dtype=np.int64)
        offsets = [begin + store.token_offsets for begin, store in zip(self.store_start, stores, strict=False)]
        self.shard_start = np.concatenate([*(places[:-1] for places in offsets), self.store_start[-1:]])
        self.tokens = [tokens for store in stores for tokens in store.shard_tokens]
        eos_ids = [store.manifest.eos_id for store in stores]
        self.eos_id = np.repeat(np.array(eos_ids, np.int32), [len(store.shard_tokens) for store in stores])  # by shard
        self._first_shard = np.cumsum([0] + [len(store.shard_tokens) for store in stores])
        self._places = [(store, index) for store in stores for index in range(len(store.shard_tokens))]
        self._afar = tuple(number for number, store in enumerate(stores) if store.is_remote)  # replaced whole
        self._constants = {channel.name: self._constants_of(channel) for channel in self.channels}

    def __reduce__(self):
        return Stream, (self._stores, self._declared)

    def path(self, shard: int) -> str:
        """The file of a shard's tokens."""
        store, index = self._places[shard]
        return store.shard_path("tokens", index)

    def find_shards(self, position_n: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The shard of each token of the stream."""
        return self.shard_start.searchsorted(position_n, "right") - 1

    def document_ends(
        self, shard_n: Int[np.ndarray, " n"], start_n: Int[np.ndarray, " n"], stop_n: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " ends"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Where the documents in the tokens [start, stop) end, each within a shard; their number; the first's start.

        The last one's end may be behind `stop`, the first one's start before `start`.
        """
        self._fetch_documents(shard_n)
        local_n2 = np.stack([start_n, stop_n - 1], axis=1) - self.shard_start[shard_n, None]
        found_n2, begin_n = np.empty_like(local_n2), np.empty_like(start_n)
        order = np.argsort(shard_n, kind="stable")
        sorted_n, local_n2 = shard_n[order], local_n2[order]  # by shard, so that what follows takes slices
        sorted_found_n2, sorted_begin_n = np.empty_like(found_n2), np.empty_like(begin_n)
        heads = np.flatnonzero(np.diff(sorted_n, prepend=-1)).tolist()
        bounds = {}
        for head, stop in zip(heads, [*heads[1:], len(order)], strict=True):
            shard = int(sorted_n[head])
            bounds[shard] = self._bounds(shard)
            found = bounds[shard].searchsorted(local_n2[head:stop], "right")
            sorted_found_n2[head:stop], sorted_begin_n[head:stop] = found, bounds[shard][found[:, 0] - 1]
        found_n2[order], begin_n[order] = sorted_found_n2, sorted_begin_n
        found_n2[:, 1] += 1
        wanted = zip(shard_n.tolist(), found_n2.tolist(), strict=True)
        ends = np.concatenate([bounds[shard][first:last] for shard, (first, last) in wanted])
        counts_n, offset_n = found_n2[:, 1] - found_n2[:, 0], self.shard_start[shard_n]
        return ends + np.repeat(offset_n, counts_n), counts_n, begin_n + offset_n

    def prefetch(
        self, shard_n: Int[np.ndarray, " n"], start_n: Int[np.ndarray, " n"], stop_n: Int[np.ndarray, " n"]
    ) -> None:
        """Fetches the tokens [start, stop) of the stream, each within a shard, together from every remote store."""
        for number, store in self._stores_afar():
            chosen, begin = self._of_store(shard_n, number), self.store_start[number]
            store.prefetch(start_n[chosen] - begin, stop_n[chosen] - begin)

    def constants(self, channel: Channel, shard_n: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """The one value that a channel has in each of these shards, NaN where it has several."""
        return self._constants[channel.name][shard_n]

    def read_channel(self, channel: Channel, shard: int, start: int, stop: int) -> Num[np.ndarray, " n"]:
        """A channel's numbers for the tokens [start, stop) of a shard (positions in it) where they differ."""
        store, index = self._places[shard]
        return store.read_channel(channel.name, index, start, stop)

    def document_channels(
        self, channels: Sequence[Channel], shard_n: Int[np.ndarray, " n"], start_n: Int[np.ndarray, " n"]
    ) -> list[Num[np.ndarray, " n"]]:
        """For each of these channels, the number of the document that holds each of these tokens of the stream."""
        self._fetch_documents(shard_n)
        found = [np.nan_to_num(self.constants(channel, shard_n)).astype(channel.batch_dtype) for channel in channels]
        for shard in np.unique(shard_n).tolist():
            chosen = np.flatnonzero(shard_n == shard)
            local = start_n[chosen] - self.shard_start[shard]
            documents = self._bounds(shard).searchsorted(local, "right") - 1
            for channel, numbers in zip(channels, found, strict=True):
                if np.isnan(self._constants[channel.name][shard]):
                    store, index = self._places[shard]
                    numbers[chosen] = store.take_channel(channel.name, index, documents)
        return found

    def _constants_of(self, channel: Channel) -> np.ndarray:
        constants = []
        for store, index in self._places:
            stored = (each for each in store.manifest.shards[index].channels if each.name == channel.name)
            found = next(stored, None)
            constants.append(channel.default if found is None else found.constant)
        return np.array(constants, np.float64)  # None becomes NaN

    def _of_store(self, shard_n: np.ndarray, number: int) -> np.ndarray:
        first, stop = self._first_shard[number : number + 2]
        return np.flatnonzero((shard_n >= first) & (shard_n < stop))

    def _bounds(self, shard: int) -> np.ndarray:
        store, index = self._places[shard]
        return store.shard_bounds[index]

    def _fetch_documents(self, shard_n: np.ndarray) -> None:
        for number, store in self._stores_afar():
            store.fetch_documents(shard_n[self._of_store(shard_n, number)] - self._first_shard[number])

    def _stores_afar(self) -> list[tuple[int, TokenStore]]:
        """The stores that may have to be waited for; those that came in whole are read as local ones are."""
        for number in self._afar:
            if self._stores[number].is_all_here:
                first, stop = self._first_shard[number : number + 2]
                self.tokens[first:stop] = self._stores[number].shard_tokens
                self._afar = tuple(other for other in self._afar if other != number)
        return [(number, self._stores[number]) for number in self._afar]
