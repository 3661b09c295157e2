"""Annotations: what is known of the rows of a corpus, in small Parquet files beside it, joined back by row.

A folder of annotations has a Parquet file for each file of the corpus, of the same name below the folder (`.parquet`
for whatever the corpus has), with a row for every row of that file in its order, the column `row` (its number there,
from 1; of JSON lines the number of the line) and others, such as `harm_score`. It also has the corpus's `id`, which is
data: rows are never found by it, since ids may be repeated or missing. The file's metadata say which input it was made
from, by size and a hash of its beginning and end (of Parquet the footer with all row groups), wherever it lies.

Folders are named by a flag, `--annotations=A,B`. Two with the same column are refused; `NAME=A` puts `NAME_` before the
columns of one.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from safelm.documents import parquet
from safelm.documents.files import PARQUET, SUFFIXES, DocumentFile, file_at, sample_sha256
from safelm.documents.json_lines import Part
from safelm.documents.outputs import MANIFEST_NAME, SETTINGS_NAME
from safelm.io import remote

ROW, ID = "row", "id"
METADATA = b"safelm_annotations"
_NAMED = re.compile(r"([A-Za-z]\w*)=(.+)")


@dataclasses.dataclass(frozen=True)
class AnnotationFolder:
    """A folder of annotations; with a `name` its columns begin with it."""

    folder: str
    name: str = ""

    @property
    def identity(self) -> list[str]:
        """What changes when the folder is annotated anew: its name and the hash of its manifest."""
        files, inner = remote.filesystem(f"{self.folder}/{MANIFEST_NAME}")
        data = remote.retrying(self.folder, "reading", functools.partial(files.cat_file, inner))
        return [self.name, hashlib.sha256(data).hexdigest()]

    def column(self, own: str) -> str:
        """What a column of its files is called beside the corpus's columns."""
        return f"{self.name}_{own}" if self.name else own


def parse(text: str | None) -> tuple[AnnotationFolder, ...]:
    """The folders of a flag, by comma. Raises ValueError for one that is unfinished or named twice."""
    folders = []
    for piece in filter(None, (piece.strip() for piece in (text or "").split(","))):
        named = _NAMED.fullmatch(piece)
        name, folder = named.groups() if named else ("", piece)
        folders.append(AnnotationFolder(folder.rstrip("/"), name))
    for each in folders:
        if folders.count(each) > 1:
            raise ValueError(f"--annotations: {each.folder} is named twice")
        if not _exists(f"{each.folder}/{MANIFEST_NAME}"):
            if _exists(f"{each.folder}/{SETTINGS_NAME}"):
                raise ValueError(f"--annotations: {each.folder} is not finished: run the command that wrote it again")
            raise FileNotFoundError(f"--annotations: {each.folder}: no annotations there, it has no {MANIFEST_NAME}")
    return tuple(folders)


def input_facts(file: DocumentFile) -> dict[str, Any]:
    """What tells a file from others wherever it lies: its size and a hash of its beginning and end."""
    return {"bytes": file.bytes, "sha256": sample_sha256(file, whole_footer=True)}


def names(paths: Sequence[str]) -> list[str]:
    """The names of the files of annotations of these files: their places below the folder that holds them all."""
    inner = [_inner(path) for path in paths]
    root = os.path.commonpath([posixpath.dirname(path) for path in inner]) if inner else ""
    places = [posixpath.relpath(path, root or ".") for path in inner]
    short = [_stem(place) + PARQUET for place in places]
    if len(set(short)) == len(short):
        return short
    counts: dict[str, int] = {}
    for name in short:
        counts[name] = counts.get(name, 0) + 1
    return [name if counts[name] == 1 else place + PARQUET for name, place in zip(short, places, strict=True)]


def of_file(path: str, folder: AnnotationFolder) -> str:
    """The file of a folder that annotates the file `path`: of its name, and made from it.

    Raises FileNotFoundError or ValueError that names both where there is none.
    """
    facts, wrong = None, ""
    for place in filter(_exists, _candidates(path, folder.folder)):
        facts = facts or input_facts(file_at(path))
        with parquet.open_parquet(place) as table:
            made_from = _made_from(place, table)
        if all(made_from.get(key) == value for key, value in facts.items()):
            return place
        if made_from.get("bytes") != facts["bytes"]:
            differs = f"of {made_from.get('bytes')} bytes, and {path} has {facts['bytes']}"
        else:
            differs = f"of as many bytes as {path} has, but of other content or row groups"
        wrong = wrong or f"{place}: was made from another input, {differs}: annotate the corpus again"
    if wrong:
        raise ValueError(wrong)
    raise FileNotFoundError(f"{folder.folder}: no annotations of {path}: no file there has its name")


def versions(path: str, folders: Sequence[AnnotationFolder]) -> list[Any]:
    """What changes when the annotations of a file do."""
    return [[each.name, input_facts(file_at(of_file(path, each)))] for each in folders]


def column_names(path: str, folders: Sequence[AnnotationFolder]) -> tuple[str, ...]:
    """The columns that the annotations of a file add to its rows. Raises as `FileAnnotations` does."""
    with contextlib.ExitStack() as files:
        return FileAnnotations(path, folders, files).names


class FileAnnotations:
    """The annotations of one file from every folder, to be joined to its rows in their order.

    Attributes:
      names: of the columns that are added.
    """

    def __init__(
        self,
        path: str,
        folders: Sequence[AnnotationFolder],
        files: contextlib.ExitStack,
        wanted: Collection[str] | None = None,
    ):
        """`files` closes what is opened; `wanted` are the only columns to read.

        Raises as `of_file`, and ValueError for a column that two folders have.
        """
        self._path, self._columns = path, _Columns()
        self._readers = [_Reader(path, folder, self._columns, files, wanted) for folder in folders]
        self.names = tuple(name for reader in self._readers for name in reader.names)

    def check_free(self, present: Collection[str]) -> None:
        """Raises ValueError if the file itself already has one of the columns."""
        if taken := set(present) & set(self.names):
            owner = self._columns.owners[min(taken)]
            raise ValueError(
                f"{self._path}: it already has a column {min(taken)!r}, as {owner.folder} has; {_advice(owner)}"
            )

    def required(self, required: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
        """Those requirements of columns that no annotation meets."""
        return {name: any_of for name, any_of in required.items() if not set(any_of) & set(self.names)}

    def join(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its annotations. Raises ValueError that names the file of annotations that lacks the row."""
        self.check_free(row.keys())
        joined = dict(row)
        for reader in self._readers:
            joined |= reader.at(number)
        return joined

    def check_rows(self, rows: int) -> None:
        """Raises ValueError unless every file of annotations has as many rows as were read of the input."""
        for reader in self._readers:
            if reader.rows != rows:
                raise ValueError(f"{reader.place}: has {reader.rows} rows, {self._path} has {rows}")

    def batches(self, numbers: Sequence[int]) -> list[tuple[str, Any]]:
        """(column, Arrow array) of every added column for consecutive rows of the file."""
        return [column for reader in self._readers for column in reader.arrays(numbers)]

    def types(self) -> list[tuple[str, Any]]:
        """(column, Arrow type) of every added column."""
        return [column for reader in self._readers for column in reader.types]


@dataclasses.dataclass
class _Columns:
    """Which folder each added column comes from."""

    owners: dict[str, AnnotationFolder] = dataclasses.field(default_factory=dict)

    def add(self, name: str, folder: AnnotationFolder) -> None:
        if name in self.owners:
            raise ValueError(
                f"{self.owners[name].folder} and {folder.folder}: both have a column {name!r}; {_advice(folder)}"
            )
        self.owners[name] = folder


class _Reader:
    """One file of annotations, read forward in bounded memory."""

    def __init__(
        self,
        path: str,
        folder: AnnotationFolder,
        columns: _Columns,
        files: contextlib.ExitStack,
        wanted: Collection[str] | None,
    ):
        self.place, self._path = of_file(path, folder), path
        with parquet.open_parquet(self.place) as table:
            schema, facts = table.schema_arrow, table.metadata
            if ROW not in schema.names:
                raise ValueError(f"{self.place}: missing column {ROW!r}: these are no annotations")
            self.rows = facts.num_rows
            self._last = [_last_row(facts.row_group(group), ROW) for group in range(facts.num_row_groups)]
            if path.endswith(PARQUET):
                self._check_whole(path)
        own = [field for field in schema if field.name not in (ROW, ID)]
        for field in own:
            columns.add(folder.column(field.name), folder)
        own = [field for field in own if wanted is None or folder.column(field.name) in wanted]
        self._own = {field.name: folder.column(field.name) for field in own}
        self.names, self.types = tuple(self._own.values()), [(folder.column(field.name), field.type) for field in own]
        self._batches: Iterator[tuple[int, Any]] | None = None
        self._batch: Any = None
        self._numbers: list[int] = []
        self._values: list[dict[str, Any]] = []
        self._at = 0
        self._files = files

    def _check_whole(self, path: str) -> None:
        with parquet.open_parquet(path) as table:
            if table.metadata.num_rows != self.rows:
                raise ValueError(f"{self.place}: has {self.rows} rows, {path} has {table.metadata.num_rows}")

    def at(self, number: int) -> dict[str, Any]:
        """The annotations of a row; numbers must rise from call to call."""
        if not self._own:
            return {}
        self._go_to(number)
        if not self._values:
            self._values = self._batch.select(list(self._own)).rename_columns(list(self.names)).to_pylist()
        return self._values[self._at]

    def arrays(self, numbers: Sequence[int]) -> list[tuple[str, Any]]:
        """(column, Arrow array) for rows; numbers must rise from call to call."""
        import pyarrow

        pieces = []
        wanted = list(numbers) if self._own else []
        while wanted:
            self._go_to(wanted[0])
            count = 0
            while count < len(wanted) and self._at + count < len(self._numbers):
                if self._numbers[self._at + count] != wanted[count]:
                    break
                count += 1
            pieces.append(self._batch.select(list(self._own)).slice(self._at, count))
            wanted = wanted[count:]
        if not pieces:
            return [(name, pyarrow.array([], kind)) for name, kind in self.types]
        whole = pyarrow.Table.from_batches(pieces).combine_chunks()
        chunks = [pyarrow.concat_arrays(whole.column(own).chunks) for own in self._own]
        return list(zip(self.names, chunks, strict=True))

    def _go_to(self, number: int) -> None:
        if self._batches is None:
            self._batches = self._read(number)
        while self._at < len(self._numbers) and self._numbers[self._at] < number:
            self._at += 1
        while self._at == len(self._numbers):
            following = next(self._batches, None)
            if following is None:
                break
            self._batch, self._values, self._at = following[1], [], 0
            self._numbers = self._batch.column(0).to_pylist()
            while self._at < len(self._numbers) and self._numbers[self._at] < number:
                self._at += 1
        if self._at == len(self._numbers) or self._numbers[self._at] != number:
            raise ValueError(f"{self.place}: lacks row {number} of {self._path}: annotate the corpus again")

    def _read(self, number: int) -> Iterator[tuple[int, Any]]:
        groups = len(self._last)
        first = next((group for group, last in enumerate(self._last) if last is None or last >= number), groups)
        batches = parquet.iter_parquet(
            self.place, [ROW, *self._own], text_column=None, groups=Part(first, groups), rows=_ROWS
        )
        self._files.callback(batches.close)
        for start, batch in batches:
            yield start, batch.select([ROW, *self._own])


_ROWS = 1 << 14  # at once


def _last_row(group: Any, name: str) -> int | None:
    """The highest value of a column of integers in a row group, where the footer says it."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == name:
            found = column.statistics
            return found.max if found is not None and found.has_min_max else None
    return None


def _advice(folder: AnnotationFolder) -> str:
    return f"name the folder, NAME={folder.folder}, and its columns begin with NAME_"


def _candidates(path: str, folder: str) -> list[str]:
    """The places where annotations of a file may lie, the nearest name first."""
    pieces = _inner(path).strip("/").split("/")
    places = ["/".join(pieces[start:]) for start in range(len(pieces) - 1, -1, -1)]
    return [f"{folder}/{name}{PARQUET}" for place in places for name in dict.fromkeys((_stem(place), place))]


def _stem(name: str) -> str:
    end = next((end for end in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(end)), "")
    return name.removesuffix(end)


def _inner(path: str) -> str:
    _, inner = remote.filesystem(path)
    return inner.replace("\\", "/")


def _exists(path: str) -> bool:
    return remote.exists(path)


def _made_from(place: str, table: Any) -> Mapping[str, Any]:
    """What the metadata of a file of annotations say of its input. Raises ValueError if it says nothing."""
    try:
        found = json.loads((table.schema_arrow.metadata or {})[METADATA])["input"]
    except (KeyError, ValueError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{place}: these are no annotations: its metadata name no input")
    return found
