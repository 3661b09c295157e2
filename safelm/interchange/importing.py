"""Makes a token store of other programs' files, sequence by sequence as they were cut."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from safelm.data.channels import LOSS_WEIGHT
from safelm.data.shard import ShardInfo, ShardWriter, read_shard_info, token_dtype
from safelm.data.store import Manifest, write_manifest
from safelm.formats.token_files import Block, TokenFile
from safelm.interchange.checks import Checks
from safelm.interchange.columns import Columns
from safelm.interchange.sources import KEPT_SIDECAR, Source
from safelm.io.files import file_sha256
from safelm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ImportSettings:
    """How sequences are taken.

    Attributes:
      unit: "document", each with an end-of-document token, or "window".
      lengths: .npy with every window's tokens before its padding; "" for none.
      sidecar: Parquet file whose row i belongs to sequence i, kept with the store; "" for none.
      shard_tokens: of a shard, about.
    """

    unit: str
    lengths: str = ""
    sidecar: str = ""
    shard_tokens: int = 1 << 28


def import_store(
    source: Source,
    directory: Path,
    tokenizer: Tokenizer,
    settings: ImportSettings,
    *,
    task: str,
    split: str,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Manifest:
    """Writes a store into a folder, but for shards that a former run finished there; `progress` gets numbers of tokens.

    Raises ValueError naming file, sequence and value: an id outside the vocabulary, a document without its end, a
    length longer than its window, files whose counts differ.
    """
    _check_declared(source, tokenizer, settings.unit)
    if not source.num_sequences:
        raise ValueError(f"{source.files[0].path}: no {settings.unit}s in {len(source.files)} files")
    columns, checks = Columns(source, settings.lengths), Checks(tokenizer, settings.unit)
    parts = [(file, part) for file in source.files for part in file.parts(settings.shard_tokens)]
    shards, sequence = [], 0
    for index, (file, part) in enumerate(parts):
        shard = read_shard_info(directory, index, len(parts), verify_checksums=True)
        if shard is not None:
            checks.take(shard.extra["special_tokens"])
            columns.skip(shard)
            progress(shard.num_tokens)
        else:
            with ShardWriter(
                *(directory, index, len(parts), token_dtype(tokenizer.vocab_size)),
                harm_tag_id=tokenizer.harm_tag_id,
                channels=columns.channels,
            ) as writer:
                shard = _write_shard(writer, file, part, columns, checks, sequence, progress)
        sequence += shard.num_documents
        shards.append(shard)
    columns.check_end(sequence, sum(shard.num_tokens for shard in shards))
    checks.check_ends(source)
    extra = _extra(source, settings, tokenizer, checks) | columns.extra
    if settings.sidecar:
        extra["sidecar"] = _keep_sidecar(settings.sidecar, directory, sequence)
    manifest = _manifest(shards, tokenizer, extra, task=task, split=split, unit=settings.unit)
    write_manifest(directory, manifest)
    return manifest


def _write_shard(
    writer: ShardWriter,
    file: TokenFile,
    part: tuple[int, int],
    columns: Columns,
    checks: Checks,
    sequence: int,
    progress: Callable[[int], object],
) -> ShardInfo:
    """Writes a range of a file, whose first sequence is number `sequence` of all files'."""
    before = checks.seen()
    for block in file.blocks(part):
        checks.check(file.path, sequence, block)
        numbers = columns.numbers(file.path, sequence, block)
        try:
            writer.add_many(block.tokens, block.lengths_n, **numbers)
        except ValueError as error:
            raise ValueError(f"{file.path}: {_first_wrong(columns, block, numbers, sequence) or error}") from error
        sequence += len(block.lengths_n)
        progress(len(block.tokens))
    new = {special: count - before.get(special, 0) for special, count in checks.seen().items()}
    weights = {name: columns.extra[name] for name in (LOSS_WEIGHT.name,) if name in columns.extra}
    return writer.close({"special_tokens": {special: count for special, count in new.items() if count}, **weights})


def _first_wrong(columns: Columns, block: Block, numbers: Mapping[str, np.ndarray], first: int) -> str:
    """The first sequence, numbered from `first`, of which a channel can't take the numbers, and why; "" for none."""
    stops_n = np.cumsum(block.lengths_n)
    for at, (start, stop) in enumerate(zip(stops_n - block.lengths_n, stops_n, strict=True)):
        for channel in columns.channels:
            own = slice(start, stop) if channel.per == "token" else slice(at, at + 1)
            try:
                channel.parse(numbers.get(channel.name, np.zeros(0, channel.dtype))[own])
            except ValueError as error:
                return f"sequence {first + at}: {error}"
    return ""


def _check_declared(source: Source, tokenizer: Tokenizer, unit: str) -> None:
    """ValueError if the export that is read back was of another vocabulary, end of document or unit."""
    if not source.declared:
        return
    end = tokenizer.special_token(tokenizer.eos_id)
    for name, there, here in (
        ("vocabulary", source.declared["vocab_hash"], tokenizer.hash),
        ("end of document", source.declared["document_end"]["id"], tokenizer.eos_id),
        ("unit", source.declared["unit"], unit),
    ):
        if there != here:
            hint = f" ({end!r} here: give --document_end)" if name == "end of document" else ""
            raise ValueError(f"{source.folder}: was written with {name} {there}, asked for is {here}{hint}")


def _extra(source: Source, settings: ImportSettings, tokenizer: Tokenizer, checks: Checks) -> dict[str, Any]:
    recorded = {
        "document_end": tokenizer.special_token(tokenizer.eos_id),
        "kind": source.kind,
        "inputs": [os.path.basename(file.path) for file in source.files],
        "unit": settings.unit,
    }
    return {"settings": recorded, "num_document_ends": checks.num_ends}


def _keep_sidecar(path: str, directory: Path, num_sequences: int) -> dict[str, Any]:
    """Copies a sidecar beside the store; ValueError if it isn't Parquet with a row for every sequence."""
    try:
        rows = pyarrow.parquet.read_metadata(path).num_rows
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: damaged, or no Parquet file: {str(error).splitlines()[0]}") from None
    if rows != num_sequences:
        raise ValueError(f"{path}: has {rows} rows, there are {num_sequences} sequences: row i belongs to sequence i")
    target = directory / KEPT_SIDECAR
    shutil.copyfile(path, target)
    return {"rows": rows, "bytes": target.stat().st_size, "sha256": file_sha256(str(target))}


def _manifest(
    shards: list[ShardInfo], tokenizer: Tokenizer, extra: Mapping[str, Any], *, task: str, split: str, unit: str
) -> Manifest:
    return Manifest(
        task=task,
        split=split,
        vocab_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        harm_tag_id=tokenizer.harm_tag_id,
        dtype=token_dtype(tokenizer.vocab_size).name,
        shards=tuple(shards),
        num_documents=sum(shard.num_documents for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_tag_tokens=sum(shard.num_tag_tokens for shard in shards),
        extra=extra,
        unit=unit,
    )
