"""Finds near-duplicates among the drafts: MinHash signatures and locality-sensitive hashing (datasketch, MIT).

Shards compute signatures; one pass over them in a fixed order decides, so the same documents stay however the work was
divided (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3).
"""

import functools
from collections.abc import Hashable
from typing import Any

import numpy as np
from jaxtyping import UInt32, UInt64

from safelm.io.hashed import mixed
from safelm.safety.synthesis.gates.words import words

PERMUTATIONS = 128
SHINGLE_WORDS = 5
_SCHEME = "affine32"
_SEED = 1
VERSION = f"datasketch-{_SCHEME}-{PERMUTATIONS}-{SHINGLE_WORDS}-{_SEED}"  # signatures of another one can't be compared


def signature(text: str) -> UInt32[np.ndarray, " 128"]:
    """The MinHash of the text's word 5-grams (of all its words together if it has fewer).

    Raises OSError if datasketch is not installed.
    """
    found = words(text).words
    grams = {" ".join(found[i : i + SHINGLE_WORDS]).encode() for i in range(max(len(found) - SHINGLE_WORDS + 1, 1))}
    sketch = _library().MinHash(num_perm=PERMUTATIONS, seed=_SEED, scheme=_SCHEME, permutations=_permutations())
    sketch.update_batch(grams)
    return sketch.hashvalues.astype(np.uint32)


@functools.cache
def band_shape(similarity: float) -> tuple[int, int]:
    """(bands, values a band) that find pairs of this similarity; of the errors, missing one weighs four times."""
    index = _index(similarity)
    return index.b, index.r


def bands(signatures_NP: UInt32[np.ndarray, "N P"], similarity: float) -> UInt64[np.ndarray, "N bands"]:
    """A hash of each band of the signatures."""
    count, width = band_shape(similarity)
    values_NBW = signatures_NP[:, : count * width].reshape(-1, count, width).astype(np.uint64)
    hash_NB = np.zeros(values_NBW.shape[:2], np.uint64)
    for at in range(width):
        hash_NB = mixed(hash_NB ^ values_NBW[..., at]) + np.uint64(at)
    return hash_NB


def check_threshold(threshold: int | float) -> None:
    """Raises ValueError for a similarity from which no documents can be near-duplicates."""
    if not 0 < threshold <= 1:
        raise ValueError(f"duplicate_threshold={threshold}: must be above 0 and at most 1")


class Duplicates:
    """The documents seen so far, without near-duplicates.

    Memory is about 7 KB a document: for some hundred thousand. `DuplicateIndex` decides the same on disk.

    Args:
      threshold: estimated Jaccard similarity of word 5-grams from which two documents are near-duplicates.
    """

    def __init__(self, threshold: int | float = 0.7):
        check_threshold(threshold)
        self.threshold = threshold
        self._index = _index(threshold)
        self._signatures: dict[Hashable, Any] = {}
        self._order: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._order)

    def add(self, key: Hashable, signature: UInt32[np.ndarray, " 128"]) -> Hashable | None:
        """Adds a document and returns None, or returns the key of the first document that it nearly repeats.

        A near-duplicate is not added. The same documents in the same order give the same answers. Raises ValueError for
        a key that was already added.
        """
        if key in self._order:
            raise ValueError(f"near-duplicates: {key!r} was added before")
        sketch = _library().MinHash(hashvalues=signature, seed=_SEED, scheme=_SCHEME, permutations=_permutations())
        for other in sorted(self._index.query(sketch), key=self._order.__getitem__):
            if np.mean(self._signatures[other] == signature) >= self.threshold:
                return other
        self._index.insert(key, sketch)
        self._signatures[key], self._order[key] = np.array(signature, np.uint32), len(self._order)
        return None


def _index(similarity: int | float) -> Any:
    # Found too many rather than too few: every candidate's similarity is computed before it counts.
    return _library().MinHashLSH(threshold=min(similarity, 0.95), num_perm=PERMUTATIONS, weights=(0.2, 0.8))


@functools.cache
def _library() -> Any:
    try:
        import datasketch
    except ModuleNotFoundError as error:
        raise OSError("removing near-duplicates needs datasketch: scripts/install.sh synthesis") from error
    return datasketch


@functools.cache
def _permutations() -> Any:
    return _library().MinHash(num_perm=PERMUTATIONS, seed=_SEED, scheme=_SCHEME).permutations
