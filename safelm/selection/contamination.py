"""Finds documents that hold prompts of evaluation sets: a shared run of 13 words (Brown et al. 2020, appendix C).

Words are those of `safelm.safety.report_card.normal_form` (letters and digits of any script, without case, accents and
apostrophes), and what stands between two words doesn't matter: punctuation, markup and line ends are all alike. A
prompt of fewer than 13 words is looked for as a whole; one of fewer than `min_words` is too common to look for.

The index holds hashes alone, no text: a rolling hash that is computed for every run of every document, and a
cryptographic one that decides where the first is met.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8, UInt64

from safelm.io.hashed import mixed
from safelm.safety.report_card.normal_form import END, FIRST_WORD_BYTE, RULES_VERSION, normal

GRAM_WORDS = 13
VERSION = f"{GRAM_WORDS}-grams-{RULES_VERSION}-1"
_PIECE_CHARACTERS, _OVERLAP_CHARACTERS = 1 << 20, 1 << 12
_BATCH_CHARACTERS = 1 << 18
_TABLE_BITS = 22
_BYTE_FACTOR, _WORD_FACTOR = np.uint64(0x9FB21C651E98DF25), np.uint64(0xC2B2AE3D27D4EB4F)
_LONGEST_WORD = 256  # bytes that a word's rolling hash looks at


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts of one evaluation set.

    Attributes:
      suite: its name in reports.
      ids: one for each text; reports show these.
    """

    suite: str
    ids: tuple[str, ...]
    texts: tuple[str, ...] = dataclasses.field(repr=False)

    def sha256(self) -> str:
        """Hash (hex) of ids and texts."""
        digest = hashlib.sha256()
        for value in (self.suite, *self.ids, *self.texts):
            digest.update(value.encode("utf-8", "surrogatepass") + b"\xff")
        return digest.hexdigest()


@dataclasses.dataclass
class PromptIndex:
    """Hashes of the runs of words to look for.

    Attributes:
      prompts: (suite, id) of every prompt that is looked for.
      suites: by name, how many prompts it has and how many are `too_short` to look for.
      grams: a run's digest -> its rolling hash, its words, the places of its prompts in `prompts`.
    """

    prompts: list[tuple[str, str]]
    suites: dict[str, dict[str, int]]
    grams: dict[str, tuple[int, int, list[int]]]

    def to_json(self) -> dict[str, Any]:
        """A JSON object of it; holds no text."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PromptIndex":
        """The index that `to_json` gave."""
        prompts = [(suite, prompt) for suite, prompt in values["prompts"]]
        grams = {digest: (rolling, words, owners) for digest, (rolling, words, owners) in values["grams"].items()}
        return cls(prompts, dict(values["suites"]), grams)


def index_prompts(sets: Sequence[PromptSet], min_words: int) -> PromptIndex:
    """The index of several sets of prompts; those of fewer than `min_words` words are only counted."""
    index = PromptIndex([], {}, {})
    for one in sets:
        counts = index.suites.setdefault(one.suite, {"prompts": 0, "too_short": 0})
        for prompt_id, text in zip(one.ids, one.texts, strict=True):
            batch = _Batch([text])
            words = batch.words()
            counts["prompts"] += 1
            if len(words) < max(min_words, 1):
                counts["too_short"] += 1
                continue
            owner, length = len(index.prompts), min(GRAM_WORDS, len(words))
            index.prompts.append((one.suite, prompt_id))
            rolling = dict(_rolling(_word_hashes(batch), length))[length].tolist()
            for start, value in enumerate(rolling):
                gram = index.grams.setdefault(_digest(words[start : start + length]), (value, length, []))
                if owner not in gram[2]:
                    gram[2].append(owner)
    return index


def normal_words(text: str) -> list[bytes]:
    """The words of a text in the normal form that is compared."""
    return _Batch([text]).words()


class Decontaminator:
    """Looks for the prompts of an index in documents."""

    def __init__(self, index: PromptIndex):
        self._index = index
        by_length: dict[int, list[int]] = collections.defaultdict(list)
        for rolling, length, _ in index.grams.values():
            by_length[length].append(rolling)
        self._hashes = {length: np.unique(np.array(found, np.uint64)) for length, found in by_length.items()}
        self._tables = {length: _table(found_H) for length, found_H in self._hashes.items()}

    def find(self, texts: Sequence[str]) -> list[list[int]]:
        """For each text the places in `PromptIndex.prompts` of the prompts that it holds, in order."""
        found: list[set[int]] = [set() for _ in texts]
        if self._index.grams:
            for numbers, pieces in _batches(texts):
                for place, owners in self._matches(_Batch(pieces)):
                    found[numbers[place]].update(owners)
        return [sorted(owners) for owners in found]

    def _matches(self, batch: "_Batch") -> Iterator[tuple[int, Sequence[int]]]:
        """(number of the document in the batch, prompts) of every run of words that is in the index."""
        for length, rolling_N in _rolling(_word_hashes(batch), max(self._hashes)):
            if length not in self._hashes:
                continue
            maybe_M = np.flatnonzero(self._tables[length][(rolling_N >> np.uint64(64 - _TABLE_BITS)).view(np.int64)])
            known_H = self._hashes[length]
            at_M = np.minimum(np.searchsorted(known_H, rolling_N[maybe_M]), len(known_H) - 1)
            for start in maybe_M[known_H[at_M] == rolling_N[maybe_M]].tolist():
                document = int(batch.document_N[start])
                if document != batch.document_N[start + length - 1]:
                    continue
                gram = self._index.grams.get(_digest(batch.words(start, start + length)))
                if gram is not None and gram[1] == length:
                    yield document, gram[2]


class _Batch:
    """The words of several documents: where each begins and ends in their normal form, and whose it is."""

    def __init__(self, texts: Sequence[str]):
        self.data = normal(texts)
        self.bytes_B: UInt8[np.ndarray, " B"] = np.frombuffer(self.data, np.uint8)
        in_word_B = np.zeros(len(self.bytes_B) + 2, np.bool_)
        in_word_B[1:-1] = self.bytes_B >= FIRST_WORD_BYTE
        edges = np.flatnonzero(in_word_B[1:] != in_word_B[:-1])
        self.start_N: Int[np.ndarray, " N"] = edges[::2]
        self.stop_N: Int[np.ndarray, " N"] = edges[1::2]
        ends = np.flatnonzero(self.bytes_B == END[0])
        self.document_N: Int[np.ndarray, " N"] = np.searchsorted(ends, self.start_N)

    def words(self, start: int = 0, stop: int | None = None) -> list[bytes]:
        """The words from one place to another."""
        places = zip(self.start_N[start:stop].tolist(), self.stop_N[start:stop].tolist(), strict=True)
        return [self.data[begin:end] for begin, end in places]


def _batches(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """(numbers of the texts, pieces): long texts are cut into pieces that overlap by more than a run of words."""
    numbers: list[int] = []
    pieces: list[str] = []
    characters = 0
    for number, text in enumerate(texts):
        for at in range(0, max(len(text) - _OVERLAP_CHARACTERS, 1), _PIECE_CHARACTERS):
            numbers.append(number)
            pieces.append(text[at : at + _PIECE_CHARACTERS + _OVERLAP_CHARACTERS])
            characters += len(pieces[-1])
            if characters >= _BATCH_CHARACTERS:
                yield numbers, pieces
                numbers, pieces, characters = [], [], 0
    if pieces:
        yield numbers, pieces


def _word_hashes(batch: _Batch) -> UInt64[np.ndarray, " N"]:
    """A hash of each word: a polynomial of its bytes, mixed."""
    length_N = np.minimum(batch.stop_N - batch.start_N, _LONGEST_WORD)
    if not len(length_N):
        return np.zeros(0, np.uint64)
    first_N = np.cumsum(length_N) - length_N
    within_K = np.arange(int(length_N.sum())) - np.repeat(first_N, length_N)
    values_K = batch.bytes_B[np.repeat(batch.start_N, length_N) + within_K].astype(np.uint64)
    return mixed(np.add.reduceat(values_K * _POWERS[within_K], first_N))


def _rolling(words_N: UInt64[np.ndarray, " N"], longest: int) -> Iterator[tuple[int, UInt64[np.ndarray, " runs"]]]:
    """(length, hash of the run of so many words from each place on), for lengths from 1 up, while there are runs."""
    hash_N = words_N
    for length in range(1, min(longest, len(words_N)) + 1):
        if length > 1:
            hash_N = mixed(hash_N[:-1] * _WORD_FACTOR + words_N[length - 1 :])
        yield length, hash_N


def _table(hashes_H: UInt64[np.ndarray, " H"]) -> np.ndarray:
    """Whether a hash may be among these, by its first bits."""
    table = np.zeros(1 << _TABLE_BITS, np.bool_)
    table[hashes_H >> np.uint64(64 - _TABLE_BITS)] = True
    return table


def _digest(words: Sequence[bytes]) -> str:
    return hashlib.blake2b(b" ".join(words), digest_size=16).hexdigest()


_POWERS = np.cumprod(np.full(_LONGEST_WORD, _BYTE_FACTOR, np.uint64), dtype=np.uint64)
