"""Finds the files that an input names: a file, a folder or a pattern, local or remote. See `safelm.documents`."""

import collections
import dataclasses
import fnmatch
import glob
import hashlib
import logging
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fsspec.utils import glob_translate

from safelm.documents.opening import PACKED, check_regular
from safelm.documents.outputs import MANIFEST_NAME, Outputs, beside
from safelm.io import hub, remote

_logger = logging.getLogger(__name__)

PARQUET = ".parquet"
SUFFIXES = (*(f"{kind}{end}" for kind in (".jsonl", ".ndjson", ".json") for end in ("", *PACKED)), PARQUET)
TSV_SUFFIXES = (".tsv", *(f".tsv{end}" for end in PACKED))
_PLAIN_JSON = ".json"  # often a side file: only taken where an input names it
_NEVER_DOCUMENTS = (MANIFEST_NAME, ".md", ".png", ".svg", ".html", ".py")  # not worth a warning where they aren't read
_SHOWN_UNREAD = 3  # names in that warning
_SAMPLE_BYTES = 1 << 16
_MAGIC = re.compile(r"[*?[]")
# What file systems call the hash or version of a file's content, the surest first.
_VERSIONS = ("md5Hash", "crc32c", "etag", "ETag", "blob_id")
_MOST_NAMES = 10_000  # of a folder that links lead to
# A file of a numbered set; in what `jobs.file_shards` writes of one, a number of its own stands before.
_OF_A_SET = re.compile(r"(?P<stem>.*(?<!-\d{6})-)(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?(?P<suffix>\.[^/]*)")
_REAL = "real"  # fact of a local file that a walk found: its path without links to folders


@dataclasses.dataclass(frozen=True)
class DocumentFile:
    """An input file.

    Attributes:
      bytes: its size.
      version: the store's identifier for a remote file's content; "" for a local file.
    """

    path: str
    bytes: int
    version: str = ""


def list_files(patterns: str | Sequence[str]) -> list[str]:
    """The files that one or more inputs name, sorted, without duplicates.

    A line warns of files in a folder that are not read. Raises FileNotFoundError if an input names nothing, ValueError
    for an unsupported format or something that is not a file.
    """
    return [file.path for file in find(patterns)]


def find(patterns: str | Sequence[str]) -> list[DocumentFile]:
    """Like `list_files`, with the sizes and versions that the listing contains."""
    found: dict[str, DocumentFile] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found |= {file.path: file for file in _find(pattern)}
    if not found:
        raise ValueError("no input is named")
    return [found[path] for path in sorted(found)]


def find_named(folder: str, names: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[str]:
    """Sorted paths of the files below a folder with one of the names (perhaps with `*`) and suffixes; may be empty.

    Warns of a set of numbered files, such as train-00000-of-00004.parquet, that isn't whole.
    """
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
    named = [name for name in found if name.endswith(tuple(suffixes)) and _has_name(name, names)]
    _warn_of_missing(named)
    others = [name for name in entries if _has_name(name, names) and outputs.hold(name)]
    if unread := [name for name in _unread(inner, others, named) if not name.endswith((*SUFFIXES, *suffixes))]:
        _logger.warning("%s: %s", folder, _counted(inner, unread))
    return sorted(found[name].path for name in _once(named, entries))


def _has_name(path: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(posixpath.basename(path), wanted) for wanted in names)


def _warn_of_missing(names: Iterable[str]) -> None:
    """One line for each set of numbered files that lacks some: part of a published set, or an unfinished copy."""
    sets: dict[tuple[str, str, str], set[int]] = collections.defaultdict(set)
    for match in filter(None, map(_OF_A_SET.fullmatch, names)):
        sets[match["stem"], match["count"], match["suffix"]].add(int(match["index"]))
    for (stem, count, end), found in sorted(sets.items()):
        if missing := set(range(int(count))) - found:
            first = f"{stem}{min(missing):05d}-of-{count}{end}"
            _logger.warning("%s: is missing; there are %d of %d, which are read alone", first, len(found), int(count))


def file_at(path: str) -> DocumentFile:
    """A single file. Raises FileNotFoundError if there is none."""
    files, inner = remote.filesystem(path)
    if not remote.is_remote(path):
        check_regular(inner)
    facts = remote.retrying(path, "reading", lambda: files.info(inner))
    return dataclasses.replace(_document_file(files, path, inner, facts), path=path)


def check_apart(patterns: Sequence[str], output: str) -> None:
    """Raises ValueError if an input, listed again later, would include what a run writes into the folder `output`."""
    _, folder = remote.filesystem(output.rstrip("/"))
    for pattern in patterns:
        files, inner = remote.filesystem(pattern)
        fixed, wanted = _fixed(files, pattern, inner)
        written = [f"{folder}{place}/train-000000-web{end}" for place in ("", "/score=0") for end in SUFFIXES]
        is_here = remote.is_remote(pattern) == remote.is_remote(output)
        if is_here and any(re.fullmatch(wanted, name) and _is_readable(name.removeprefix(fixed)) for name in written):
            raise ValueError(f"--output {output} lies in --input {pattern}, which would then include its own output")


def suffix(path: str) -> str:
    """The one of SUFFIXES in which a path ends. Raises ValueError for any other."""
    for known in SUFFIXES:
        if path.endswith(known):
            return known
    raise ValueError(f"{path}: not a file this can read (one of {', '.join(SUFFIXES)})")


def describe(file: DocumentFile) -> dict[str, Any]:
    """Facts that identify a file's content: size and version, or a hash of its beginning and end if it has no version.

    The end of a gzip or Parquet file has a checksum or the footer, so a changed content shows there.
    """
    if file.version:
        return {"path": file.path, "bytes": file.bytes, "version": file.version}
    return {"path": file.path, "bytes": file.bytes, "sample_sha256": sample_sha256(file)}


def sample_sha256(file: DocumentFile, *, whole_footer: bool = False) -> str:
    """SHA-256 (hex) of a file's beginning and end, wherever it lies.

    With `whole_footer` the end of a Parquet file is all of its footer, however long: sizes, statistics and the number
    of rows of every row group.
    """
    files, inner = remote.filesystem(file.path)

    def read() -> str:
        digest = hashlib.sha256(files.cat_file(inner, 0, min(file.bytes, _SAMPLE_BYTES)))
        if file.bytes > _SAMPLE_BYTES:
            tail = files.cat_file(inner, file.bytes - _SAMPLE_BYTES, file.bytes)
            footer = int.from_bytes(tail[-8:-4], "little") + 8 if whole_footer and tail[-4:] == b"PAR1" else 0
            if _SAMPLE_BYTES < footer <= file.bytes:
                tail = files.cat_file(inner, file.bytes - footer, file.bytes)
            digest.update(tail)
        return digest.hexdigest()

    return remote.retrying(file.path, "reading", read)


def without_place(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of `describe` with the file's name instead of its path, so that a moved copy is the same input."""
    return {"name": os.path.basename(facts["path"])} | {key: value for key, value in facts.items() if key != "path"}


def content_sha256(path: str) -> dict[str, Any]:
    """SHA-256 and modification time (ns) of a whole local file; {} for a remote one.

    Raises ValueError if the file changes meanwhile.
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
    """Whether a local file's content differs from when `content_sha256` gave `former`.

    The file is only read if its modification time differs, since copying or touching a file changes that alone.
    """
    if not former or remote.is_remote(path) or os.stat(path).st_mtime_ns == former["mtime_ns"]:
        return False
    return content_sha256(path)["sha256"] != former["sha256"]


def _find(pattern: str) -> list[DocumentFile]:
    if not pattern:
        raise ValueError("an input is empty")
    if hub.is_name(pattern):
        raise ValueError(f"{pattern}: documents of a hub are named hf://datasets/ORG/NAME[@REVISION][/FILES]")
    files, inner = remote.filesystem(pattern)
    literal, rest = _split(files, pattern, inner)

    def entries() -> Mapping[str, Any]:
        if rest:
            return _matching(files, pattern, literal, rest)
        facts = files.info(inner)
        return _entries(files, pattern, inner) if facts["type"] == "directory" else {inner: facts}

    try:
        found = remote.retrying(pattern, "listing", entries)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error) if remote.is_remote(pattern) else f"{pattern}: no such file") from error
    if not rest and list(found) == [inner]:
        suffix(pattern)
        return [_document_file(files, pattern, inner, found[inner])]
    fixed, _ = _fixed(files, pattern, inner)
    suffixes = SUFFIXES if rest.endswith(_PLAIN_JSON) else _FOUND_SUFFIXES
    readable = {name: facts for name, facts in found.items() if _is_readable(name.removeprefix(fixed), suffixes)}
    unread = _unread(fixed, found, readable)
    if not readable:
        there = f"; {_counted(fixed, unread)}" if unread else ""
        raise FileNotFoundError(f"{pattern}: no file there ends in {', '.join(suffixes)}{there}")

    def manifests() -> list[str]:
        return [name for name in beside(readable, fixed.rstrip("/")) if files.exists(name)]

    there = remote.retrying(pattern, "listing", manifests) if rest else found
    outputs = Outputs(files, pattern, there)
    if unread := list(filter(outputs.hold, unread)):
        _logger.warning("%s: %s", pattern, _counted(fixed, unread))
    chosen = {
        name: _document_file(files, pattern, name, facts) for name, facts in readable.items() if outputs.hold(name)
    }
    outputs.check({name: file.bytes for name, file in chosen.items()}, is_complete=not rest)
    if not chosen:
        raise FileNotFoundError(f"{pattern}: no file there holds documents, as {MANIFEST_NAME} says")
    return [chosen[name] for name in _once(chosen, found)]


_FOUND_SUFFIXES = tuple(end for end in SUFFIXES if end != _PLAIN_JSON)


def _unread(folder: str, found: Iterable[str], read: Collection[str]) -> list[str]:
    """Those of the files found below a folder that aren't read although they may be documents."""
    left = (name for name in found if name not in read and not name.endswith(_NEVER_DOCUMENTS))
    return sorted(name for name in left if not _is_hidden(name.removeprefix(folder)))


def _counted(folder: str, unread: Sequence[str]) -> str:
    """How many files aren't read, the first ones by name, and how plain `.json` is."""
    names = ", ".join(name.removeprefix(folder).lstrip("/") for name in unread[:_SHOWN_UNREAD])
    more = f" and {len(unread) - _SHOWN_UNREAD:,} more" if len(unread) > _SHOWN_UNREAD else ""
    counted = f"{len(unread):,} files there aren't" if len(unread) > 1 else "1 file there isn't"
    is_plain = any(name.endswith(_PLAIN_JSON) for name in unread)
    how = f"; {_PLAIN_JSON} is read where an input names it, such as FOLDER/*{_PLAIN_JSON}" if is_plain else ""
    return f"{counted} read: {names}{more}{how}"


def _split(files: Any, pattern: str, inner: str) -> tuple[str, str]:
    """Splits a path before its first pattern component; a component that exists literally is not a pattern."""

    def exists(name: str) -> bool:
        return remote.retrying(pattern, "listing", lambda: files.exists(name))

    if not _MAGIC.search(inner) or exists(inner):
        return inner, ""
    pieces = inner.split("/")
    for count, piece in enumerate(pieces):
        if _MAGIC.search(piece) and not exists("/".join(pieces[: count + 1])):
            return "/".join(pieces[:count]), "/".join(pieces[count:])
    return inner, ""


def _fixed(files: Any, pattern: str, inner: str) -> tuple[str, str]:
    """The folder in which an input is searched, and a regular expression for the paths that it names."""
    literal, rest = _split(files, pattern, inner)
    if rest:
        return literal, glob_translate(f"{glob.escape(literal)}/{rest}")
    return inner, re.escape(inner.rstrip("/")) + "/.*"


def _matching(files: Any, url: str, literal: str, rest: str) -> dict[str, Any]:
    """The entries below the folder `literal` that a pattern matches."""
    if remote.is_remote(url):
        return files.glob(f"{glob.escape(literal)}/{rest}" if literal else rest, detail=True)
    wanted = re.compile(glob_translate(f"{glob.escape(literal)}/{rest}"))
    depth = None if "**" in rest else rest.count("/") + 1
    return {name: facts for name, facts in _walk(literal or "/", depth) if wanted.fullmatch(name)}


def _entries(files: Any, url: str, folder: str) -> dict[str, Any]:
    """All entries below a folder except folders."""
    if not remote.is_remote(url):
        return dict(_walk(folder, None))
    found = remote.retrying(url, "listing", lambda: files.find(folder, detail=True))
    return {name: facts for name, facts in found.items() if facts["type"] == "file"}


def _walk(folder: str, depth: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, facts) of everything below a folder that isn't a folder, in an order that depends on names only.

    Links are followed, but not into a folder that they lie in. What is reached by several names is found by each, by
    that without links first. Raises ValueError for a folder with more names than `_MOST_NAMES`: folders that link to
    each other have as many as there are ways through them.
    """
    names: collections.Counter[str] = collections.Counter()
    folders, links = collections.deque([(folder, 1, frozenset())]), collections.deque()
    while folders or links:
        place, level, around = (folders or links).popleft()
        if (real := os.path.realpath(place)) in around:
            continue
        names[real] += 1
        if names[real] > _MOST_NAMES:
            raise ValueError(f"{place}: links lead there in more than {_MOST_NAMES:,} ways")
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.is_dir():
                    yield entry.path, {_REAL: os.path.join(real, entry.name)}
                elif depth is None or level < depth:
                    (links if entry.is_symlink() else folders).append((entry.path, level + 1, around | {real}))


def _once(names: Iterable[str], entries: Mapping[str, Any]) -> list[str]:
    """The names without those that links to folders give a file besides its first one."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(entries[name].get(_REAL, name), name)
    return list(first.values())


def _is_readable(name: str, suffixes: Sequence[str] = SUFFIXES) -> bool:
    return name.endswith(tuple(suffixes)) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(piece.startswith(("_", ".")) for piece in name.split("/"))


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
