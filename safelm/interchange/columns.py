"""The channels of an import: what our own export declared, lengths of windows, places of documents, tables' columns."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from safelm.data.channels import CHANNELS, LOSS_WEIGHT, REAL_TOKENS, Channel
from safelm.data.shard import ShardInfo
from safelm.formats.megatron import IndexedFile
from safelm.formats.token_files import Block
from safelm.interchange import sources
from safelm.interchange.sources import Source

# Of a Megatron file whose documents have several sequences: 1 where one begins.
OPENS_DOCUMENT = Channel("opens_document", "uint8", "document", 1)


class Columns:
    """The channels of an import: declared by our own export, lengths of windows, places of documents, tables."""

    def __init__(self, source: Source, lengths: str):
        declared = {channel["name"]: Channel(**channel) for channel in source.declared.get("channels", ())}
        self.extra: dict[str, Any] = {}
        self._constants = dict(source.declared.get("constants", {}))
        self._flat: dict[str, np.ndarray] = {}
        for name in declared:
            path = source.folder / sources.channel_file(name)
            if path.exists():
                self._flat[name] = _opened(str(path))
        self._lengths: np.ndarray | None = None
        if lengths:
            self._lengths = _lengths(lengths, source.num_sequences)
            self._lengths_path = lengths
            self.extra["lengths_dtype"] = self._lengths.dtype.str
            declared[REAL_TOKENS.name] = REAL_TOKENS
        self._opens = _opens(source)
        if self._opens is not None:
            declared[OPENS_DOCUMENT.name] = OPENS_DOCUMENT
        others = [channel for name, channel in declared.items() if name != LOSS_WEIGHT.name]
        self.channels = (*CHANNELS, *(channel for channel in others if channel not in CHANNELS))
        self.per_token = frozenset(channel.name for channel in self.channels if channel.per == "token")
        self._at_token = 0

    def numbers(self, path: str, first: int, block: Block) -> Mapping[str, np.ndarray]:
        """The block's numbers by channel: those that aren't the default."""
        found = dict(block.columns)
        count, start = len(block.lengths_n), self._at_token
        self._at_token += len(block.tokens)
        for name, values in self._constants.items():
            channel = next(each for each in self.channels if each.name == name)
            found[name] = np.full(len(block.tokens) if channel.per == "token" else count, values, channel.dtype)
        for channel in self.channels:
            if channel.name in self._flat:
                is_long = channel.name in self.per_token
                place = slice(start, self._at_token) if is_long else slice(first, first + count)
                found[channel.name] = self._flat[channel.name][place]
        if self._opens is not None:
            found[OPENS_DOCUMENT.name] = self._opens(first, first + count)
        if self._lengths is not None:
            real = np.asarray(self._lengths[first : first + count]).astype(np.int64)
            if (wrong := (real < 2) | (real > block.lengths_n)).any():
                bad = int(np.argmax(wrong))
                raise ValueError(
                    f"{self._lengths_path}: window {first + bad} has length {real[bad]}, it has {block.lengths_n[bad]} "
                    f"tokens in {path}: must be 2 to that"
                )
            found[REAL_TOKENS.name] = real.astype(np.int32)
            if LOSS_WEIGHT.name not in found:
                self.extra[LOSS_WEIGHT.name] = "of token_lengths"
                found[LOSS_WEIGHT.name] = _weights(block.lengths_n, real)
        for channel in self.channels:
            wanted = len(block.tokens) if channel.per == "token" else count
            if len(found.get(channel.name, ())) not in (wanted, 0):
                raise ValueError(
                    f"{path}: column {channel.name!r} has {len(found[channel.name])} numbers in the block at row "
                    f"{first}, its sequences ask for {wanted}"
                )
        return found

    def skip(self, shard: ShardInfo) -> None:
        """Passes over a shard that a former run finished."""
        self._at_token += shard.num_tokens
        if LOSS_WEIGHT.name in shard.extra:
            self.extra[LOSS_WEIGHT.name] = shard.extra[LOSS_WEIGHT.name]

    def check_end(self, num_sequences: int, num_tokens: int) -> None:
        """ValueError names a channel's file that is longer or shorter than the tokens."""
        for channel in self.channels:
            if channel.name in self._flat:
                wanted = num_tokens if channel.per == "token" else num_sequences
                if len(self._flat[channel.name]) != wanted:
                    name = sources.channel_file(channel.name)
                    raise ValueError(f"{name} has {len(self._flat[channel.name])} numbers, the tokens ask for {wanted}")


def _weights(lengths_n: np.ndarray, real_n: np.ndarray) -> np.ndarray:
    """1 before a window's real length, 0 from there on."""
    starts = np.cumsum(lengths_n) - lengths_n
    place = np.arange(int(lengths_n.sum())) - np.repeat(starts, lengths_n)
    return (place < np.repeat(real_n, lengths_n)).astype(np.float32)


def _opened(path: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged, or no .npy file: {error}") from None
    if array.ndim != 1:
        raise ValueError(f"{path}: has shape {array.shape}, must be one list of numbers")
    return array


def _lengths(path: str, num_sequences: int) -> np.ndarray:
    lengths = _opened(path)
    if lengths.dtype.kind not in "iu":
        raise ValueError(f"{path}: numbers of {lengths.dtype}, must be integers")
    if len(lengths) != num_sequences:
        raise ValueError(f"{path}: has {len(lengths)} lengths, there are {num_sequences} windows")
    return lengths


def _opens(source: Source) -> Callable[[int, int], np.ndarray] | None:
    """Which sequences of a Megatron file begin a document; None where all do, or nobody says."""
    file = source.files[0]
    if not isinstance(file, IndexedFile) or file.one_each:
        return None

    def opens(start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(file.documents, [start, stop])
        found = np.zeros(stop - start, np.uint8)
        found[np.asarray(file.documents[first:last]) - start] = 1
        return found

    return opens
