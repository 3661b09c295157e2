"""Finds equal hashes among more records than fit in memory: files by a hash's first bits, a bit a record.

Records go to files by their hash and are then sorted file by file, so memory doesn't grow with their number. Files are
opened for each write, so a process's limit of open files doesn't bound them.
"""

import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int, UInt64

PART_BYTES = 64 << 20
_BUFFER_BYTES = 8 << 20
_MAX_BITS = 12


def mixed(values: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The finalizer of SplitMix64 (Steele et al. 2014): a bijection in which every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Marks:
    """A bit for each document, by number."""

    def __init__(self, documents: int):
        self._bits = np.zeros(-(-documents // 8), np.uint8)

    def add(self, numbers: Int[np.ndarray, " M"]) -> None:
        """Sets bits."""
        np.bitwise_or.at(self._bits, numbers >> 3, np.left_shift(1, numbers & 7).astype(np.uint8))

    def get(self, start: int, stop: int) -> Bool[np.ndarray, " N"]:
        """The bits of the documents from `start` to `stop`."""
        first = start >> 3
        bits = np.unpackbits(self._bits[first : -(-stop // 8)], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].astype(np.bool_)


class HashedFiles:
    """Records in files by the first bits of their hash, so that equal hashes are in one file.

    Args:
      folder: a local one, for these files alone.
      kind: of the records.
      total: about how many records there will be; a file takes about `part_bytes` of them.
    """

    def __init__(self, folder: str, kind: np.dtype, total: int, part_bytes: int | None = None):
        wanted = total * kind.itemsize / (part_bytes or PART_BYTES)
        self._bits = min(int(np.ceil(np.log2(max(1.0, wanted)))), _MAX_BITS)
        self._folder, self._kind = folder, kind
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._bytes = 0
        os.makedirs(folder, exist_ok=True)

    def add(self, records: np.ndarray, hash_N: UInt64[np.ndarray, " N"]) -> None:
        """Adds records with their hashes."""
        if not len(records):
            return
        shift = np.uint64(64 - self._bits)
        place_N = hash_N >> shift if self._bits else np.zeros_like(hash_N)
        self._waiting.append((records, place_N.astype(np.uint16)))
        self._bytes += records.nbytes
        if self._bytes >= _BUFFER_BYTES:
            self._write()

    def read(self) -> Iterator[np.ndarray]:
        """The records of each file, files by ascending hash and records as they were added; removes them."""
        self._write()
        for place in range(1 << self._bits):
            path = self._path(place)
            if os.path.exists(path):
                records = np.fromfile(path, self._kind)
                os.remove(path)
                yield records
        os.rmdir(self._folder)

    def _write(self) -> None:
        if not self._waiting:
            return
        records, place_N = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        order_N = np.argsort(place_N, kind="stable")
        records, place_N = records[order_N], place_N[order_N]
        places, starts = np.unique(place_N, return_index=True)
        for place, some in zip(places.tolist(), np.split(records, starts[1:]), strict=True):
            with open(self._path(place), "ab") as file:
                file.write(some.tobytes())
        self._waiting, self._bytes = [], 0

    def _path(self, place: int) -> str:
        return os.path.join(self._folder, f"hashes-{place:04d}")
