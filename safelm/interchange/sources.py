"""Finds out what files of tokens lie at a path, and what their writer declared about them."""

import dataclasses
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelm.data.store import MANIFEST_NAME
from safelm.formats import hf_datasets
from safelm.formats.datatrove import DatatroveFile
from safelm.formats.megatron import IndexedFile
from safelm.formats.token_files import TokenFile
from safelm.io import records
from safelm.io.files import file_sha256

WRITTEN_BY = "safelm.convert_tokens"
LENGTHS_NAME, SIDECAR_NAME = "token_lengths.npy", "sidecar.parquet"
KEPT_SIDECAR = f"_{SIDECAR_NAME}"  # in a store; by its name nobody takes it for documents
KINDS = ("store", "megatron", "datatrove", "datasets")


def channel_file(name: str) -> str:
    """File name of a channel beside Megatron's or datatrove's files: all its numbers end to end."""
    return f"channel-{name}.npy"


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of tokens of one kind.

    Attributes:
      folder: that holds them and what lies beside them.
      files: in order.
      declared: the manifest of the export, if we wrote it; else empty.
    """

    kind: str
    folder: Path
    files: Sequence[TokenFile]
    declared: Mapping[str, Any]

    @property
    def num_sequences(self) -> int:
        """Of all files."""
        return sum(file.num_sequences for file in self.files)


def kind_of(path: str) -> str:
    """One of KINDS; FileNotFoundError or ValueError for a path that holds no tokens."""
    if "://" in path:
        if path.endswith((".idx", ".bin", ".ds", ".parquet", ".arrow")):
            raise ValueError(f"--source={path}: behind a URL only token stores are read: copy the files here first")
        return "store"
    if "shards" in _manifest(Path(path)):
        return "store"
    if _prefixes(path):
        return "megatron"
    if _ds_files(path):
        return "datatrove"
    if _tables(path):
        return "datasets"
    if not os.path.exists(path):
        raise FileNotFoundError(f"--source={path}: no such file or folder")
    raise ValueError(
        f"--source={path}: holds no token store ({MANIFEST_NAME}), no .idx, no .ds and no .parquet or .arrow files"
    )


def open_source(path: str, *, columns: Sequence[str], ids_column: str = "", token_bytes: int | None = None) -> Source:
    """Opens the files at a path other than a token store, and checks their sizes and places.

    Args:
      columns: names of channels to read from tables.
      ids_column: of tables; "" for `input_ids`.
      token_bytes: of datatrove's files without metadata.
    """
    kind = kind_of(path)
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    declared = _manifest(folder)
    declared = declared if declared.get("written_by") == WRITTEN_BY else {}
    if declared:
        _verify(folder, declared)
        columns = [*columns, *(channel["name"] for channel in declared.get("channels", ()))]
    if kind == "megatron":
        prefixes = _prefixes(path)
        if len(prefixes) > 1:
            raise ValueError(f"--source={path}: holds {len(prefixes)} .idx files: name one")
        return Source(kind, folder, [IndexedFile(prefixes[0])], declared)
    if kind == "datatrove":
        return Source(kind, folder, [DatatroveFile(file, token_bytes) for file in _ds_files(path)], declared)
    ids_column = ids_column or hf_datasets.IDS
    columns = [name for name in dict.fromkeys(columns) if name != ids_column]
    return Source(kind, folder, [hf_datasets.TableFile(file, columns, ids_column) for file in _tables(path)], declared)


def _prefixes(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(file.removesuffix(".idx") for file in glob.glob(f"{glob.escape(path)}/*.idx"))
    prefix = path.removesuffix(".idx").removesuffix(".bin")
    return [prefix] if os.path.exists(f"{prefix}.idx") else []


def _ds_files(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(glob.glob(f"{glob.escape(path)}/*.ds"))
    return [path] if path.endswith(".ds") and os.path.exists(path) else []


def _tables(path: str) -> list[str]:
    if os.path.isdir(path):
        return hf_datasets.find(path)
    return [path] if path.endswith((".parquet", ".arrow")) and os.path.exists(path) else []


def _manifest(folder: Path) -> Mapping[str, Any]:
    try:
        return records.read(folder / MANIFEST_NAME, "remove it, or make the folder anew")
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _verify(folder: Path, declared: Mapping[str, Any]) -> None:
    """ValueError names the first file of an export that isn't as its manifest says."""
    for name, facts in declared["token_files"].items():
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name}: missing, though {MANIFEST_NAME} lists it")
        if (size := (folder / name).stat().st_size) != facts["bytes"]:
            kind = "truncated" if size < facts["bytes"] else "grown"
            raise ValueError(f"{folder / name}: {kind}: {size} bytes, {MANIFEST_NAME} says {facts['bytes']}")
        if file_sha256(str(folder / name)) != facts["sha256"]:
            raise ValueError(f"{folder / name}: damaged: its SHA-256 is not the one in {MANIFEST_NAME}")
