"""The rules by which texts match; this module states and applies them.

1. Word: a run of letters and digits of any script. Marks (accents), format characters (zero-width ones, soft hyphens)
   and apostrophes of every kind are dropped before: "don't" is the word dont, "café" the word cafe. So "someone's" is
   another word than "someone".
2. Case and compatibility: NFKD, full case folding, NFKD: "ﬁ", "Ｆｉ" and "FI" are "fi". Look-alikes of other scripts
   stay what they are.
3. Between two words of a query stands either one run of white space of any length (line ends, no-break spaces) or one
   hyphen: - _ U+2010 to U+2013 U+2212 and their compatibility forms. Hyphen and white space are equal, in queries too:
   "drive-by" is "drive by". Anything else (a comma, an em dash, a hyphen between spaces) keeps words apart.
4. A query matches whole words only: no letter or digit right before or after it.
5. Every occurrence of every query counts, those that overlap or lie within another too; never across documents.

All of this is a table of characters: each stands for some letters or digits, for " ", for "-", for "." (anything that
separates) or for nothing; then runs of " " become one. `normal` applies it to many documents at once.
"""

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

RULES_VERSION = 1
RULES = (
    "a word is a run of letters and digits of any script; marks, format characters and apostrophes are dropped",
    "text and queries are compared after NFKD, full case folding and NFKD",
    "between two words of a query stands one run of white space or one hyphen (- _ U+2010 to U+2013 U+2212)",
    "a query matches whole words only",
    "every occurrence of every query counts, overlapping ones too; never across documents",
)
SPACE, HYPHEN, BREAK, END = b" ", b"-", b".", b"\n"
FIRST_WORD_BYTE = 0x30  # in a normal form every byte from here on belongs to a word, every byte below to none
_APOSTROPHES = frozenset("'`´‘’‛ʼʹ′＇")
_HYPHENS = frozenset("-_‐‑‒–−﹣－＿")
_SEPARATOR = 0xFF  # in no UTF-8 text
_CACHED_RUNS = 1 << 16


def normal(texts: Sequence[str]) -> bytes:
    """The normal forms of documents in UTF-8, each followed by END, which no normal form holds."""
    data = b"\xff".join([*map(_encoded, texts), b""])
    data = _fold_beyond_ascii(data).translate(_TABLE, _DROPPED)
    return _single_spaces(data) if SPACE + SPACE in data else data


def starts_of_words(data: bytes) -> UInt8[np.ndarray, " bytes"]:
    """1 at the first byte of each word of a normal form, else 0."""
    in_word = np.frombuffer(data, np.uint8) >= FIRST_WORD_BYTE
    starts = in_word.copy()
    np.greater(in_word[1:], in_word[:-1], out=starts[1:])
    return starts.view(np.uint8)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _fold_beyond_ascii(data: bytes) -> bytes:
    """Replaces each run of characters beyond ASCII by its normal form."""
    if data.isascii():
        return data
    values = np.frombuffer(data, np.uint8)
    beyond = np.zeros(len(values) + 2, np.bool_)
    beyond[1:-1] = (values >= 0x80) & (values != _SEPARATOR)
    edges = np.flatnonzero(beyond[1:] != beyond[:-1]).tolist()
    pieces, last = [], 0
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        pieces += (data[last:start], _folded_run(data[start:stop]))
        last = stop
    return b"".join([*pieces, data[last:]])


def _folded_run(run: bytes) -> bytes:
    return _cached_run(run) if len(run) <= 32 else _fold_run(run)


def _fold_run(run: bytes) -> bytes:
    return "".join(map(fold_character, run.decode("utf-8", "surrogatepass"))).encode()


_cached_run = functools.lru_cache(_CACHED_RUNS)(_fold_run)


@functools.lru_cache(_CACHED_RUNS)
def fold_character(character: str) -> str:
    """The normal form of one character: letters and digits, " ", "-", "." or nothing."""
    if character in _APOSTROPHES or character in _HYPHENS:
        return _class_of(character)
    once = "".join(c for c in unicodedata.normalize("NFKD", character) if unicodedata.category(c)[0] != "M")
    return "".join(map(_class_of, unicodedata.normalize("NFKD", once.casefold())))


def _class_of(character: str) -> str:
    if character in _APOSTROPHES:
        return ""
    if character in _HYPHENS:
        return "-"
    if character.isspace():
        return " "
    category = unicodedata.category(character)
    if category[0] in "LN":
        return character
    return "" if category[0] == "M" or category == "Cf" else "."


def _single_spaces(data: bytes) -> bytes:
    values = np.frombuffer(data, np.uint8)
    is_space = values == SPACE[0]
    kept = np.ones(len(values), np.bool_)
    np.logical_not(is_space[1:] & is_space[:-1], out=kept[1:])
    return values[kept].tobytes()


def _ascii_table() -> tuple[bytes, bytes]:
    table, dropped = bytearray(range(256)), bytearray()
    for value in range(128):
        folded = fold_character(chr(value)).encode()
        if folded:
            (table[value],) = folded
        else:
            dropped.append(value)
    table[_SEPARATOR] = END[0]
    return bytes(table), bytes(dropped)


_TABLE, _DROPPED = _ascii_table()
