"""The folders that our commands write: which of their files hold documents.

Their `manifest.json` says so: `files`, each name in the folder with its `bytes`, and `written_by`, the command. Other
files below such a folder (reports, pairs for review, logs) are never taken for documents, unless an input names them or
the folder below it that they lie in. A folder that a command began (`_settings.json`) and has not finished is refused.
"""

import os
import posixpath
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from safelm.io import records, remote

MANIFEST_NAME, SETTINGS_NAME = "manifest.json", "_settings.json"
WRITTEN_BY = "written_by"


def declare_no_documents(folder: str, command: str) -> None:
    """Writes a manifest without files, if there is none: nothing below the folder is a document."""
    manifest = {WRITTEN_BY: command, "files": {}}
    path = f"{folder.rstrip('/')}/{MANIFEST_NAME}"
    if remote.is_remote(path):
        files, inner = remote.filesystem(path)
        is_there = remote.retrying(path, "reading", lambda: files.exists(inner))
    else:
        is_there = os.path.exists(path)
    if not is_there:
        records.write(path, manifest)


def beside(names: Iterable[str], root: str) -> set[str]:
    """Where manifests and settings of the folders from `root` down to each name would lie."""
    folders = {root}
    for name in names:
        folder = posixpath.dirname(name)
        while len(folder) > len(root) and folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    return {f"{folder}/{name}" for folder in folders for name in (MANIFEST_NAME, SETTINGS_NAME)}


class Outputs:
    """What the manifests found below an input say."""

    def __init__(self, files: Any, url: str, there: Collection[str]):
        """Reads those of `there` (paths of the file system `files`) that are manifests or settings.

        Raises ValueError for an unfinished folder.
        """
        self._sizes: dict[str, dict[str, int]] = {}  # folder -> path -> bytes
        chosen = sorted(name for name in there if posixpath.basename(name) in (MANIFEST_NAME, SETTINGS_NAME))
        unfinished = set()
        for name in chosen:  # a folder's settings come before its manifest
            values = _read(files, url, name)
            if values is None:
                continue
            folder = posixpath.dirname(name)
            if posixpath.basename(name) == SETTINGS_NAME:
                unfinished.add(folder)
            elif isinstance(values.get("files"), Mapping):
                unfinished.discard(folder)
                self._sizes[folder] = {f"{folder}/{file}": _size(facts) for file, facts in values["files"].items()}
        for folder in sorted(unfinished):
            raise ValueError(f"{folder}: not finished, it has no {MANIFEST_NAME}: run the command that wrote it again")

    def hold(self, name: str) -> bool:
        """Whether a file is a document's: listed by the nearest manifest above it, or below none."""
        folder = posixpath.dirname(name)
        while folder and folder not in self._sizes:
            above = posixpath.dirname(folder)
            folder = above if above != folder else ""
        return not folder or name in self._sizes[folder]

    def check(self, sizes: Mapping[str, int], *, is_complete: bool) -> None:
        """Raises ValueError for a listed file of another size and, in a complete listing, for one that isn't there."""
        for folder, listed in self._sizes.items():
            for name, size in listed.items():
                found = sizes.get(name)
                if found != size and (is_complete or found is not None):
                    shown = "is missing" if found is None else f"has {found} bytes"
                    raise ValueError(
                        f"{name}: {shown}, and {folder}/{MANIFEST_NAME} lists it with {size}: run the command that "
                        "wrote the folder again"
                    )


def _size(facts: Any) -> int:
    """The bytes that a manifest lists for a file; where it is damaged -1, which no file has."""
    return facts.get("bytes", -1) if isinstance(facts, Mapping) else -1


def _read(files: Any, url: str, name: str) -> Mapping[str, Any] | None:
    """A manifest or settings of ours; None for what others call so."""
    try:
        values = records.parse(remote.retrying(url, "reading", lambda: files.cat_file(name)), name, "")
    except ValueError:
        return None
    return values if WRITTEN_BY in values else None
