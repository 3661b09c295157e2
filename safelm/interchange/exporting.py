"""Writes a token store as another program's files: every document or window a sequence, none cut."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safelm.data import arrays
from safelm.data.channels import LOSS_WEIGHT, REAL_TOKENS, Channel, Number
from safelm.data.store import MANIFEST_NAME, TokenStore
from safelm.formats import datatrove, hf_datasets, megatron
from safelm.formats.token_files import BLOCK_TOKENS, Block
from safelm.interchange import sources
from safelm.interchange.columns import OPENS_DOCUMENT
from safelm.interchange.sources import KEPT_SIDECAR, LENGTHS_NAME, SIDECAR_NAME
from safelm.io import files, records, remote
from safelm.io.files import file_sha256

_NAME = "tokens"  # the first part of the files' names
_DONE = "shards_done.json"  # while Megatron's file grows


def export_store(
    store: TokenStore,
    directory: Path,
    kind: str,
    *,
    document_end: str | None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> None:
    """Writes a store's tokens, channels, lengths and sidecar into a folder, and its manifest last.

    What a former run of the same finished in the folder is kept: a shard's file, and of Megatron's one file the shards.

    Args:
      kind: "megatron", "datatrove" or "datasets".
      document_end: the string of the end-of-document token, for the manifest.
      progress: called with numbers of tokens.
    """
    exported = _Exported(store, kind)
    writers = {"megatron": _write_megatron, "datatrove": _write_datatrove, "datasets": _write_tables}
    writers[kind](store, directory, exported, progress)
    if kind != "datasets":
        for channel in exported.in_files:
            name = LENGTHS_NAME if channel == REAL_TOKENS else sources.channel_file(channel.name)
            _write_channel(store, channel, directory / name, exported.file_dtype(channel))
    if facts := store.manifest.extra.get("sidecar"):
        _copy_sidecar(store, directory / SIDECAR_NAME, facts)
    _write_manifest(store, directory, exported, document_end)


class _Exported:
    """Which channels of a store go where.

    Attributes:
      in_files: have numbers of their own in the files.
      declared: those and the constant ones.
      constants: the one value of channels that have no other, where it isn't the default.
    """

    def __init__(self, store: TokenStore, kind: str):
        self.kind, self._extra = kind, store.manifest.extra
        self.constants: dict[str, Number] = {}
        self.in_files, self.declared = [], []
        for channel in store.channels:
            if self._is_written_otherwise(channel):
                continue
            self.declared.append(channel)
            values = {_constant(shard.channels, channel.name) for shard in store.manifest.shards if shard.num_documents}
            if len(values) == 1 and None not in values and channel != REAL_TOKENS:
                (value,) = values
                self.constants |= {channel.name: value} if value != channel.default else {}
            else:
                self.in_files.append(channel)

    def file_dtype(self, channel: Channel) -> np.dtype:
        """Of a channel's .npy file: of lengths as they were imported."""
        given = self._extra.get("lengths_dtype") if channel == REAL_TOKENS else None
        return np.dtype(given or channel.dtype)

    def _is_written_otherwise(self, channel: Channel) -> bool:
        """Megatron's index has the documents' places; weights that say only where padding is follow from lengths."""
        if self.kind == "megatron" and channel == OPENS_DOCUMENT:
            return True
        return channel == LOSS_WEIGHT and self.kind != "datasets" and "loss_weight" in self._extra


def _constant(channels: Any, name: str) -> Number | None:
    return next(each for each in channels if each.name == name).constant


def _blocks(store: TokenStore, shard: int) -> Iterator[tuple[int, int, Block]]:
    """A shard's documents, some at a time: the first's number in the shard, its first token, and the tokens."""
    bounds, tokens = store.shard_bounds[shard], store.shard_tokens[shard]
    first, count = 0, store.manifest.shards[shard].num_documents
    while first < count:
        start = int(bounds[first])
        last = max(first + 1, int(np.searchsorted(bounds, start + BLOCK_TOKENS, "right")) - 1)
        part = np.asarray(bounds[first : last + 1])
        yield first, start, Block(np.diff(part), np.asarray(tokens[start : int(part[-1])]))
        first = last


@dataclasses.dataclass(frozen=True)
class _Lengths:
    """The lengths of a store's documents, a shard at a time, as often as asked."""

    store: TokenStore

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.diff(bounds) for bounds in self.store.shard_bounds)


def _write_megatron(store: TokenStore, directory: Path, _: _Exported, progress: Callable[[int], object]) -> None:
    dtype, done = megatron.token_dtype(store.manifest.vocab_size), directory / _DONE
    path = directory / f"{_NAME}.bin"
    finished = records.read(done, "remove it")["shards"] if done.exists() else 0
    with files.naming(path), open(path, "r+b" if finished else "wb") as file:
        before = sum(shard.num_tokens for shard in store.manifest.shards[:finished])
        progress(before)
        file.truncate(before * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        for shard in range(finished, len(store.manifest.shards)):
            for _first, _start, block in _blocks(store, shard):
                file.write(block.tokens.astype(dtype.newbyteorder("<")).tobytes())
                progress(len(block.tokens))
            files.sync(file)
            records.write(done, {"shards": shard + 1})
    documents = None
    if OPENS_DOCUMENT in store.channels:
        documents = np.append(np.flatnonzero(store.channel(OPENS_DOCUMENT.name)), store.num_documents)
    megatron.write_index(str(directory / f"{_NAME}.idx"), dtype, _Lengths(store), store.num_documents, documents)
    done.unlink(missing_ok=True)


def _write_datatrove(store: TokenStore, directory: Path, _: _Exported, progress: Callable[[int], object]) -> None:
    dtype = np.dtype(store.manifest.dtype)
    for shard, info in enumerate(store.manifest.shards):
        path = directory / f"{shard:05d}_{_NAME}.ds"
        if not info.num_documents:
            continue
        if path.exists():
            progress(info.num_tokens)
            continue

        def write(new: Path, shard: int = shard) -> None:
            with open(new, "wb") as file:
                for _first, _start, block in _blocks(store, shard):
                    file.write(block.tokens.astype(dtype.newbyteorder("<")).tobytes())
                    progress(len(block.tokens))

        name = f"vocabulary-{store.manifest.vocab_hash[:16]}"
        datatrove.write_index(str(path), store.shard_bounds[shard], tokenizer=name, token_bytes=dtype.itemsize)
        files.write_whole(path, write)


def _write_tables(store: TokenStore, directory: Path, exported: _Exported, progress: Callable[[int], object]) -> None:
    columns = {each.name: (np.dtype(each.dtype), each.per == "token") for each in exported.in_files}
    filled = [shard for shard, info in enumerate(store.manifest.shards) if info.num_documents]
    (directory / "data").mkdir(exist_ok=True)
    for number, shard in enumerate(filled):
        path = directory / "data" / f"{store.manifest.split}-{number:05d}-of-{len(filled):05d}.parquet"
        if path.exists():
            progress(store.manifest.shards[shard].num_tokens)
            continue

        def write(new: Path, shard: int = shard) -> None:
            table = hf_datasets.TableWriter(str(new), np.dtype(store.manifest.dtype), columns)
            with contextlib.closing(table):
                for block in _with_channels(store, shard, exported.in_files):
                    table.add(block)
                    progress(len(block.tokens))

        files.write_whole(path, write)


def _with_channels(store: TokenStore, shard: int, channels: Sequence[Channel]) -> Iterator[Block]:
    for first, start, block in _blocks(store, shard):
        numbers = {}
        for channel in channels:
            per_token = channel.per == "token"
            begin, count = (start, len(block.tokens)) if per_token else (first, len(block.lengths_n))
            numbers[channel.name] = store.read_channel(channel.name, shard, begin, begin + count)
        yield dataclasses.replace(block, columns=numbers)


def _write_channel(store: TokenStore, channel: Channel, path: Path, dtype: np.dtype) -> None:
    """All numbers of a channel as one .npy file, read and written in parts, unless a former run wrote it."""
    if path.exists():
        return
    counts = [shard.count(channel) for shard in store.manifest.shards]

    def write(new: Path) -> None:
        with open(new, "wb") as file:
            arrays.write_header(file, dtype, sum(counts))
            for shard, count in enumerate(counts):
                for start in range(0, count, BLOCK_TOKENS):
                    numbers = store.read_channel(channel.name, shard, start, min(start + BLOCK_TOKENS, count))
                    file.write(numbers.astype(dtype).tobytes())

    files.write_whole(path, write)


def _copy_sidecar(store: TokenStore, target: Path, facts: Mapping[str, Any]) -> None:
    source = f"{store.url or store.directory}/{KEPT_SIDECAR}"
    if remote.is_remote(source):
        with open(target, "wb") as file:
            remote.download(source, facts["bytes"], file)
    else:
        with files.naming(target):
            shutil.copyfile(source, target)
    if file_sha256(str(target)) != facts["sha256"]:
        raise ValueError(f"{source}: damaged: its SHA-256 is not the one in the store's manifest")


def _write_manifest(store: TokenStore, directory: Path, exported: _Exported, document_end: str | None) -> None:
    manifest = store.manifest
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    facts = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(str(path))}
        for path in paths
    }
    records.write(
        directory / MANIFEST_NAME,
        {
            "written_by": sources.WRITTEN_BY,
            "files": {},  # of documents: there are none
            "token_files": facts,
            "format": exported.kind,
            "unit": manifest.unit,
            "num_sequences": manifest.num_documents,
            "num_tokens": manifest.num_tokens,
            "vocab_hash": manifest.vocab_hash,
            "vocab_size": manifest.vocab_size,
            "document_end": {"id": manifest.eos_id, "token": document_end},
            "harm_tag_id": manifest.harm_tag_id,
            "channels": [dataclasses.asdict(channel) for channel in exported.declared],
            "constants": exported.constants,
        },
    )
