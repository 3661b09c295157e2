"""Which files an input names: a file, a folder or a pattern, local or behind a URL. See `safelm.safety.documents`."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fsspec.utils import glob_translate

from safelm.data import remote

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_SAMPLE_BYTES = 1 << 16
_MAGIC = frozenset("*?[")
# What file systems call the hash or version of a file's content, the surest first.
_VERSIONS = ("md5Hash", "crc32c", "etag", "ETag", "blob_id")


@dataclasses.dataclass(frozen=True)
class DocumentFile:
    """An input file as found: its size in bytes and, behind a URL, what the store calls its content's version."""

    path: str
    bytes: int
    version: str = ""


def list_files(patterns: str | Sequence[str]) -> list[str]:
    """The files that one or more inputs name, sorted, each once.

    Raises FileNotFoundError where an input names nothing, ValueError for a file of another format.
    """
    return [file.path for file in find(patterns)]


def find(patterns: str | Sequence[str]) -> list[DocumentFile]:
    """As `list_files`, with sizes and versions, which the listing brings along."""
    found: dict[str, DocumentFile] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found |= {file.path: file for file in _find(pattern)}
    if not found:
        raise ValueError("no input is named")
    return [found[path] for path in sorted(found)]


def check_apart(patterns: Sequence[str], output: str) -> None:
    """Raises ValueError where an input, found again, would take in what a run writes into the folder `output`."""
    _, folder = remote.filesystem(output.rstrip("/"))
    for pattern in patterns:
        _, inner = remote.filesystem(pattern)
        fixed, wanted = _fixed(inner)
        written = [f"{folder}{place}/train-000000-web{end}" for place in ("", "/score=0") for end in SUFFIXES]
        is_here = remote.is_remote(pattern) == remote.is_remote(output)
        if is_here and any(re.fullmatch(wanted, name) and _is_readable(name.removeprefix(fixed)) for name in written):
            raise ValueError(f"--output {output} lies in --input {pattern}, which would then take in what is written")


def _fixed(inner: str) -> tuple[str, str]:
    """The folder in which an input looks, and a regular expression of the paths that it names."""
    if _is_pattern(inner):
        return re.split(r"[*?[]", inner, maxsplit=1)[0].rpartition("/")[0], glob_translate(inner)
    return inner, re.escape(inner.rstrip("/")) + "/.*"


def _is_pattern(inner: str) -> bool:
    return bool(_MAGIC & set(inner)) and not os.path.exists(inner)  # a file's own name may hold such characters


def suffix(path: str) -> str:
    """Which of SUFFIXES a path ends in; ValueError for another one."""
    for known in SUFFIXES:
        if path.endswith(known):
            return known
    raise ValueError(f"{path}: not a file this can read (one of {', '.join(SUFFIXES)})")


def describe(file: DocumentFile) -> dict[str, Any]:
    """What tells a file from another one: size and version, or a hash of its beginning and end where it has none."""
    if file.version:
        return {"path": file.path, "bytes": file.bytes, "version": file.version}
    files, inner = remote.filesystem(file.path)

    def read() -> str:
        digest = hashlib.sha256(files.cat_file(inner, 0, min(file.bytes, _SAMPLE_BYTES)))
        if file.bytes > _SAMPLE_BYTES:
            digest.update(files.cat_file(inner, file.bytes - _SAMPLE_BYTES, file.bytes))
        return digest.hexdigest()

    return {"path": file.path, "bytes": file.bytes, "sample_sha256": remote.retrying(file.path, "reading", read)}


def _find(pattern: str) -> list[DocumentFile]:
    if not pattern:
        raise ValueError("an input is empty")
    files, inner = remote.filesystem(pattern)
    is_pattern = _is_pattern(inner)

    def entries() -> Mapping[str, Any]:
        if is_pattern:
            return files.glob(inner, detail=True)
        if files.isdir(inner):
            return files.find(inner, detail=True)
        return {inner: files.info(inner)}

    try:
        found = remote.retrying(pattern, "listing", entries)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error) if remote.is_remote(pattern) else f"{pattern}: no such file") from error
    if not is_pattern and list(found) == [inner]:
        suffix(pattern)
    else:
        fixed, _ = _fixed(inner)
        found = {name: facts for name, facts in found.items() if _is_readable(name.removeprefix(fixed))}
    if not found:
        raise FileNotFoundError(f"{pattern}: no file there ends in {', '.join(SUFFIXES)}")
    found = {name: facts for name, facts in found.items() if facts["type"] == "file"}
    return [_document_file(files, pattern, name, facts) for name, facts in found.items()]


def _is_readable(name: str) -> bool:
    hidden = any(piece.startswith(("_", ".")) for piece in name.split("/"))
    return name.endswith(SUFFIXES) and not hidden


def _document_file(files: Any, pattern: str, name: str, facts: Mapping[str, Any]) -> DocumentFile:
    if remote.is_remote(pattern):
        path = files.unstrip_protocol(name)
        version = next((str(facts[key]) for key in _VERSIONS if facts.get(key)), "")
        return DocumentFile(path, int(facts["size"]), version)
    path = name if os.path.isabs(pattern) else os.path.relpath(name)
    return DocumentFile(path, int(facts["size"]))
