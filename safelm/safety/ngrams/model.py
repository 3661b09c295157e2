"""The harm value of a text: a linear function of the words and n-grams in its worst window.

A window's value is a bias and the sum of its features' weights over the square root of their number. Weights are 8-bit
whole numbers with one scale, so a sum is exact and a score the same on every machine. A text is as harmful as its worst
window of 128 words (Maini et al. 2025, 3.1, take the worst chunk); one without words is not harmful.
"""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int8, Int32, Int64

from safelm.safety.ngrams import features

NO_WORDS = -30.0  # a logit
_BLOCK_CHARACTERS = 1 << 18  # texts are worked on in blocks of so many, longer ones in pieces: bounded memory
_KEPT_BITS = 17  # words whose sums are kept at hand


class NgramModel:
    """Weights by bucket.

    Attributes:
      table_B: the weight of each of 2 ** bits buckets, in units of `scale`.
      scale: a unit.
      bias: what is added to the value of a window with words.
    """

    def __init__(self, table_B: Int8[np.ndarray, " B"], scale: float, bias: float):
        self.table_B, self.scale, self.bias = table_B, float(scale), float(bias)
        self._bits = len(table_B).bit_length() - 1
        if len(table_B) != 1 << self._bits:
            raise ValueError(f"{len(table_B)} weights: not a power of two")
        self._kept = _Kept()
        self._lock = threading.Lock()

    def values(self, texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """The harm value of each text: `NO_WORDS` for one without words."""
        highest_N = np.full(len(texts), -np.inf)
        for text_n, pieces in _blocks(texts):
            value_W, text_W = self.window_values(pieces)
            np.maximum.at(highest_N, text_n[text_W], value_W)
        return highest_N

    def window_values(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, " W"], Int64[np.ndarray, " W"]]:
        """The harm value of every window, and the text it is of."""
        found = features.words(texts)
        with self._lock:
            sum_M, count_M = self._word_sums(found)
        windows = len(found.text_W)
        sum_W = np.bincount(found.window_M, sum_M, windows)
        count_W = np.bincount(found.window_M, count_M, windows)
        value_W = self.bias + self.scale * sum_W / np.sqrt(np.maximum(count_W, 1))
        return np.where(count_W > 0, value_W, NO_WORDS), found.text_W

    def _word_sums(self, found: features.Words) -> tuple[Int32[np.ndarray, " M"], Int32[np.ndarray, " M"]]:
        """The sum of each word's weights, and how many there are."""
        kept, slot_M = self._kept, (found.hash_M & np.uint64((1 << _KEPT_BITS) - 1)).astype(np.int64)
        sum_M, count_M = kept.sum[slot_M], kept.count[slot_M]
        missing = np.flatnonzero(kept.hash[slot_M] != found.hash_M)
        if len(missing):
            _, first, again = np.unique(found.hash_M[missing], return_index=True, return_inverse=True)
            chosen = missing[first]
            bucket_F, count_U = features.word_features(found, chosen, self._bits)
            sum_U = np.add.reduceat(self.table_B[bucket_F].astype(np.int32), np.cumsum(count_U) - count_U)
            sum_M[missing], count_M[missing] = sum_U[again], count_U[again]
            kept.hash[slot_M[chosen]] = found.hash_M[chosen]
            kept.sum[slot_M[chosen]], kept.count[slot_M[chosen]] = sum_U, count_U
        return sum_M, count_M


class _Kept:
    """Sums of words met before: one word a slot, the latest."""

    def __init__(self) -> None:
        size = 1 << _KEPT_BITS
        self.hash, self.sum, self.count = np.zeros(size, np.uint64), np.zeros(size, np.int32), np.zeros(size, np.int32)


def _blocks(texts: Sequence[str]) -> Iterator[tuple[Int64[np.ndarray, " n"], list[str]]]:
    """Pieces of texts in blocks of about equal size, and the text each piece is of."""
    rows: list[int] = []
    pieces: list[str] = []
    characters = 0
    for row, text in enumerate(texts):
        for start in range(0, max(len(text), 1), _BLOCK_CHARACTERS):
            piece = text[start : start + _BLOCK_CHARACTERS]
            if pieces and characters + len(piece) > _BLOCK_CHARACTERS:
                yield np.asarray(rows), pieces
                rows, pieces, characters = [], [], 0
            rows.append(row)
            pieces.append(piece)
            characters += len(piece)
    if pieces:
        yield np.asarray(rows), pieces
