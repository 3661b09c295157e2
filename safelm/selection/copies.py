"""Finds copies by sorting hashes: exact ones by a hash of the text, near ones by MinHash and bands (datasketch, MIT).

Hashes go to files by their first bits and are sorted file by file, so memory doesn't grow with the corpus: a bit a
document and `part_bytes`. Of copies the one with the highest harm score stays, of these the first in the order of keys.

Near-duplicates (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3): documents that agree in a band of
their signatures are compared with the first of the band, by the share of equal values among 128 (the last byte of
each, with the correction of Li and Koenig 2010 for bytes that agree by chance).
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt32, UInt64

from safelm.safety.synthesis.gates.duplicates import PERMUTATIONS, VERSION, signature
from safelm.selection.keys import KEY_BITS, mixed
from safelm.tags import MAX_SCORE

__all__ = ["PERMUTATIONS", "VERSION", "Copies", "Marks", "bands", "mark", "order", "signature"]

PART_BYTES = 512 << 20
_MAX_BITS = 9  # as many files are open at once
_SCORE_BITS = 3
_CHANCE = 1 / 256  # two bytes agree


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


@dataclasses.dataclass(frozen=True)
class CopyMarks:
    """What `mark` finds.

    Attributes:
      all: the documents that are copies of one before them.
      early: those of them whose first document comes before `limit` in the order; None where nobody asks.
    """

    all: Marks
    early: Marks | None = None
    limit: int = 0


@dataclasses.dataclass(frozen=True)
class Copies:
    """Some documents with what tells their copies.

    Attributes:
      number_N: of the documents.
      order_N: the first in this order stays.
      hash_NH: documents that agree in all H are compared.
      sketch_NP: one byte of each value of the signature; None where equal hashes make a copy.
    """

    number_N: Int[np.ndarray, " N"]
    order_N: UInt64[np.ndarray, " N"]
    hash_NH: UInt64[np.ndarray, "N H"]
    sketch_NP: UInt8[np.ndarray, "N P"] | None = None

    def records(self) -> np.ndarray:
        """The same as an array of records."""
        sketch_NP = np.zeros((len(self.number_N), 0), np.uint8) if self.sketch_NP is None else self.sketch_NP
        kind = _record(self.hash_NH.shape[1], sketch_NP.shape[1])
        records = np.empty(len(self.number_N), kind)
        records["hash"], records["order"], records["number"] = self.hash_NH, self.order_N, self.number_N
        records["sketch"] = sketch_NP
        return records


def order(score_N: Int[np.ndarray, " N"], key_N: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """The order in which copies stay: the highest harm score first (-1 for none), then by key."""
    rank_N = (MAX_SCORE - score_N).astype(np.uint64)
    return (rank_N << np.uint64(KEY_BITS - _SCORE_BITS + 1)) | (key_N >> np.uint64(_SCORE_BITS - 1))


@functools.cache
def band_shape(similarity: float) -> tuple[int, int]:
    """(bands, values a band) that find pairs of this similarity; of the errors, missing one weighs four times."""
    import datasketch

    index = datasketch.MinHashLSH(threshold=min(similarity, 0.95), num_perm=PERMUTATIONS, weights=(0.2, 0.8))
    return index.b, index.r


def bands(signatures_NP: UInt32[np.ndarray, "N P"], similarity: float) -> UInt64[np.ndarray, "N bands"]:
    """A hash of each band of the signatures."""
    count, width = band_shape(similarity)
    values_NBW = signatures_NP[:, : count * width].reshape(-1, count, width).astype(np.uint64)
    hash_NB = np.zeros(values_NBW.shape[:2], np.uint64)
    for at in range(width):
        hash_NB = mixed(hash_NB ^ values_NBW[..., at]) + np.uint64(at)
    return hash_NB


def mark(parts: Iterable[Copies], total: int, folder: str, marks: CopyMarks, similarity: float = 0.0) -> None:
    """Marks every document that is a copy of one before it.

    Args:
      parts: all documents, in parts that fit in memory.
      total: about how many there are.
      folder: a local one for the files of hashes; those are removed.
      similarity: from which two documents that agree in their hash are copies; 0 for all.
    """
    for records in _sorted_apart(parts, total, folder):
        records = records[np.lexsort((records["number"], records["order"], *records["hash"].T[::-1]))]
        is_new_N = np.ones(len(records), np.bool_)
        is_new_N[1:] = (records["hash"][1:] != records["hash"][:-1]).any(axis=1)
        first_N = np.maximum.accumulate(np.where(is_new_N, np.arange(len(records)), 0))
        is_copy_N = ~is_new_N
        if similarity:
            at_M = np.flatnonzero(is_copy_N)
            alike_M = _similarity(records["sketch"], at_M, first_N[at_M])
            is_copy_N[at_M[alike_M < similarity - 1e-9]] = False
        marks.all.add(records["number"][is_copy_N].astype(np.int64))
        if marks.early is not None:
            is_early_N = is_copy_N & (records["order"][first_N] < np.uint64(marks.limit))
            marks.early.add(records["number"][is_early_N].astype(np.int64))


def _similarity(
    sketch_NP: UInt8[np.ndarray, "N P"], one_M: Int[np.ndarray, " M"], other_M: Int[np.ndarray, " M"]
) -> Float[np.ndarray, " M"]:
    blocks = [np.zeros(0)]
    for at in range(0, len(one_M), 1 << 16):
        some = slice(at, at + (1 << 16))
        blocks.append((sketch_NP[one_M[some]] == sketch_NP[other_M[some]]).mean(axis=1))
    return (np.concatenate(blocks) - _CHANCE) / (1 - _CHANCE)


def _sorted_apart(parts: Iterable[Copies], total: int, folder: str) -> Iterator[np.ndarray]:
    """Records in groups that hold all of a hash each, through files if they don't fit in memory at once."""
    parts = iter(parts)
    first = next(parts, None)
    if first is None:
        return
    head = first.records()
    bits = int(np.ceil(np.log2(max(1.0, total * head.dtype.itemsize / PART_BYTES))))
    bits = min(bits, _MAX_BITS)
    if not bits:
        yield np.concatenate([head, *(part.records() for part in parts)])
        return
    files = [open(os.path.join(folder, f"hashes-{index}"), "wb") for index in range(1 << bits)]
    try:
        for records in (head, *(part.records() for part in parts)):
            place_N = (mixed(records["hash"][:, 0]) >> np.uint64(64 - bits)).astype(np.int64)
            for index in np.unique(place_N).tolist():
                files[index].write(records[place_N == index].tobytes())
    finally:
        for file in files:
            file.close()
    for file in files:
        records = np.fromfile(file.name, head.dtype)
        os.remove(file.name)
        yield records


def _record(hashes: int, sketch: int) -> np.dtype:
    fields = [("hash", np.uint64, (hashes,)), ("order", np.uint64), ("number", np.uint64)]
    return np.dtype([*fields, ("sketch", np.uint8, (sketch,))])
