"""Prompts that several benchmarks share, counted once: equal in normal form, or nearly so.

TDC, HarmBench, JailbreakBench and AdvBench overlap by dozens of prompts, some reworded by a word or a stop. An average
over their concatenation would count those twice.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence

from safelm.evaluation.suite import Prompt

NEAR = 0.8  # of the words of either prompt: found by looking at what lies just above and below in the public sets
_WORD = re.compile(r"\w+")


def normal_words(text: str) -> tuple[str, ...]:
    """The words of a text without case, accents' forms, punctuation or spacing."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def merge_duplicates(prompts: Sequence[Prompt], *, near: float = NEAR) -> tuple[list[Prompt], int]:
    """One prompt for each set of duplicates, and how many were dropped.

    The first one stays, with the benchmarks of all and the first target there is. Two prompts are nearly equal when
    the words they share, order aside, are at least `near` of the words that either has (Jaccard on multisets). Prompts
    that differ in `harmful` are never joined: contrast sets differ by a word on purpose. Nor are two prompts of one
    benchmark, unless they are equal in normal form.
    """
    kept: list[Prompt] = []
    words_of: list[frozenset[tuple[str, int]]] = []
    by_form: dict[tuple[tuple[str, ...], bool], int] = {}
    by_word: dict[tuple[str, int], list[int]] = {}
    for prompt in prompts:
        form = (normal_words(prompt.prompt), prompt.harmful)
        words = _counted(form[0])
        index = by_form.get(form)
        if index is None:
            index = _nearest(prompt, words, kept, words_of, by_word, near)
        if index is not None:
            kept[index] = _joined(kept[index], prompt)
            continue
        by_form[form] = len(kept)
        for word in words:
            by_word.setdefault(word, []).append(len(kept))
        kept.append(prompt)
        words_of.append(words)
    return kept, len(prompts) - len(kept)


def _counted(words: Iterable[str]) -> frozenset[tuple[str, int]]:
    """A multiset as a set: (word, how often it has come)."""
    seen: dict[str, int] = {}
    found = set()
    for word in words:
        seen[word] = seen.get(word, 0) + 1
        found.add((word, seen[word]))
    return frozenset(found)


def _nearest(
    prompt: Prompt,
    words: frozenset[tuple[str, int]],
    kept: Sequence[Prompt],
    words_of: Sequence[frozenset[tuple[str, int]]],
    by_word: dict[tuple[str, int], list[int]],
    near: float,
) -> int | None:
    shared: dict[int, int] = {}
    for word in words:
        for index in by_word.get(word, ()):
            shared[index] = shared.get(index, 0) + 1
    best, best_share = None, near
    for index, count in shared.items():
        other = kept[index]
        share = count / len(words | words_of[index])
        if share >= best_share and other.harmful == prompt.harmful and not {*other.benchmarks} & {*prompt.benchmarks}:
            best, best_share = index, share
    return best


def _joined(first: Prompt, second: Prompt) -> Prompt:
    benchmarks = tuple(dict.fromkeys((*first.benchmarks, *second.benchmarks)))
    return dataclasses.replace(first, benchmarks=benchmarks, target=first.target or second.target)
