"""Knows which files in the folders that our commands write hold documents.

Their `manifest.json` has `files`, which maps each document file's name to its `bytes`, and `written_by`, the command.
Other files in such a folder (reports, pairs for review, logs) are never read as documents, unless an input names them
or their subfolder. A folder that a command began (`_settings.json`) and has not finished is refused.
"""

import posixpath
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from safelm.io import records, remote

MANIFEST_NAME, SETTINGS_NAME = "manifest.json", "_settings.json"
WRITTEN_BY = "written_by"


def declare_no_documents(folder: str, command: str) -> None:
    """Writes a manifest without files, if there is none, so that nothing in the folder is read as a document."""
    manifest = {WRITTEN_BY: command, "files": {}}
    path = f"{folder.rstrip('/')}/{MANIFEST_NAME}"
    if not remote.exists(path):
        records.write(path, manifest)


def beside(names: Iterable[str], root: str) -> set[str]:
    """The paths of possible manifests and settings in the folders from `root` down to each name."""
    folders = {root}
    for name in names:
        folder = posixpath.dirname(name)
        while len(folder) > len(root) and folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    return {f"{folder}/{name}" for folder in folders for name in (MANIFEST_NAME, SETTINGS_NAME)}


class Outputs:
    """The manifests found below an input."""

    def __init__(self, files: Any, url: str, there: Collection[str]):
        """Reads the manifests and settings among the paths `there` of the file system `files`.

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
        """Whether a file holds documents: the nearest manifest above it lists it, or there is none."""
        folder = posixpath.dirname(name)
        while folder and folder not in self._sizes:
            above = posixpath.dirname(folder)
            folder = above if above != folder else ""
        return not folder or name in self._sizes[folder]

    def check(self, sizes: Mapping[str, int], *, is_complete: bool) -> None:
        """Raises ValueError if a listed file has another size or, in a complete listing, is missing."""
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
    """The size in bytes that a manifest lists for a file; -1, which no file has, if the entry is damaged."""
    return facts.get("bytes", -1) if isinstance(facts, Mapping) else -1


def _read(files: Any, url: str, name: str) -> Mapping[str, Any] | None:
    """A manifest or settings file of ours; None for another program's file of that name."""
    try:
        values = records.parse(remote.retrying(url, "reading", lambda: files.cat_file(name)), name, "")
    except ValueError:
        return None
    return values if WRITTEN_BY in values else None
