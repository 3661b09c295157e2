"""Finds near-duplicates among any number of documents with an index on disk; decides what `Duplicates` decides.

The rule: documents come in order, and one is left out if its signature agrees in a band with that of an earlier one
that stayed, and in at least `threshold` of all values. It repeats the first such document.

    1. add      a hash of each band of every signature goes to files by its first bits
    2. group    each file is sorted: a cell for every document that shares a band with another one
    3. first_like   those documents in order; signatures and names of the ones that stay are kept, on disk

Memory is some parts of a few ten megabytes, whatever the number of documents. The disk takes 12 bytes a band (18 bands
at a threshold of 0.7) and document, and 0.6 KB for each that shares a band and stays.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64, UInt32

from safelm.io.hashed import HashedFiles, mixed
from safelm.safety.synthesis.gates.duplicates import PERMUTATIONS, band_shape, bands, check_threshold

_BAND = np.dtype([("hash", "<u8"), ("number", "<u4")])
_ENTRY = np.dtype([("cell", "<u8"), ("number", "<u4")])
_AT_ONCE = 1 << 14  # signatures
_FIRST_ROWS = 1 << 10
_ZEROS_AT_ONCE = 1 << 20  # bytes, where the system reserves none


class DuplicateIndex:
    """The near-duplicates among documents with the numbers from 0 to below `total`.

    Args:
      folder: a local one, for this index's files alone.
      threshold: estimated Jaccard similarity of word 5-grams from which two documents are near-duplicates.
    """

    def __init__(self, folder: str, total: int, threshold: int | float):
        check_threshold(threshold)
        if total >= 1 << 32:
            raise ValueError(f"near-duplicates: {total} documents, at most {(1 << 32) - 1} can be compared")
        self._folder, self._total, self._threshold = folder, total, threshold
        self._num_bands, _ = band_shape(threshold)
        self._bands = HashedFiles(os.path.join(folder, "bands"), _BAND, total * self._num_bands)
        self._added = 0
        self._entries: Iterator[np.ndarray] = iter(())
        self._waiting = np.zeros(0, _ENTRY)
        self._members: UInt32[np.ndarray, " cells"] = np.zeros(0, np.uint32)
        self._signatures = _Rows(os.path.join(folder, "signatures"), PERMUTATIONS)
        self._names = _Names(os.path.join(folder, "names"))

    def add(self, signatures_NP: UInt32[np.ndarray, "N 128"]) -> None:
        """Adds the next documents."""
        for at in range(0, len(signatures_NP), _AT_ONCE):
            some_NP = signatures_NP[at : at + _AT_ONCE]
            salt_B = np.arange(self._num_bands, dtype=np.uint64)  # a value of one band is no value of another
            records_NB = np.empty((len(some_NP), self._num_bands), _BAND)
            records_NB["hash"] = mixed(bands(some_NP, self._threshold) + salt_B)
            records_NB["number"] = np.arange(self._added, self._added + len(some_NP))[:, None]
            records_N = records_NB.reshape(-1)
            self._bands.add(records_N, np.ascontiguousarray(records_N["hash"]))
            self._added += len(some_NP)

    def group(self) -> None:
        """Finds which of the added documents share a band with another one."""
        entries = HashedFiles(os.path.join(self._folder, "entries"), _ENTRY, self._total * self._num_bands)
        scale = np.uint64(((1 << 64) - 1) // max(self._total, 1))  # so files hold ranges of numbers
        cells = 0
        for records in self._bands.read():
            shared, cells = _shared(records, cells)
            entries.add(shared, shared["number"].astype(np.uint64) * scale)
        self._entries, self._members = entries.read(), _mapped(os.path.join(self._folder, "members"), cells)

    def shared(self, start: int, stop: int) -> Iterator[tuple[int, Int64[np.ndarray, " K"]]]:
        """The documents from `start` to `stop` that share a band with another one, each with its K cells.

        To be asked for ranges in ascending order, once each.
        """
        while not len(self._waiting) or self._waiting["number"][-1] < stop:
            more = next(self._entries, None)
            if more is None:
                break
            more = more[np.argsort(more["number"], kind="stable")]
            self._waiting = np.concatenate([self._waiting, more])
        count = int(np.searchsorted(self._waiting["number"], stop))
        found, self._waiting = self._waiting[:count], self._waiting[count:]
        cells_M = found["cell"].astype(np.int64)
        numbers, starts = np.unique(found["number"], return_index=True)
        yield from zip(numbers.tolist(), np.split(cells_M, starts[1:]), strict=False)

    def first_like(
        self, cells_K: Int64[np.ndarray, " K"], signature: UInt32[np.ndarray, " 128"], name: str
    ) -> str | None:
        """Keeps a document and returns None, or returns the name of the first one that it nearly repeats.

        Args:
          cells_K: as `shared` gives them, document after document.
        """
        members = self._members
        spans = zip(cells_K.tolist(), members[cells_K].tolist(), strict=True)
        candidates_M = np.unique(np.concatenate([members[cell + 1 : cell + 1 + count] for cell, count in spans]))
        for at in range(0, len(candidates_M), _AT_ONCE):
            some_M = candidates_M[at : at + _AT_ONCE]
            alike_M = (self._signatures.get(some_M) == signature).mean(axis=1) >= self._threshold
            if alike_M.any():
                return self._names.get(int(some_M[np.argmax(alike_M)]))
        place = self._signatures.add(signature)
        self._names.add(name)
        members[cells_K] += 1
        members[cells_K + members[cells_K]] = place
        return None

    def close(self) -> None:
        """Closes the files; they may be removed then."""
        self._signatures.close()
        self._names.close()

    def __enter__(self) -> "DuplicateIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shared(records: np.ndarray, cells: int) -> tuple[np.ndarray, int]:
    """Entries of the records whose hash others have too, a group of n with n + 1 cells behind the first `cells`.

    A group's first cell counts the members that stay, whose places are in the cells behind it.
    """
    hash_N = np.ascontiguousarray(records["hash"])
    order_N = np.argsort(hash_N, kind="stable")
    hash_N = hash_N[order_N]
    starts = np.flatnonzero(np.concatenate([[True], hash_N[1:] != hash_N[:-1]]))
    sizes = np.diff(starts, append=len(hash_N))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    ends = np.cumsum(sizes)
    at_M = np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)
    found = np.empty(len(at_M), _ENTRY)
    found["number"] = records["number"][order_N[at_M]]
    found["cell"] = cells + np.repeat(ends - sizes + np.arange(len(sizes)), sizes)
    return found, cells + len(at_M) + len(sizes)


def _mapped(path: str, length: int) -> np.ndarray:
    """A mapped file of 32-bit zeros. Raises OSError naming it if the disk has no room for it."""
    with open(path, "ab") as file:
        try:
            _reserve(file, max(4 * length, 1))  # a write to a hole on a full disk ends a process
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
    return np.memmap(path, np.uint32, "r+", 0, (length,)) if length else np.zeros(0, np.uint32)


def _reserve(file: BinaryIO, size: int) -> None:
    """Makes a file at least that long (bytes), of zeros behind its end, with the room for it on the disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    left = size - os.fstat(file.fileno()).st_size
    while left > 0:
        left -= file.write(bytes(min(left, _ZEROS_AT_ONCE)))
    file.flush()


class _Rows:
    """Rows of 32-bit integers in a mapped file that grows."""

    def __init__(self, path: str, width: int):
        self._path, self._width, self._rows = path, width, 0
        self._mapped = np.zeros((0, width), np.uint32)

    def add(self, row: UInt32[np.ndarray, " width"]) -> int:
        if self._rows == len(self._mapped):
            more = max(2 * self._rows, _FIRST_ROWS) if self._rows < 1 << 20 else self._rows + (1 << 20)
            self._mapped = _mapped(self._path, more * self._width).reshape(more, self._width)
        self._mapped[self._rows] = row
        self._rows += 1
        return self._rows - 1

    def get(self, places_M: UInt32[np.ndarray, " M"]) -> UInt32[np.ndarray, "M width"]:
        return np.asarray(self._mapped[places_M])

    def close(self) -> None:
        self._mapped = np.zeros((0, self._width), np.uint32)


class _Names:
    """Strings in a file, by number."""

    def __init__(self, path: str):
        self._files = contextlib.ExitStack()
        self._text = self._files.enter_context(open(path, "w+b", buffering=0))
        self._ends = self._files.enter_context(open(f"{path}.ends", "w+b", buffering=0))
        self._bytes = 0

    def add(self, name: str) -> None:
        self._bytes += self._text.write(name.encode("utf-8", "surrogatepass"))
        self._ends.write(self._bytes.to_bytes(8, "little"))

    def get(self, number: int) -> str:
        ends = os.pread(self._ends.fileno(), 16, 8 * max(number - 1, 0))
        start = int.from_bytes(ends[:8], "little") if number else 0
        stop = int.from_bytes(ends[8:] if number else ends[:8], "little")
        return os.pread(self._text.fileno(), stop - start, start).decode("utf-8", "surrogatepass")

    def close(self) -> None:
        self._files.close()
