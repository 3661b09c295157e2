"""Texts to words, windows of words, and hashed features of each word, with whole arrays at a time.

A word is a run of letters, digits, ' * $ @ or bytes of other scripts in the lower-cased UTF-8 text. Its features are
itself and the character 3- to 5-grams of " word ", as in fastText (Bojanowski et al. 2017). A stretch of bytes is
hashed by a polynomial over its bytes modulo 2^64, so that differences of one cumulative sum give the hash of every
stretch at once. A feature's bucket is the upper bits of the hash, mixed.

Shapes: Y bytes, M words, F features, N texts.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

WINDOW_WORDS = 128
GRAM_SIZES = (3, 4, 5)
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
_SPACE = 32


def _byte_values() -> UInt64[np.ndarray, " 256"]:
    return mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(_BASE))


def _word_bytes() -> np.ndarray:
    is_word = np.zeros(256, bool)
    is_word[list(b"abcdefghijklmnopqrstuvwxyz0123456789'*$@")] = True
    is_word[128:] = True
    return is_word


def mixed(hash_F: UInt64[np.ndarray, " F"]) -> UInt64[np.ndarray, " F"]:
    """The hashes with every bit depending on every other (the finaliser of SplitMix64)."""
    hash_F = (hash_F ^ (hash_F >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hash_F = (hash_F ^ (hash_F >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hash_F ^ (hash_F >> np.uint64(31))


_VALUE, _IS_WORD = _byte_values(), _word_bytes()


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of some texts, each once a window.

    Attributes:
      bytes_Y: the lower-cased texts end to end.
      start_M, stop_M: where each word stands there.
      hash_M: equal for equal words.
      window_M: the window each is in, not falling.
      text_W: the text each window is of, not falling; a text without words has one window without any.
    """

    bytes_Y: UInt8[np.ndarray, " Y"]
    start_M: Int64[np.ndarray, " M"]
    stop_M: Int64[np.ndarray, " M"]
    hash_M: UInt64[np.ndarray, " M"]
    window_M: Int64[np.ndarray, " M"]
    text_W: Int64[np.ndarray, " W"]


def words(texts: Sequence[str], window_words: int = WINDOW_WORDS) -> Words:
    """The words of texts, cut into windows of equal size of at most `window_words`, no word twice in a window."""
    encoded = [text.lower().encode("utf-8", "replace") for text in texts]
    bytes_Y = np.frombuffer(b" " + b" ".join(encoded) + b" ", np.uint8)
    is_word_Y = _IS_WORD[bytes_Y]
    edges = np.flatnonzero(is_word_Y[1:] != is_word_Y[:-1]) + 1
    start_M, stop_M = edges[::2], edges[1::2]
    begin_N = 1 + np.cumsum([0, *(len(text) + 1 for text in encoded)])
    first_N = np.searchsorted(start_M, begin_N)  # of each text's words, and behind the last
    count_N = np.diff(first_N)
    windows_N = np.maximum(-(-count_N // window_words), 1)
    window_N = np.cumsum(windows_N) - windows_N
    place_M = np.arange(len(start_M)) - np.repeat(first_N[:-1], count_N)
    window_M = np.repeat(window_N, count_N) + place_M * np.repeat(windows_N, count_N) // np.repeat(count_N, count_N)
    hash_M = _stretches(bytes_Y, start_M, stop_M)
    key_M = mixed(hash_M + window_M.astype(np.uint64))
    order = np.argsort(key_M, kind="stable")
    kept = np.ones(len(order), bool)
    kept[1:] = key_M[order[1:]] != key_M[order[:-1]]
    chosen = np.sort(order[kept])
    return Words(
        bytes_Y,
        start_M[chosen],
        stop_M[chosen],
        hash_M[chosen],
        window_M[chosen],
        np.repeat(np.arange(len(texts)), windows_N),
    )


def word_features(
    found: Words, chosen: Int64[np.ndarray, " U"], bits: int
) -> tuple[Int64[np.ndarray, " F"], Int64[np.ndarray, " U"]]:
    """The buckets (of 2 ** bits) of the features of the chosen words, word by word, and how many each word has."""
    length_U = found.stop_M[chosen] - found.start_M[chosen]
    start_U = np.cumsum(length_U + 1) - length_U  # with one space before each word and behind it
    bytes_Y = np.full(int((length_U + 1).sum()) + 1, _SPACE, np.uint8)
    inside = ranges(length_U)
    bytes_Y[np.repeat(start_U, length_U) + inside] = found.bytes_Y[np.repeat(found.start_M[chosen], length_U) + inside]
    counts = [np.ones_like(length_U), *(np.maximum(length_U + 3 - size, 0) for size in GRAM_SIZES)]
    count_U = np.sum(counts, axis=0)
    place_U = np.cumsum(count_U) - count_U
    hash_F = np.empty(int(count_U.sum()), np.uint64)
    hash_F[place_U] = found.hash_M[chosen]
    place_U = place_U + 1
    for size, number_U in zip(GRAM_SIZES, counts[1:], strict=True):
        at = ranges(number_U)
        start = np.repeat(start_U - 1, number_U) + at
        hash_F[np.repeat(place_U, number_U) + at] = _stretches(bytes_Y, start, start + size) + np.uint64(size)
        place_U = place_U + number_U
    return (mixed(hash_F) >> np.uint64(64 - bits)).astype(np.int64), count_U


def ranges(count_U: Int64[np.ndarray, " U"]) -> Int64[np.ndarray, " F"]:
    """0 to count - 1 for each count, end to end."""
    return np.arange(int(count_U.sum())) - np.repeat(np.cumsum(count_U) - count_U, count_U)


def _stretches(
    bytes_Y: UInt8[np.ndarray, " Y"], start_F: Int64[np.ndarray, " F"], stop_F: Int64[np.ndarray, " F"]
) -> UInt64[np.ndarray, " F"]:
    """The hash of each stretch of bytes."""
    power, inverse = _powers(1 << len(bytes_Y).bit_length())
    sum_Y = np.zeros(len(bytes_Y) + 1, np.uint64)
    np.cumsum(_VALUE[bytes_Y] * power[: len(bytes_Y)], out=sum_Y[1:])
    return (sum_Y[stop_F] - sum_Y[start_F]) * inverse[start_F]


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> tuple[UInt64[np.ndarray, " Y"], UInt64[np.ndarray, " Y"]]:
    """The first `count` powers of the base and of its inverse, modulo 2^64."""
    return tuple(
        np.cumprod(np.r_[np.uint64(1), np.full(count - 1, base, np.uint64)]) for base in (_BASE, _BASE_INVERSE)
    )
