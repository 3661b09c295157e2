"""Finds prompts that several benchmarks share, equal in normal form or nearly so, and counts them once.

TDC, HarmBench, JailbreakBench and AdvBench share dozens of prompts, some with a word or a full stop changed. An average
over their concatenation would count those twice.
"""

import collections
import dataclasses
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from safelm.evaluate.suites.suite import Prompt

NEAR = 0.8  # of the words of either prompt: found by looking at what lies just above and below in the public sets
Word = tuple[str, int]  # and how often it has come in its prompt
_WORD = re.compile(r"\w+")
_NORMALIZED_CHARS = 1024  # at once: sorting the accents of one character takes the square of their number


def normal_words(text: str) -> tuple[str, ...]:
    """The words of a text without case, accents, punctuation or spacing."""
    pieces = (text[start : start + _NORMALIZED_CHARS] for start in range(0, len(text), _NORMALIZED_CHARS))
    return tuple(_WORD.findall("".join(unicodedata.normalize("NFKC", piece) for piece in pieces).casefold()))


def merge_duplicates(prompts: Sequence[Prompt], *, near: float = NEAR) -> tuple[list[Prompt], int]:
    """Keeps one prompt of each set of duplicates; returns the prompts and how many were dropped.

    The first prompt stays, with the benchmarks of all and the first target found. Two prompts are nearly equal if the
    Jaccard similarity of their words, as multisets, is at least `near`. Prompts that differ in `harmful` are never
    merged, since contrast sets differ by a word on purpose. Two prompts of one benchmark are merged only if they are
    equal in normal form.
    """
    kept: list[Prompt] = []
    words_of: list[frozenset[Word]] = []
    by_form: dict[tuple[tuple[str, ...], bool], int] = {}
    by_word: dict[Word, dict[tuple[int, int], list[int]]] = {}  # by the prompt's number of words and this one's rank
    forms = [(normal_words(prompt.prompt), prompt.harmful) for prompt in prompts]
    counted = {form: _counted(form) for form in dict.fromkeys(form for form, _ in forms)}
    frequency = collections.Counter(word for words in counted.values() for word in words)
    rare: list[Word] = []
    for prompt, form in zip(prompts, forms, strict=True):
        words = counted[form[0]]
        index = by_form.get(form)
        if index is None:
            rare = _rarest(words, frequency, near)
            candidates = _candidates(len(words), rare, by_word, near)
            index = _nearest(prompt, words, kept, words_of, candidates, near)
        if index is not None:
            kept[index] = _joined(kept[index], prompt)
            continue
        by_form[form] = len(kept)
        for rank, word in enumerate(rare):
            by_word.setdefault(word, {}).setdefault((len(words), rank), []).append(len(kept))
        kept.append(prompt)
        words_of.append(words)
    return kept, len(prompts) - len(kept)


def _counted(words: Iterable[str]) -> frozenset[Word]:
    """A multiset as a set of (word, how often it has occurred so far)."""
    seen: dict[str, int] = {}
    found = set()
    for word in words:
        seen[word] = seen.get(word, 0) + 1
        found.add((word, seen[word]))
    return frozenset(found)


def _rarest(words: frozenset[Word], frequency: Mapping[Word, int], near: float) -> list[Word]:
    """As many of the rarest words as two sets of similarity `near` must share at least one of (prefix filtering).

    See Chaudhuri et al. 2006. Common words would make every prompt a candidate for every other one.
    """
    count = len(words) - math.ceil(near * len(words) - 1e-9) + 1
    return sorted(words, key=lambda word: (frequency[word], word))[:count]


def _candidates(
    size: int, rare: Sequence[Word], by_word: Mapping[Word, Mapping[tuple[int, int], Sequence[int]]], near: float
) -> set[int]:
    """The prompts that may be similar enough, by the first word shared (positional filtering).

    Xiao et al. 2008. Beyond the first shared word two sets share at most what either has left after it.
    """
    found: set[int] = set()
    for rank, word in enumerate(rare):
        for (other_size, other_rank), indices in by_word.get(word, {}).items():
            most = min(size - rank, other_size - other_rank)
            if most / (size + other_size - most) >= near:
                found.update(indices)
    return found


def _nearest(
    prompt: Prompt,
    words: frozenset[Word],
    kept: Sequence[Prompt],
    words_of: Sequence[frozenset[Word]],
    candidates: Iterable[int],
    near: float,
) -> int | None:
    """The most similar candidate that may be merged with the prompt; of equals, the first."""
    found = []
    for index in candidates:
        other, both = kept[index], len(words & words_of[index])
        share = both / (len(words) + len(words_of[index]) - both)
        if share >= near and other.harmful == prompt.harmful and not {*other.benchmarks} & {*prompt.benchmarks}:
            found.append((-share, index))
    return min(found, default=(0.0, None))[1]


def _joined(first: Prompt, second: Prompt) -> Prompt:
    benchmarks = tuple(dict.fromkeys((*first.benchmarks, *second.benchmarks)))
    return dataclasses.replace(first, benchmarks=benchmarks, target=first.target or second.target)
