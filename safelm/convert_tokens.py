"""Converts tokens: Megatron's .bin and .idx, datatrove's .ds or tables of `datasets` to a token store, and back.

The kind of the source is detected. A token store becomes what --to says, everything else a token store. No sequence is
cut, joined or reordered: --unit says whether each is a document, which ends with the end-of-document token, or a window
of training (2,048 + 1 tokens, say), which `--config.data.packing=window` trains on as it is. token_lengths.npy beside
the source, or --lengths, says how many tokens a window has before its padding, which then has loss weight 0; --sidecar
is a Parquet file whose row i belongs to sequence i. The target appears only once it is complete; an existing one is
never overwritten; a stopped run goes on with its finished shards when the same command is given again. A target may be
gs://, and so may a source that is a token store.
"""

import argparse
import dataclasses
import glob
import logging
import os
from pathlib import Path
from typing import Any

from safelm import cli
from safelm.data.channels import CHANNELS
from safelm.data.store import MANIFEST_NAME, TokenStore
from safelm.interchange import sources
from safelm.interchange.exporting import export_store
from safelm.interchange.importing import ImportSettings, import_store
from safelm.interchange.sources import LENGTHS_NAME, SIDECAR_NAME
from safelm.interchange.targets import check_new, resumable_target
from safelm.io import records, remote
from safelm.io.progress import Bar
from safelm.text.tokenizer import Tokenizer

log = logging.getLogger("safelm.convert_tokens")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.convert_tokens",
        __doc__,
        "python -m safelm.convert_tokens --source=windows.idx --unit=window --tokenizer=tokenizer "
        "--target=tokens/web/train",
    )
    add = parser.add_argument
    add("--source", required=True, help="token store, .idx, .ds, .parquet or .arrow file, or a folder of such files")
    add("--target", required=True, help="folder to write, which must not exist; a store's is ROOT/SOURCE/SPLIT")
    add("--to", choices=sources.KINDS[1:], help="kind of the target, where the source is a token store")
    add("--tokenizer", default="", help="of the source's ids: folder, hf:ORG/NAME, tokenizer.json or GGUF file")
    add("--document_end", default="", metavar="TOKEN", help="token behind every document, if not the tokenizer's own")
    add("--unit", choices=("document", "window"), help="what a sequence is; an export of ours says it itself")
    add("--lengths", default="", metavar="FILE", help=f".npy with windows' tokens before padding ({LENGTHS_NAME})")
    add("--sidecar", default="", metavar="FILE", help=f"Parquet file to keep with the store ({SIDECAR_NAME})")
    add("--ids_column", default="", metavar="NAME", help="of tables (input_ids)")
    add("--token_bytes", type=int, choices=(2, 4), help="of .ds files without .ds.metadata")
    add("--shard_tokens", type=int, default=1 << 28, help="tokens of a shard of the store, about (268435456)")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Converts what the flags say; ValueError or OSError with one clear line for bad input."""
    target = flags.target.rstrip("/") or flags.target
    check_new(target, "--target")
    if sources.kind_of(flags.source) == "store":
        _export(flags, target)
    else:
        _import(flags, target)


def _export(flags: argparse.Namespace, target: str) -> None:
    store = TokenStore.open(flags.source)
    if not flags.to:
        raise ValueError(f"--to: {flags.source} is a token store: give one of {', '.join(sources.KINDS[1:])}")
    for flag in ("unit", "lengths", "sidecar", "ids_column", "token_bytes"):
        if getattr(flags, flag):
            raise ValueError(f"--{flag}={getattr(flags, flag)}: a token store has its own; it goes with an import")
    end = store.manifest.extra.get("settings", {}).get("document_end")
    if flags.tokenizer:
        tokenizer = Tokenizer.from_pretrained(flags.tokenizer).with_document_end(flags.document_end)
        _check_same(store, tokenizer)
        end = tokenizer.special_token(tokenizer.eos_id)
    elif flags.document_end:
        raise ValueError(f"--document_end={flags.document_end}: give --tokenizer too, to check it against")
    made_from = {"store": dataclasses.asdict(store.manifest), "to": flags.to, "document_end": end}
    fixed = {"fingerprint": records.fingerprint(made_from)}
    with _bar(store.num_tokens) as bar, resumable_target(target, "--target", fixed) as folder:
        export_store(store, folder, flags.to, document_end=end, progress=bar.update)
    log.info("%s: %s, %d %ss, %d tokens", target, flags.to, store.num_documents, store.manifest.unit, store.num_tokens)


def _check_same(store: TokenStore, tokenizer: Tokenizer) -> None:
    there, here = store.manifest.vocab_hash, tokenizer.hash
    if there != here:
        raise ValueError(f"--tokenizer={tokenizer.origin}: its vocabulary is {here}, {store.directory} has {there}")
    if store.manifest.eos_id != tokenizer.eos_id:
        shown = tokenizer.special_token(store.manifest.eos_id)
        raise ValueError(
            f"documents of {store.directory} end with {shown!r} (id {store.manifest.eos_id}), --tokenizer's with "
            f"{tokenizer.special_token(tokenizer.eos_id)!r}: give --document_end={shown!r}"
        )


def _import(flags: argparse.Namespace, target: str) -> None:
    if flags.to:
        raise ValueError(f"--to={flags.to}: {flags.source} is no token store: make one of it first")
    if not flags.tokenizer:
        raise ValueError("--tokenizer is missing: ids are checked against a vocabulary, which the store then names")
    if flags.shard_tokens < 1:
        raise ValueError(f"--shard_tokens={flags.shard_tokens}: must be at least 1")
    tokenizer = Tokenizer.from_pretrained(flags.tokenizer).with_document_end(flags.document_end)
    columns = [channel.name for channel in CHANNELS]
    source = sources.open_source(
        flags.source, columns=columns, ids_column=flags.ids_column, token_bytes=flags.token_bytes
    )
    unit = flags.unit or source.declared.get("unit")
    if unit is None:
        raise ValueError(f"--unit: is each sequence of {flags.source} a document or a window?")
    settings = ImportSettings(
        unit=unit,
        lengths=_beside(flags.lengths, source, LENGTHS_NAME) if unit == "window" else _not_given(flags.lengths),
        sidecar=_beside(flags.sidecar, source, SIDECAR_NAME),
        shard_tokens=flags.shard_tokens,
    )
    place = Path(target if remote.is_remote(target) else os.path.abspath(target))
    names: dict[str, Any] = {"task": place.parent.name or "imported", "split": place.name}
    fixed = {"fingerprint": _fingerprint(flags, source, settings, tokenizer), **names}
    with _bar(None) as bar, resumable_target(target, "--target", fixed) as folder:
        manifest = import_store(source, folder, tokenizer, settings, **names, progress=bar.update)
    end = tokenizer.special_token(tokenizer.eos_id)
    found = f"{manifest.num_documents} {unit}s, {manifest.num_tokens} tokens of {manifest.dtype}"
    ends = f"{manifest.extra['num_document_ends']} ends of document {end!r}, {manifest.num_tag_tokens} harm tags"
    log.info("%s: %s, %s", target, found, ends)
    for name in dict.fromkeys(name for file in source.files for name in getattr(file, "other_columns", ())):
        log.warning("%s: column %r is not kept", flags.source, name)


def _fingerprint(
    flags: argparse.Namespace, source: sources.Source, settings: ImportSettings, tokenizer: Tokenizer
) -> str:
    """Of everything that an import's store follows from; files count by name, size and time of change."""
    own = [
        MANIFEST_NAME,
        sources.channel_file("*"),
        *{f"{glob.escape(Path(file.path).stem)}.*" for file in source.files},
    ]
    paths = {str(path) for pattern in own for path in source.folder.glob(pattern)}
    stats = [(path, os.stat(path)) for path in sorted(paths | {settings.lengths, settings.sidecar} - {""})]
    return records.fingerprint(
        {
            "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
            "settings": {**dataclasses.asdict(settings), "columns": [flags.ids_column, flags.token_bytes]},
            "tokenizer": [tokenizer.hash, tokenizer.eos_id, tokenizer.harm_tag_id],
        }
    )


def _beside(given: str, source: sources.Source, name: str) -> str:
    """The file that a flag names, else the one of the usual name beside the source, else ""."""
    usual = source.folder / name
    return given or (str(usual) if usual.exists() else "")


def _not_given(lengths: str) -> str:
    if lengths:
        raise ValueError(f"--lengths={lengths}: only windows are padded: give --unit=window, or leave it out")
    return ""


def _bar(total: int | None) -> Bar:
    return Bar(total=total, unit=" tokens", unit_scale=True, desc="converting", disable=None)


if __name__ == "__main__":
    cli.run(main, arguments())
