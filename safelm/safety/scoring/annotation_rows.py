"""Rows of a file as annotating reads them: number, id and text of every row, nothing else; text and id stay bytes.

Every row comes, also those whose text can't be used: they get no score and a flag.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from safelm import documents
from safelm.documents import Malformed, Part

CHUNK_CHARACTERS = 2048  # about the 512 tokens that a classifier takes at once
_BLOCK_ROWS, _BLOCK_BYTES = 1024, 8 << 20
_MOST_BYTES = 4  # of a character in UTF-8

OnMalformed = Callable[[Malformed], object]


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of a file.

    Attributes:
      row_N: numbers in the file, from 1.
      ids: an Arrow array of strings; null where a row has no id.
      texts: UTF-8 as it stands in the file, not yet checked; None where there is no text that can be used.
      is_cut_N: whether a text is longer than what is scored of it.
    """

    row_N: Int64[np.ndarray, " N"]
    ids: Any
    texts: list[bytes | None] = dataclasses.field(repr=False)
    is_cut_N: Bool[np.ndarray, " N"]


def read(
    path: str,
    part: Part | None,
    text_column: str,
    id_column: str,
    max_chunks: int,
    on_malformed: OnMalformed,
    *,
    is_numbered: bool = True,
) -> Iterator[Block]:
    """The rows of a file or of a part of one, in order.

    Args:
      max_chunks: of a text at most so many times CHUNK_CHARACTERS characters are kept, its beginning.
      on_malformed: called with each row whose text is missing, null or no text; it is in its block all the same.
      is_numbered: False where nobody needs to know the rows' numbers: lines of a part are then counted from its
        beginning, which saves reading what lies before it.
    """
    limit = max_chunks * CHUNK_CHARACTERS
    if path.endswith(documents.PARQUET):
        yield from _parquet(path, part, text_column, id_column, limit, on_malformed)
    else:
        yield from _json(path, part, text_column, id_column, limit, on_malformed, is_numbered=is_numbered)


def _parquet(
    path: str, part: Part | None, text_column: str, id_column: str, limit: int, on_malformed: OnMalformed
) -> Iterator[Block]:
    def columns(table: Any) -> list[str]:
        names = documents.field_names(table.schema_arrow)
        documents.check_columns(path, table.schema_arrow, list(documents.required_id(id_column)), text_column)
        return [text_column, *([id_column] if id_column in names and id_column != text_column else [])]

    for first, batch in documents.iter_parquet(path, columns, text_column=text_column, groups=part):
        texts, is_cut_N = _bytes(batch.column(text_column), limit)
        for offset, text in enumerate(texts):
            if text is None:
                on_malformed(Malformed(first + offset, f"field {text_column!r} is missing or null", ""))
        row_N = np.arange(first, first + batch.num_rows, dtype=np.int64)
        yield Block(row_N, _ids(batch, id_column), texts, is_cut_N)


def _bytes(column: Any, limit: int) -> tuple[list[bytes | None], Bool[np.ndarray, " N"]]:
    """A column's texts in UTF-8, of at most `limit` characters, and which were longer."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_dictionary(column.type) and len(column.dictionary) <= len(column):
        values, is_cut_D = _bytes(column.dictionary, limit)  # each value once, however many rows have it
        indices = column.indices.to_pylist()
        texts = [None if index is None else values[index] for index in indices]
        return texts, np.array([index is not None and bool(is_cut_D[index]) for index in indices], bool)
    if pyarrow.types.is_dictionary(column.type):
        try:
            column = column.dictionary_decode()
        except pyarrow.ArrowNotImplementedError:  # of string views
            column = pyarrow.array(column.to_pylist(), pyarrow.large_string())
    column = column.cast(pyarrow.large_binary())
    length_N = pyarrow.compute.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    if length_N.max(initial=0) <= limit:
        return column.to_pylist(), np.zeros(len(column), bool)
    texts, is_cut_N = [], np.zeros(len(column), bool)
    for index, length in enumerate(length_N.tolist()):
        if length <= limit:
            texts.append(column[index].as_py())
            continue
        begin = memoryview(column[index].as_buffer())[: limit * _MOST_BYTES]  # no copy of the rest
        text, is_cut_N[index] = _cut(bytes(begin), limit, is_whole=len(begin) == length)
        texts.append(text)
    return texts, is_cut_N


def _cut(begin: bytes, limit: int, *, is_whole: bool) -> tuple[bytes, bool]:
    """At most `limit` characters of a text of which `begin` is the beginning, and whether that leaves something out."""
    try:
        text = begin.decode("utf-8", "strict" if is_whole else "ignore")
    except UnicodeDecodeError:
        return begin, False  # malformed, as whoever decodes it will see
    return (text[:limit].encode(), True) if len(text) > limit or not is_whole else (begin, False)


def _ids(batch: Any, column: str) -> Any:
    """The ids of a batch as strings; null where it has none, or something else than strings and integers."""
    import pyarrow
    import pyarrow.compute

    nothing = pyarrow.nulls(batch.num_rows, pyarrow.string())
    found = batch
    outer, *inner = [column] if column in batch.schema.names else column.split(".")
    if outer not in batch.schema.names:
        return nothing
    found = batch.column(outer)
    for name in inner:
        found = pyarrow.compute.struct_field(found, name)
    if pyarrow.types.is_dictionary(found.type):
        found = found.dictionary_decode()
    try:
        if not pyarrow.types.is_integer(found.type):
            found = found.cast(pyarrow.large_binary())
        return found.cast(pyarrow.string())
    except pyarrow.ArrowException:
        return nothing


def _json(
    path: str,
    part: Part | None,
    text_column: str,
    id_column: str,
    limit: int,
    on_malformed: OnMalformed,
    *,
    is_numbered: bool,
) -> Iterator[Block]:
    @functools.cache
    def before() -> int:
        return documents.lines_before(path, part.start) if is_numbered and part is not None and part.start else 0

    pending = _Pending()

    def report(malformed: Malformed) -> None:
        number = before() + malformed.row
        pending.add(number, _id_in(malformed.raw, id_column), None, is_cut=False)
        on_malformed(Malformed(number, malformed.reason, ""))

    required = documents.required_id(id_column)
    for row in documents.iter_json(path, report, text_column=text_column, part=part, required=required):
        text = row.row[text_column]
        cut = text[:limit]
        pending.add(before() + row.number, _id(row.row, id_column), cut.encode(), is_cut=len(cut) < len(text))
        if pending.is_full:
            yield pending.block()
            pending.clear()
    if pending.rows:
        yield pending.block()


class _Pending:
    """Rows of JSON lines until they make a block."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.rows: list[int] = []
        self._ids: list[str | None] = []
        self._texts: list[bytes | None] = []
        self._is_cut: list[bool] = []
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= _BLOCK_ROWS or self._bytes >= _BLOCK_BYTES

    def add(self, number: int, identity: str | None, text: bytes | None, *, is_cut: bool) -> None:
        self.rows.append(number)
        self._ids.append(identity)
        self._texts.append(text)
        self._is_cut.append(is_cut)
        self._bytes += len(text or b"")

    def block(self) -> Block:
        import pyarrow

        ids = pyarrow.array(self._ids, pyarrow.string())
        return Block(np.array(self.rows, np.int64), ids, self._texts, np.array(self._is_cut, bool))


def _id_in(line: str, column: str) -> str | None:
    """The id in a line that can't be used otherwise."""
    try:
        return _id(json.loads(line), column)
    except (ValueError, RecursionError):
        return None


def _id(row: Any, column: str) -> str | None:
    value = documents.field(row, column)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).encode("utf-8", "backslashreplace").decode()
