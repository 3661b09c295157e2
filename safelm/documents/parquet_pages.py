"""The pages of a Parquet file by their headers: how much Arrow will take to decode them.

A page is decompressed as a whole, and every value of a dictionary may stand in every row: a file of some kilobytes can
ask for gigabytes. The footer says sizes too, but nothing holds the pages to it. Both are read here, structs in Thrift's
compact form: of a column chunk in a damaged footer pyarrow may end the process instead of raising.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

MAX_PAGE_BYTES = 256 << 20  # uncompressed; writers make pages of about a megabyte
_DICTIONARY = 2  # among the types of pages
_HEADER_BYTES = 1 << 16  # read at once; a header is some tens of bytes, with statistics at most some thousands
_MOST_NESTED = 16
_END = b"PAR1"
_CODECS = dict(enumerate(("none", "snappy", "gzip", "lzo", "brotli", "lz4", "zstd", "lz4")))  # 7: LZ4 without a frame


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A column's part of a row group.

    Attributes:
      name: the column's, fields of structs behind dots.
      begin, stop: where its pages lie in the file.
      codec: how its pages are compressed, by pyarrow's name for it.
      num_nulls: by its statistics; None where they don't tell.
    """

    name: str
    begin: int
    stop: int
    codec: str
    num_nulls: int | None


def read_footer(path: str, file: BinaryIO) -> list[list[Chunk]]:
    """The column chunks of every row group. ValueError for a damaged footer."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _END or length > size - 8:
        raise ValueError(f"{path}: not Parquet, damaged or cut short")
    file.seek(size - 8 - length)
    try:
        groups = _Thrift(file.read(length)).struct()[4]
        return [[_chunk(each[3]) for each in group[1]] for group in groups]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged: its footer can't be read") from None


def check(path: str, file: BinaryIO, group: int, chunks: Sequence[Chunk], columns: Sequence[str] | None) -> int:
    """The largest value (bytes) that a dictionary in the columns of a row group can hold; 0 without dictionaries.

    Args:
      file: the Parquet file, at any place.
      columns: names, fields of structs as `struct.field`; None for all.

    Raises:
      ValueError: a page of more than MAX_PAGE_BYTES, or none where one should be.
    """
    largest = 0
    for chunk in chunks:
        if columns is not None and not any(chunk.name == each or chunk.name.startswith(f"{each}.") for each in columns):
            continue
        try:
            for kind, size in pages(file, chunk):
                if size > MAX_PAGE_BYTES:
                    raise ValueError(f"a page of {size} bytes, more than {MAX_PAGE_BYTES}: leave out the long value")
                largest = max(largest, size * (kind == _DICTIONARY))
        except ValueError as error:
            raise ValueError(f"{path}: row group {group}, column {chunk.name!r}: {error}") from None
    return largest


def pages(file: BinaryIO, chunk: Chunk) -> Iterator[tuple[int, int]]:
    """Type and uncompressed size of every page of a column chunk."""
    at = chunk.begin
    while at < chunk.stop:
        file.seek(at)
        data = _Thrift(file.read(_HEADER_BYTES))
        try:
            header = data.struct()
            kind, size, compressed = (header[field] for field in (1, 2, 3))
            if not (kind >= 0 and size >= 0 and compressed >= 0):
                raise ValueError("below zero")
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"damaged: no page at byte {at}") from None
        yield kind, size
        at += data.at + compressed


def _chunk(facts: Any) -> Chunk:
    """A chunk by the ColumnMetaData of a footer; ValueError, KeyError or TypeError where it is damaged."""
    name = ".".join(part.decode() for part in facts[3])
    begin = min((offset for offset in (facts[9], facts.get(11)) if offset), default=0)  # data pages, dictionary
    if begin < 0 or (facts[7] and not begin):  # a chunk of no rows may have no page
        raise ValueError(f"begins at {begin}")
    num_nulls = facts.get(12, {}).get(3)
    if not isinstance(num_nulls, int | None):
        raise ValueError(f"{num_nulls} nulls")
    return Chunk(name, begin, begin + facts[7], _CODECS[facts[4]], num_nulls)


class _Thrift:
    """Values in Thrift's compact form; ValueError or IndexError where there are none."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Fields by their numbers."""
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            found[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MOST_NESTED:
            raise ValueError("nested too deeply")
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (7, 8):
            return self._bytes(8 if kind == 7 else self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            if count > len(self.data):
                raise ValueError("a list longer than the data")
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"type {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("cut short")
        return self.data[self.at - count : self.at]

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _unsigned(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("no number")
