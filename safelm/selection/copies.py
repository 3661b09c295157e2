"""Finds copies by sorting hashes: exact ones by a hash of the text, near ones by MinHash and bands (datasketch, MIT).

Hashes go to files by their first bits and are sorted file by file, so memory doesn't grow with the corpus: a bit a
document and some times PART_BYTES. Of copies the one with the highest harm score stays, of these the first in the order
of keys.

Near-duplicates (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3): documents that agree in a band of
their signatures are compared with the first of the band, by the share of equal values among 128 (the last byte of
each, with the correction of Li and Koenig 2010 for bytes that agree by chance).
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt64

from safelm.io.hashed import HashedFiles, Marks, mixed
from safelm.safety.synthesis.gates.duplicates import PERMUTATIONS, VERSION, band_shape, bands, signature
from safelm.selection.keys import KEY_BITS
from safelm.tags import MAX_SCORE

__all__ = [
    "PERMUTATIONS",
    "VERSION",
    "Copies",
    "Marks",
    "band_shape",
    "bands",
    "mark",
    "order",
    "signature",
]

PART_BYTES = 512 << 20
_SCORE_BITS = 3
_CHANCE = 1 / 256  # two bytes agree


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


def mark(
    parts: Iterable[Copies],
    total: int,
    folder: str,
    marks: Marks,
    similarity: float = 0.0,
    *,
    limit: int | None = None,
) -> None:
    """Marks every document that is a copy of one before it.

    Args:
      parts: all documents, in parts that fit in memory.
      total: about how many there are.
      folder: a local one for the files of hashes; those are removed.
      similarity: from which two documents that agree in their hash are copies; 0 for all.
      limit: only copies of documents before this place in the order are marked; None for all.
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
        if limit is not None:
            is_copy_N &= records["order"][first_N] < np.uint64(limit)
        marks.add(records["number"][is_copy_N].astype(np.int64))


def _similarity(
    sketch_NP: UInt8[np.ndarray, "N P"], one_M: Int[np.ndarray, " M"], other_M: Int[np.ndarray, " M"]
) -> Float[np.ndarray, " M"]:
    blocks = [np.zeros(0)]
    for at in range(0, len(one_M), 1 << 16):
        some = slice(at, at + (1 << 16))
        blocks.append((sketch_NP[one_M[some]] == sketch_NP[other_M[some]]).mean(axis=1))
    return (np.concatenate(blocks) - _CHANCE) / (1 - _CHANCE)


def _sorted_apart(parts: Iterable[Copies], total: int, folder: str) -> Iterator[np.ndarray]:
    """Records in groups that hold all of a hash each, through files."""
    files = None
    for records in (part.records() for part in parts):
        files = files or HashedFiles(os.path.join(folder, "hashes"), records.dtype, total, PART_BYTES)
        files.add(records, mixed(records["hash"][:, 0]))
    if files:
        yield from files.read()


def _record(hashes: int, sketch: int) -> np.dtype:
    fields = [("hash", np.uint64, (hashes,)), ("order", np.uint64), ("number", np.uint64)]
    return np.dtype([*fields, ("sketch", np.uint8, (sketch,))])
