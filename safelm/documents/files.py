"""Which files an input names: a file, a folder or a pattern, local or behind a URL. See `safelm.documents`."""

import dataclasses
import fnmatch
import glob
import hashlib
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fsspec.utils import glob_translate

from safelm.documents.opening import check_regular
from safelm.documents.outputs import MANIFEST_NAME, Outputs, beside
from safelm.io import remote

PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
PARQUET = ".parquet"
SUFFIXES = (*(f"{kind}{end}" for kind in (".jsonl", ".ndjson", ".json") for end in ("", *PACKED)), PARQUET)
TSV_SUFFIXES = (".tsv", *(f".tsv{end}" for end in PACKED))
_PLAIN_JSON = ".json"  # often a side file: only taken where an input names it
_SAMPLE_BYTES = 1 << 16
_MAGIC = re.compile(r"[*?[]")
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

    Raises FileNotFoundError where an input names nothing, ValueError for a file of another format or what is no file.
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


def find_named(folder: str, names: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[str]:
    """Paths of the files below a folder that have one of the names (with `*`) and suffixes, sorted; perhaps none."""
    files, inner = remote.filesystem(folder)
    inner = inner.rstrip("/")
    if not remote.is_remote(folder) and not os.path.isdir(inner):
        return []
    entries = _entries(files, folder, inner)
    outputs = Outputs(files, folder, entries)
    found = {
        name: _document_file(files, folder, name, facts, is_absolute=True)
        for name, facts in entries.items()
        if _is_readable(name.removeprefix(inner), (*SUFFIXES, *suffixes)) and outputs.hold(name)
    }
    outputs.check({name: file.bytes for name, file in found.items()}, is_complete=True)
    return sorted(
        file.path
        for name, file in found.items()
        if name.endswith(tuple(suffixes))
        and any(fnmatch.fnmatchcase(posixpath.basename(name), wanted) for wanted in names)
    )


def file_at(path: str) -> DocumentFile:
    """One file. Raises FileNotFoundError where nothing is there."""
    files, inner = remote.filesystem(path)
    if not remote.is_remote(path):
        check_regular(inner)
    facts = remote.retrying(path, "reading", lambda: files.info(inner))
    return dataclasses.replace(_document_file(files, path, inner, facts), path=path)


def check_apart(patterns: Sequence[str], output: str) -> None:
    """Raises ValueError where an input, found again, would take in what a run writes into the folder `output`."""
    _, folder = remote.filesystem(output.rstrip("/"))
    for pattern in patterns:
        files, inner = remote.filesystem(pattern)
        fixed, wanted = _fixed(files, inner)
        written = [f"{folder}{place}/train-000000-web{end}" for place in ("", "/score=0") for end in SUFFIXES]
        is_here = remote.is_remote(pattern) == remote.is_remote(output)
        if is_here and any(re.fullmatch(wanted, name) and _is_readable(name.removeprefix(fixed)) for name in written):
            raise ValueError(f"--output {output} lies in --input {pattern}, which would then take in what is written")


def suffix(path: str) -> str:
    """Which of SUFFIXES a path ends in; ValueError for another one."""
    for known in SUFFIXES:
        if path.endswith(known):
            return known
    raise ValueError(f"{path}: not a file this can read (one of {', '.join(SUFFIXES)})")


def describe(file: DocumentFile) -> dict[str, Any]:
    """What tells a file from another one: size and version, or a hash of its beginning and end where it has none.

    The end of a gzip or Parquet file holds a checksum or the footer, so other content shows there.
    """
    if file.version:
        return {"path": file.path, "bytes": file.bytes, "version": file.version}
    files, inner = remote.filesystem(file.path)

    def read() -> str:
        digest = hashlib.sha256(files.cat_file(inner, 0, min(file.bytes, _SAMPLE_BYTES)))
        if file.bytes > _SAMPLE_BYTES:
            digest.update(files.cat_file(inner, file.bytes - _SAMPLE_BYTES, file.bytes))
        return digest.hexdigest()

    return {"path": file.path, "bytes": file.bytes, "sample_sha256": remote.retrying(file.path, "reading", read)}


def without_place(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe` says of a file, with its name for its path: a moved copy is the same input."""
    return {"name": os.path.basename(facts["path"])} | {key: value for key, value in facts.items() if key != "path"}


def content_sha256(path: str) -> dict[str, Any]:
    """The SHA-256 of a whole local file, with the time of its last change (ns); {} for one behind a URL.

    Raises ValueError where the file changes meanwhile.
    """
    if remote.is_remote(path):
        return {}
    before = os.stat(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    after = os.stat(path)
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise ValueError(f"{path}: it changes while it is read")
    return {"mtime_ns": before.st_mtime_ns, "sha256": digest}


def has_changed(path: str, former: Mapping[str, Any]) -> bool:
    """Whether a local file holds something else than when `content_sha256` gave `former`.

    It is read only where its time of change is another one: a copied or touched file is the same.
    """
    if not former or remote.is_remote(path) or os.stat(path).st_mtime_ns == former["mtime_ns"]:
        return False
    return content_sha256(path)["sha256"] != former["sha256"]


def _find(pattern: str) -> list[DocumentFile]:
    if not pattern:
        raise ValueError("an input is empty")
    files, inner = remote.filesystem(pattern)
    literal, rest = _split(files, inner)

    def entries() -> Mapping[str, Any]:
        if rest:
            return _matching(files, pattern, literal, rest)
        return _entries(files, pattern, inner) if files.isdir(inner) else {inner: files.info(inner)}

    try:
        found = remote.retrying(pattern, "listing", entries)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error) if remote.is_remote(pattern) else f"{pattern}: no such file") from error
    if not rest and list(found) == [inner]:
        suffix(pattern)
        return [_document_file(files, pattern, inner, found[inner])]
    fixed, _ = _fixed(files, inner)
    suffixes = SUFFIXES if rest.endswith(_PLAIN_JSON) else _FOUND_SUFFIXES
    readable = {name: facts for name, facts in found.items() if _is_readable(name.removeprefix(fixed), suffixes)}
    if not readable:
        raise FileNotFoundError(f"{pattern}: no file there ends in {', '.join(SUFFIXES)}")

    def manifests() -> list[str]:
        return [name for name in beside(readable, fixed.rstrip("/")) if files.exists(name)]

    there = remote.retrying(pattern, "listing", manifests) if rest else found
    outputs = Outputs(files, pattern, there)
    chosen = {
        name: _document_file(files, pattern, name, facts) for name, facts in readable.items() if outputs.hold(name)
    }
    outputs.check({name: file.bytes for name, file in chosen.items()}, is_complete=not rest)
    if not chosen:
        raise FileNotFoundError(f"{pattern}: no file there holds documents, as {MANIFEST_NAME} says")
    return list(chosen.values())


_FOUND_SUFFIXES = tuple(end for end in SUFFIXES if end != _PLAIN_JSON)


def _split(files: Any, inner: str) -> tuple[str, str]:
    """A path, cut before the first piece that is a pattern; a piece that is there under its own name is none."""
    if not _MAGIC.search(inner) or files.exists(inner):
        return inner, ""
    pieces = inner.split("/")
    for count, piece in enumerate(pieces):
        if _MAGIC.search(piece) and not files.exists("/".join(pieces[: count + 1])):
            return "/".join(pieces[:count]), "/".join(pieces[count:])
    return inner, ""


def _fixed(files: Any, inner: str) -> tuple[str, str]:
    """The folder in which an input looks, and a regular expression of the paths that it names."""
    literal, rest = _split(files, inner)
    if rest:
        return literal, glob_translate(f"{glob.escape(literal)}/{rest}")
    return inner, re.escape(inner.rstrip("/")) + "/.*"


def _matching(files: Any, url: str, literal: str, rest: str) -> dict[str, Any]:
    """The entries that a pattern names below the folder `literal`."""
    if remote.is_remote(url):
        return files.glob(f"{glob.escape(literal)}/{rest}" if literal else rest, detail=True)
    wanted = re.compile(glob_translate(f"{glob.escape(literal)}/{rest}"))
    depth = None if "**" in rest else rest.count("/") + 1
    return {name: facts for name, facts in _walk(literal or "/", depth) if wanted.fullmatch(name)}


def _entries(files: Any, url: str, folder: str) -> dict[str, Any]:
    """Everything below a folder but folders."""
    if not remote.is_remote(url):
        return dict(_walk(folder, None))
    found = remote.retrying(url, "listing", lambda: files.find(folder, detail=True))
    return {name: facts for name, facts in found.items() if facts["type"] == "file"}


def _walk(folder: str, depth: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, facts) of what is no folder, through links, each folder once."""
    pending, seen = [(folder, 1)], set()
    while pending:
        place, level = pending.pop()
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir():
                    if depth is None or level < depth:
                        pending.append((entry.path, level + 1))
                else:
                    yield entry.path, {}


def _is_readable(name: str, suffixes: Sequence[str] = SUFFIXES) -> bool:
    hidden = any(piece.startswith(("_", ".")) for piece in name.split("/"))
    return name.endswith(tuple(suffixes)) and not hidden


def _document_file(
    files: Any, pattern: str, name: str, facts: Mapping[str, Any], *, is_absolute: bool = False
) -> DocumentFile:
    if remote.is_remote(pattern.removeprefix("file://")):
        path = files.unstrip_protocol(name)
        version = next((str(facts[key]) for key in _VERSIONS if facts.get(key)), "")
        return DocumentFile(path, int(facts["size"]), version)
    check_regular(name)
    path = name if is_absolute or os.path.isabs(pattern) else os.path.relpath(name)
    return DocumentFile(path, os.stat(name).st_size)
