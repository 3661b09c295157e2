"""A file that is read in byte ranges, as a stream."""

import io
import os
from collections.abc import Callable
from typing import Any


class RangeReader(io.RawIOBase):
    """A seekable stream over `read`, which returns the bytes [start, stop) of a file of `size` bytes."""

    def __init__(self, read: Callable[[int, int], bytes], size: int):
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._read(self._at, stop)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)
