"""One shard of a token store: written as a stream, visible only when whole."""

import dataclasses
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped

from safelm.data import arrays
from safelm.data.channels import CHANNELS, Channel, ChannelWriter, Number, StoredChannel
from safelm.io import records
from safelm.io.files import file_sha256


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 of one of a shard's files."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One shard's counts, files and channels.

    Attributes:
      files: "tokens", "bounds", "sums" and the channels that have one, by name.
      fingerprint: says what the shard was made from.
    """

    index: int
    num_documents: int
    num_tokens: int
    num_tag_tokens: int
    max_token: int
    files: Mapping[str, StoredFile]
    channels: tuple[StoredChannel, ...] = ()
    fingerprint: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "ShardInfo":
        """A shard's record from JSON; TypeError or ValueError says what is wrong with it."""
        values = dict(values)
        files = {name: StoredFile(**file) for name, file in dict(values.pop("files", {})).items()}
        channels = tuple(_parse_channel(channel) for channel in values.pop("channels", ()))
        info = cls(**values, files=files, channels=channels)
        wanted = {"tokens", "bounds", "sums"} | {each.name for each in channels if each.constant is None}
        if set(files) != wanted:
            raise ValueError(f"files are {sorted(files)}, not {sorted(wanted)}")
        return info

    def count(self, channel: Channel) -> int:
        """How many numbers the shard has of a channel."""
        return self.num_tokens if channel.per == "token" else self.num_documents

    def read_in_parts(self, token_dtype: np.dtype) -> dict[str, tuple[np.dtype, int]]:
        """Dtype and length of the files with a number for every token, whose block checksums are in "sums", in order.

        The others have a number for every document or fewer.
        """
        channels = [each for each in self.channels if each.per == "token" and each.name in self.files]
        shapes = {each.name: each.file_shape(self.num_tokens) for each in channels}
        return {"tokens": (token_dtype, self.num_tokens), **shapes}

    def content_hash(self) -> str:
        """SHA-256 (hex) of everything that the shard holds."""
        files = {name: file.sha256 for name, file in self.files.items()}
        return records.fingerprint({"files": files, "channels": [dataclasses.asdict(each) for each in self.channels]})


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_file(kind: str, index: int, num_shards: int) -> str:
    """File name of a shard's "tokens", "bounds", "sums" or channel (.npy), or of its record, "shard" (.json)."""
    return f"{kind}-{index:05d}-of-{num_shards:05d}.{'json' if kind == 'shard' else 'npy'}"


class ShardWriter:
    """Streams documents into one shard; nothing has a final name until `close`.

    A context manager: leaving it by an exception removes the temporary files. `add` and `close` raise `OSError`
    naming the file when the disk is full, and leave nothing behind.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        shard_index: int,
        num_shards: int,
        dtype: np.dtype | str | type,
        *,
        harm_tag_id: int,
        fingerprint: str = "",
        channels: Sequence[Channel] = CHANNELS,
    ):
        """`harm_tag_id` is counted; `fingerprint` is handed back by `read_shard_info` when a later run continues."""
        if not 0 <= shard_index < num_shards:
            raise ValueError(f"shard_index must be in 0..{num_shards - 1}, got {shard_index}")
        self._directory, self._index, self._num_shards = os.fspath(directory), shard_index, num_shards
        self._dtype, self._harm_tag_id, self._fingerprint = np.dtype(dtype), harm_tag_id, fingerprint
        self._path = self._path_of("tokens")
        self._bounds, self._num_tags, self._max_token = [0], 0, -1
        self._channels = {each.name: each for each in channels}
        self._writers = {each.name: ChannelWriter(each, self._path_of(each.name)) for each in channels}
        os.makedirs(self._directory, exist_ok=True)
        self._remove_former()
        self._file = open(f"{self._path}.tmp", "wb")
        self._guard(lambda: arrays.write_header(self._file, self._dtype, 0))

    def add(
        self, tokens: np.ndarray | Sequence, **channels: np.ndarray | np.generic | Sequence | Number | None
    ) -> None:
        """Appends one document, its end token included, and its channels' numbers by name.

        A channel per token takes as many numbers as the document has tokens (`loss_weight`: how much each counts in the
        loss, 0 if it is not to be learned), one per document a single number; left out or None, it has its default.
        ValueError names the document and what is wrong with it; nothing of it is written then.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise self._error(f"must be a non-empty 1-D integer array, got shape {tokens.shape} of {tokens.dtype}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high > np.iinfo(self._dtype).max:
            raise self._error(f"has token id {low if low < 0 else high}, outside {self._dtype.name}")
        if unknown := channels.keys() - self._channels.keys():
            raise self._error(f"has channel {min(unknown)!r}, declared are {', '.join(self._channels) or 'none'}")
        numbers = {
            name: self._numbers(channel, channels.get(name), tokens.size) for name, channel in self._channels.items()
        }
        self._guard(lambda: self._write(tokens, numbers))
        self._bounds.append(self._bounds[-1] + tokens.size)
        self._num_tags += int(np.count_nonzero(tokens == self._harm_tag_id))
        self._max_token = max(self._max_token, high)

    def add_many(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        lengths_n: Integer[np.ndarray, " n"],
        **channels: Shaped[np.ndarray, " _"],
    ) -> None:
        """Appends documents that lie end to end in `tokens`, none of them empty: as one by one does, and faster.

        A channel per token takes a number for each of `tokens`, one per document as many as `lengths_n`.
        """
        if (lengths_n <= 0).any() or lengths_n.sum() != len(tokens):
            raise self._error(f"and the {len(lengths_n) - 1} behind it have {lengths_n.sum()} of {len(tokens)} tokens")
        low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
        if low < 0 or high > np.iinfo(self._dtype).max:
            raise self._error(f"or one behind it has token id {low if low < 0 else high}, outside {self._dtype.name}")
        numbers = {}
        for name, channel in self._channels.items():
            count = len(tokens) if channel.per == "token" else len(lengths_n)
            given = channels.get(name)
            numbers[name] = np.full(count, channel.default, channel.dtype) if given is None else channel.parse(given)
            if len(numbers[name]) != count:
                raise self._error(f"and those behind it have {len(numbers[name])} numbers of {name}, not {count}")
        stops_n = np.cumsum(lengths_n, dtype=np.int64)
        self._guard(lambda: self._write(tokens, numbers, stops_n))
        self._bounds.extend((self._bounds[-1] + stops_n).tolist())
        self._num_tags += int(np.count_nonzero(tokens == self._harm_tag_id))
        self._max_token = max(self._max_token, high if len(tokens) else -1)

    def close(self, extra: Mapping[str, Any] | None = None) -> ShardInfo:
        """Puts the arrays, then the shard's JSON, under their final names; `extra` is stored in the JSON."""
        return self._guard(lambda: self._close(dict(extra or {})))

    def abort(self) -> None:
        """Removes the temporary files; safe to call twice."""
        self._file.close()
        for writer in self._writers.values():
            writer.abort()
        for kind in ("tokens", "bounds", "sums", "shard"):
            path = f"{self._path_of(kind)}.tmp"
            if os.path.exists(path):
                os.remove(path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self.abort()
        elif not self._file.closed:
            self.close()

    def _path_of(self, kind: str) -> str:
        return os.path.join(self._directory, shard_file(kind, self._index, self._num_shards))

    def _remove_former(self) -> None:
        """Removes the record first: it would describe arrays that are about to go."""
        pattern = shard_file("*", self._index, self._num_shards).removesuffix("npy") + "*"
        found = glob.glob(os.path.join(glob.escape(self._directory), pattern))
        for path in sorted(found, key=lambda path: not path.endswith(".json")):
            os.remove(path)

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self._path}: document {len(self._bounds) - 1} {problem}")

    def _numbers(self, channel: Channel, given: Any, num_tokens: int) -> np.ndarray:
        count = num_tokens if channel.per == "token" else 1
        if given is None:
            return np.full(count, channel.default, channel.dtype)
        given, shape = np.asarray(given), (num_tokens,) if channel.per == "token" else ()
        if given.shape != shape:
            raise self._error(f"has {num_tokens} tokens and a {channel.name} of shape {given.shape}, not {shape}")
        try:
            return channel.parse(given.reshape(count))
        except ValueError as error:
            raise self._error(f"has a bad channel: {error}") from None

    def _write(self, tokens: np.ndarray, numbers: Mapping[str, np.ndarray], stops_n: np.ndarray | None = None) -> None:
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        for name, writer in self._writers.items():
            per_token = self._channels[name].per == "token"
            writer.add(numbers[name], stops_n if per_token or stops_n is None else np.arange(1, len(stops_n) + 1))

    def _close(self, extra: dict[str, Any]) -> ShardInfo:
        arrays.finish(self._file, self._dtype, self._bounds[-1])
        arrays.write_array(f"{self._path_of('bounds')}.tmp", np.asarray(self._bounds, np.int64))
        channels = tuple(writer.close() for writer in self._writers.values())
        kinds = ["tokens", "bounds", *(each.name for each in channels if each.constant is None)]
        info = ShardInfo(
            index=self._index,
            num_documents=len(self._bounds) - 1,
            num_tokens=self._bounds[-1],
            num_tag_tokens=self._num_tags,
            max_token=self._max_token,
            files={kind: StoredFile(os.path.getsize(f"{self._path_of(kind)}.tmp"), "") for kind in kinds},
            channels=channels,
            fingerprint=self._fingerprint,
            extra=extra,
        )
        info = dataclasses.replace(info, files=self._checked(info))
        for kind in info.files:
            os.replace(f"{self._path_of(kind)}.tmp", self._path_of(kind))
        records.write(self._path_of("shard"), dataclasses.asdict(info))
        return info

    def _checked(self, info: ShardInfo) -> dict[str, StoredFile]:
        """The files with their SHA-256, after those read in parts have got their block checksums."""
        files, sums = dict(info.files), []
        for kind, (dtype, length) in info.read_in_parts(self._dtype).items():
            sha256, blocks = arrays.checksums(f"{self._path_of(kind)}.tmp", length * dtype.itemsize)
            files[kind] = dataclasses.replace(files[kind], sha256=sha256)
            sums.append(blocks)
        path = f"{self._path_of('sums')}.tmp"
        arrays.write_array(path, np.concatenate(sums))
        files["sums"] = StoredFile(os.path.getsize(path), "")
        for kind, file in files.items():
            if not file.sha256:
                files[kind] = dataclasses.replace(file, sha256=file_sha256(f"{self._path_of(kind)}.tmp"))
        return files

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            try:
                self.abort()
            except OSError:  # closing flushes, which fails again on a full disk; the files are removed next
                self.abort()
            raise OSError(error.errno, f"cannot write token shard: {error.strerror or error}", self._path) from error


def read_shard_info(
    directory: str | os.PathLike,
    index: int,
    num_shards: int,
    *,
    fingerprint: str | None = None,
    elsewhere: Mapping[str, int] | None = None,
    verify_checksums: bool = False,
) -> ShardInfo | None:
    """The shard a former run completed here, or None if it is absent, damaged or made from something else.

    `elsewhere` has the sizes (bytes) of arrays that aren't here but, say, in a bucket; `verify_checksums` reads all of
    those that are here.
    """
    directory = os.fspath(directory)
    try:
        info = ShardInfo.parse(records.read(os.path.join(directory, shard_file("shard", index, num_shards)), ""))
        paths = {kind: os.path.join(directory, shard_file(kind, index, num_shards)) for kind in info.files}
        sizes = {kind: _size(path, elsewhere or {}) for kind, path in paths.items()}
    except (AttributeError, OSError, TypeError, ValueError):
        return None
    whole = fingerprint in (None, info.fingerprint)
    whole = whole and all(sizes[kind] == file.bytes for kind, file in info.files.items())
    if whole and verify_checksums:
        here = {kind: path for kind, path in paths.items() if os.path.exists(path)}
        whole = all(file_sha256(path) == info.files[kind].sha256 for kind, path in here.items())
    return info if whole else None


def open_shard(directory: str, shard: ShardInfo, num_shards: int, dtype: str) -> dict[str, np.ndarray]:
    """A local shard's tokens (of `dtype`), bounds and channels, those that have a file, mapped into memory.

    FileNotFoundError or ValueError names a file that is gone or of another size than the shard's record says.
    """
    shapes = {each.name: each.file_shape(shard.count(each)) for each in shard.channels if each.name in shard.files}
    opened, shapes["tokens"] = {}, (np.dtype(dtype), shard.num_tokens)
    for kind in ("tokens", "bounds", *(each.name for each in shard.channels if each.name in shard.files)):
        path = os.path.join(directory, shard_file(kind, shard.index, num_shards))
        opened[kind] = arrays.open_array(path, shard.files[kind].bytes)
        if kind in shapes:
            arrays.check_array(path, opened[kind], *shapes[kind])
    return opened


def check_bounds(path: str, bounds: np.ndarray, shard: ShardInfo) -> None:
    """ValueError unless an array holds the bounds of a shard's documents, none of which is empty."""
    whole = bounds.dtype == np.int64 and bounds.shape == (shard.num_documents + 1,)
    if not whole or bounds[0] or bounds[-1] != shard.num_tokens or (np.diff(bounds) <= 0).any():
        raise ValueError(f"{path}: not the bounds of {shard.num_documents} documents of {shard.num_tokens} tokens")


def _parse_channel(values: Any) -> StoredChannel:
    if not isinstance(values, Mapping):
        raise TypeError(f"channel is {values!r:.40}")
    coded = values["values"]
    channel = StoredChannel(**(dict(values) | {"values": None if coded is None else tuple(coded)}))
    if coded is not None and len(channel.parse(coded)) == 0:
        raise ValueError(f"channel {channel.name} has no values")
    return channel


def _size(path: str, elsewhere: Mapping[str, int]) -> int:
    name = os.path.basename(path)
    return elsewhere[name] if name in elsewhere and not os.path.exists(path) else os.path.getsize(path)
