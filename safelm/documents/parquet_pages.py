"""The pages of a Parquet file's column chunks, by their headers: how much Arrow will take to decode them.

A page is decompressed as a whole, and every value of a dictionary may stand in every row: a file of some kilobytes can
ask for gigabytes. Footers say sizes too, but nothing holds them to it. Headers are structs in Thrift's compact form.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

MAX_PAGE_BYTES = 256 << 20  # uncompressed; writers make pages of about a megabyte
_DICTIONARY = 2  # among the types of pages
_HEADER_BYTES = 1 << 16  # read at once; a header is some tens of bytes, with statistics at most some thousands
_MOST_NESTED = 16


def check(path: str, file: BinaryIO, metadata: Any, group: int, columns: Sequence[str] | None) -> int:
    """The largest value (bytes) that a dictionary in the columns of a row group can hold; 0 without dictionaries.

    Args:
      file: the Parquet file, at any place.
      metadata: its footer, as pyarrow has it.
      columns: names, fields of structs as `struct.field`; None for all.

    Raises:
      ValueError: a page of more than MAX_PAGE_BYTES, or none where one should be.
    """
    facts, largest = metadata.row_group(group), 0
    for index in range(facts.num_columns):
        chunk = facts.column(index)
        name = chunk.path_in_schema
        if columns is not None and not any(name == each or name.startswith(f"{each}.") for each in columns):
            continue
        try:
            for kind, size in _pages(file, chunk):
                if size > MAX_PAGE_BYTES:
                    raise ValueError(
                        f"a page of {size} bytes, more than {MAX_PAGE_BYTES}: leave the row out or write smaller pages"
                    )
                largest = max(largest, size * (kind == _DICTIONARY))
        except ValueError as error:
            raise ValueError(f"{path}: row group {group}, column {name!r}: {error}") from None
    return largest


def _pages(file: BinaryIO, chunk: Any) -> Iterator[tuple[int, int]]:
    """Type and uncompressed size of every page of a column chunk."""
    offsets = [chunk.data_page_offset, chunk.dictionary_page_offset if chunk.has_dictionary_page else None]
    at = begin = min(offset for offset in offsets if offset is not None)
    while at < begin + chunk.total_compressed_size:
        file.seek(at)
        data = io.BytesIO(file.read(_HEADER_BYTES))
        try:
            header = _struct(data)
            kind, size, compressed = (header[field] for field in (1, 2, 3))
        except (ValueError, KeyError, IndexError):
            raise ValueError(f"damaged: no page at byte {at}") from None
        if not all(isinstance(value, int) and value >= 0 for value in (kind, size, compressed)):
            raise ValueError(f"damaged: no page at byte {at}")
        yield kind, size
        at += data.tell() + compressed


def _struct(data: io.BytesIO, depth: int = 0) -> dict[int, int | None]:
    """A struct's integers by the numbers of their fields; other fields are None."""
    if depth > _MOST_NESTED:
        raise ValueError("nested too deeply")
    found: dict[int, int | None] = {}
    number = 0
    while head := data.read(1)[0]:
        number = number + (head >> 4) if head >> 4 else _integer(data)
        found[number] = _value(data, head & 15, depth)
    return found


def _value(data: io.BytesIO, kind: int, depth: int) -> int | None:
    """A value of a compact type; None for what is no integer."""
    if kind in (1, 2):  # true and false, in the field's own head
        return None
    if kind == 3:
        data.read(1)
    elif kind in (4, 5, 6):
        return _integer(data)
    elif kind == 7:
        data.read(8)
    elif kind == 8:
        data.seek(_unsigned(data), io.SEEK_CUR)
    elif kind == 12:
        _struct(data, depth + 1)
    else:  # lists, sets and maps, which no page header has
        raise ValueError(f"type {kind}")
    return None


def _integer(data: io.BytesIO) -> int:
    value = _unsigned(data)
    return (value >> 1) ^ -(value & 1)


def _unsigned(data: io.BytesIO) -> int:
    value = shift = 0
    while True:
        byte = data.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
        if shift > 63:
            raise ValueError("no number")
