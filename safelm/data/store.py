"""Token stores: the tokens of one task's split on disk, with random access to every document.

A store is a folder of numpy files, readable with `np.load` alone, and a manifest:

    tokens-00000-of-00004.npy   1-D uint16 (uint32 beyond 65,536 ids): documents end to end, each with its end token
    bounds-00000-of-00004.npy   int64, documents + 1: document i is tokens[bounds[i]:bounds[i + 1]]
    NAME-00000-of-00004.npy     a channel that isn't constant, such as loss_weight: see `safelm.data.channels`
    sums-00000-of-00004.npy     uint32: the CRC-32 of every 64 KiB of tokens, then of every channel with a number for
                                each token, to check what is read from afar in parts
    shard-00000-of-00004.json   the shard's counts, channels and checksums, written after its arrays
    manifest.json               the whole store's counts and shards, written last

Every file appears under its name only when complete (temporary name, fsync, rename), so a killed run or a full
disk leaves no shard that looks whole, and a folder without `manifest.json` is not a store.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Num, UInt

from safelm.data.channels import BadNumberError, Channel, StoredChannel
from safelm.data.remote_shards import RemoteShards
from safelm.data.shard import (
    ShardInfo,
    ShardWriter,
    StoredFile,
    check_bounds,
    open_shard,
    read_shard_info,
    shard_file,
    token_dtype,
)
from safelm.io import records, remote
from safelm.io.cache import CacheFolder
from safelm.io.files import file_sha256

__all__ = ["Manifest", "ShardInfo", "ShardWriter", "TokenStore", "read_manifest", "read_shard_info", "token_dtype"]
__all__ += ["shard_file", "write_manifest"]

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
UNITS = ("document", "window")
MENDING = "the command that cached it, run again, makes it anew"
_VERIFIED_AT_OPEN_BYTES = 256 << 20  # less than a second's reading


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds and which vocabulary made it; the shards declare its channels; `extra` is the writer's own.

    `unit` is "document", or "window" where each of the store's documents is a row of training, cut elsewhere and never
    cut again (`safelm.data.windows`).
    """

    task: str
    split: str
    vocab_hash: str
    vocab_size: int
    eos_id: int
    harm_tag_id: int
    dtype: str
    shards: tuple[ShardInfo, ...]
    num_documents: int
    num_tokens: int
    num_tag_tokens: int
    num_lost_bytes: int = 0
    num_quarantined: int = 0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    unit: str = "document"


def write_manifest(
    directory: str | os.PathLike, manifest: Manifest, *, elsewhere: Mapping[str, int] | None = None
) -> None:
    """Completes a store; ValueError when counts, ids or files contradict the manifest.

    `elsewhere` has the sizes (bytes) of arrays that aren't here but in a bucket.
    """
    directory = os.fspath(directory)
    path = os.path.join(directory, MANIFEST_NAME)
    _check_manifest(path, manifest)
    for shard in manifest.shards:
        if elsewhere is None:
            open_shard(directory, shard, len(manifest.shards), manifest.dtype)
        elif read_shard_info(directory, shard.index, len(manifest.shards), elsewhere=elsewhere) is None:
            raise ValueError(f"{path}: shard {shard.index} isn't whole")
    records.write(path, dataclasses.asdict(manifest))


class TokenStore:
    """Random access to the documents and the token stream of one store (memory-mapped, cheap to pickle).

    `directory` is the store's folder, of a remote one (`url`) that of its local copies.
    """

    def __init__(self, directory: str, manifest: Manifest, url: str | None = None):
        """Use `TokenStore.open`."""
        self.manifest, self.url, self._remote = manifest, url, None
        if url is None:
            self.directory = directory
            count, dtype = len(manifest.shards), manifest.dtype
            self._opened = [open_shard(directory, shard, count, dtype) for shard in manifest.shards]
            self.shard_tokens = [opened["tokens"] for opened in self._opened]
            self.shard_bounds = [opened["bounds"] for opened in self._opened]
        else:
            folder = CacheFolder(url, json.dumps(dataclasses.asdict(manifest), sort_keys=True))
            self._remote = RemoteShards(url, manifest.shards, manifest.dtype, folder)
            self.directory = folder.path
            self.shard_tokens, self.shard_bounds = self._remote.tokens, self._remote.bounds
        self.token_offsets = np.cumsum([0] + [s.num_tokens for s in manifest.shards], dtype=np.int64)
        self.document_offsets = np.cumsum([0] + [s.num_documents for s in manifest.shards], dtype=np.int64)

    @classmethod
    def open(
        cls, path: str | os.PathLike, *, vocab_hash: str | None = None, verify_checksums: bool | None = None
    ) -> "TokenStore":
        """Opens a store; of a remote one (`gs://...`) only the manifest is read now, and the rest is checked as it is
        fetched (see `safelm.data.remote_shards`).

        FileNotFoundError when there is no manifest (caching never finished) or a shard is gone; ValueError for an
        unreadable manifest, another vocabulary than `vocab_hash`, a shard of the wrong size, with impossible bounds or
        (`verify_checksums`, which reads everything once; None: of a local store that isn't large) of another checksum.
        """
        path = os.fspath(path)
        url = path.rstrip("/") if remote.is_remote(path) else None
        manifest = read_manifest(path if url is None else url)
        if vocab_hash is not None and vocab_hash != manifest.vocab_hash:
            raise ValueError(
                f"token store {path} was made with vocabulary {manifest.vocab_hash} "
                f"(vocab_size {manifest.vocab_size}), wanted {vocab_hash}"
            )
        store = cls(path, manifest, url)
        store._check_bounds()
        small = not (store.is_remote or store.is_large)
        if small if verify_checksums is None else verify_checksums:
            store.verify_checksums()
        return store

    def __reduce__(self):
        return TokenStore, (self.directory, self.manifest, self.url)

    @property
    def is_remote(self) -> bool:
        """Whether its files are behind a URL, and reading may have to wait for them."""
        return self._remote is not None

    @property
    def is_all_here(self) -> bool:
        """Whether reading waits for nothing: a local store, or a remote one whose files are all in the cache by now."""
        return self._remote is None or self._remote.is_all_here

    @property
    def is_large(self) -> bool:
        """Whether reading all of it takes longer than one wants to wait when it is opened."""
        size = sum(file.bytes for shard in self.manifest.shards for file in shard.files.values())
        return size > _VERIFIED_AT_OPEN_BYTES

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, end tokens included."""
        return self.manifest.num_tokens

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The declarations of the channels beside its tokens."""
        return tuple(channel.declaration for channel in self.manifest.shards[0].channels)

    def shard_path(self, kind: str, index: int) -> str:
        """The file of a shard's "tokens", "bounds", "sums" or channel, behind the URL of a remote store."""
        return f"{self.url or self.directory}/{shard_file(kind, index, len(self.manifest.shards))}"

    def document(self, index: int) -> UInt[np.ndarray, " n"]:
        """Document `index`'s tokens (a view of the file), its end token included."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.directory}")
        shard = int(np.searchsorted(self.document_offsets, index, side="right")) - 1
        local = index - int(self.document_offsets[shard])
        bounds = self.shard_bounds[shard]
        return self.shard_tokens[shard][bounds[local] : bounds[local + 1]]

    def tokens(self, start: int, stop: int) -> UInt[np.ndarray, " n"]:
        """Tokens [start, stop) of the stream of all documents end to end; clipped at the end of the store."""
        if start < 0 or stop < start:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.directory}")
        stop, pieces = min(stop, self.num_tokens), []
        while start < stop:
            shard = int(np.searchsorted(self.token_offsets, start, side="right")) - 1
            offset = int(self.token_offsets[shard])
            piece = self.shard_tokens[shard][start - offset : stop - offset]
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.manifest.dtype), *pieces])

    def prefetch(self, start: Int[np.ndarray, " n"], stop: Int[np.ndarray, " n"]) -> None:
        """Fetches the tokens [start, stop) of the stream together, each part within a shard; nothing where it is local.

        Reading them then waits for nothing.
        """
        if self._remote is None or not len(start):
            return
        shards = self.find_shards(start)
        self._remote.prefetch(shards, start - self.token_offsets[shards], stop - self.token_offsets[shards])

    def fetch_documents(self, shards: Int[np.ndarray, " n"]) -> None:
        """Fetches the bounds and channels per document of several shards together; nothing where they are local."""
        if self._remote is not None:
            channels = [channel.name for channel in self.channels if channel.per == "document"]
            self._remote.bring(np.unique(shards).tolist(), "bounds", *channels)

    def find_shards(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The shard of each position in the token stream."""
        if len(self.shard_tokens) == 1:
            return np.zeros(len(positions), np.int64)
        return np.searchsorted(self.token_offsets, positions, side="right") - 1

    def channel(self, name: str) -> Num[np.ndarray, " n"]:
        """All numbers of a channel: one for each token or for each document of the store."""
        shards = self.manifest.shards
        return np.concatenate(
            [self.read_channel(name, i, 0, shard.count(_channel(shard, name))) for i, shard in enumerate(shards)]
        )

    def read_channel(self, name: str, shard: int, start: int, stop: int) -> Num[np.ndarray, " n"]:
        """Numbers [start, stop) of a shard's channel; ValueError names a damaged file."""
        channel = _channel(self.manifest.shards[shard], name)
        return self._checked(channel, shard, lambda file: channel.read(file, start, stop))

    def take_channel(self, name: str, shard: int, index: Int[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
        """Single numbers of a shard's channel that has one for each document."""
        channel = _channel(self.manifest.shards[shard], name)
        return self._checked(channel, shard, lambda file: channel.take(file, index))

    def _checked(self, channel: StoredChannel, shard: int, read: Callable[[Any], np.ndarray]) -> np.ndarray:
        file = self._file(channel, shard)
        try:
            numbers = read(file)
            return numbers if channel.values is not None else channel.parse(numbers)
        except BadNumberError as error:
            path = self.shard_path(channel.name, shard)
            raise ValueError(f"{path}: damaged: {error}; {MENDING}") from None

    def _file(self, channel: StoredChannel, shard: int) -> Any:
        if channel.constant is not None:
            return None
        if self._remote is None:
            return self._opened[shard][channel.name]
        if channel.per == "token":
            return self._remote.numbers(channel.name, shard)
        return self._remote.local(channel.name, shard)

    def verify_checksums(self) -> None:
        """Reads every shard; ValueError names the first file whose SHA-256 is not the manifest's."""
        if self._remote is not None:
            self._remote.verify()
            return
        for shard in self.manifest.shards:
            for kind, file in shard.files.items():
                path = self.shard_path(kind, shard.index)
                if (got := file_sha256(path)) != file.sha256:
                    raise ValueError(
                        f"{path}: damaged: its SHA-256 is {got}, the manifest says {file.sha256}; {MENDING}"
                    )

    def _check_bounds(self) -> None:
        """ValueError names the first local shard whose bounds aren't those of documents."""
        if self._remote is None:
            for shard, bounds in zip(self.manifest.shards, self.shard_bounds, strict=True):
                check_bounds(self.shard_path("bounds", shard.index), bounds, shard)


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """The manifest of a store, local or remote; FileNotFoundError without one, ValueError when it cannot be read."""
    path = os.path.join(os.fspath(directory), MANIFEST_NAME)
    unfinished = "not a token store, or caching it did not finish"
    if remote.is_remote(path):
        try:
            return _parse_manifest(path, remote.read_text(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}: {unfinished}") from None
    try:
        with open(path, "rb") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file: {unfinished}") from None
    return _parse_manifest(path, text)


def _parse_manifest(path: str, text: str | bytes) -> Manifest:
    values = records.parse(text, path, MENDING)
    try:
        if values.get("format_version") != FORMAT_VERSION:
            raise TypeError(f"format_version {values.get('format_version')!r}, this program reads {FORMAT_VERSION}")
        shards = tuple(ShardInfo.parse(shard) for shard in values.pop("shards"))
        manifest = Manifest(**values, shards=shards)
        for record in (manifest, *shards, *(file for shard in shards for file in shard.files.values())):
            _check_types(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: unreadable manifest: {error}; {MENDING}") from error
    _check_manifest(path, manifest)
    return manifest


def _check_types(record: Manifest | ShardInfo | StoredFile) -> None:
    for field in dataclasses.fields(record):
        value, wanted = getattr(record, field.name), field.type if field.type in (int, str) else Mapping | tuple
        if not isinstance(value, wanted) or isinstance(value, bool) or (wanted is int and value < -1):
            raise TypeError(f"{field.name} is {value!r:.40}")


def _check_manifest(path: str, manifest: Manifest) -> None:
    if manifest.dtype != token_dtype(manifest.vocab_size).name:
        raise ValueError(f"{path}: dtype {manifest.dtype!r} for vocab_size {manifest.vocab_size}")
    if not manifest.shards or manifest.num_documents == 0:
        raise ValueError(f"{path}: empty store: {len(manifest.shards)} shards, {manifest.num_documents} documents")
    if [shard.index for shard in manifest.shards] != list(range(len(manifest.shards))):
        raise ValueError(f"{path}: shards {[s.index for s in manifest.shards]} are not 0..{len(manifest.shards) - 1}")
    first, *others = ([each.declaration for each in shard.channels] for shard in manifest.shards)
    if any(other != first for other in others):
        raise ValueError(f"{path}: its shards declare different channels; {MENDING}")
    if manifest.unit not in UNITS:
        raise ValueError(f"{path}: unit {manifest.unit!r}: this program reads {' and '.join(UNITS)}")
    limit = manifest.vocab_size
    if not 0 <= manifest.eos_id < limit or manifest.harm_tag_id >= limit:
        ids = f"eos_id {manifest.eos_id} and harm_tag_id {manifest.harm_tag_id}"
        raise ValueError(f"{path}: {ids}, vocab_size is {limit}; {MENDING}")
    for shard in manifest.shards:
        if shard.max_token >= limit:
            raise ValueError(f"{path}: shard {shard.index} has token id {shard.max_token}, vocab_size is {limit}")
    for field in ("num_documents", "num_tokens", "num_tag_tokens"):
        total = sum(getattr(shard, field) for shard in manifest.shards)
        if getattr(manifest, field) != total:
            raise ValueError(f"{path}: {field} is {getattr(manifest, field)}, its shards sum to {total}")


def _channel(shard: ShardInfo, name: str) -> StoredChannel:
    return next(each for each in shard.channels if each.name == name)
