"""Words and sentences of a text with their positions, and the runs of words that two texts share."""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n+|(?<=[。！？])")
_SHORT_WORDS = 3


@dataclasses.dataclass(frozen=True)
class Words:
    """A text's words in normal form, and the (start, stop) of each in the text."""

    words: tuple[str, ...]
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.words)


@dataclasses.dataclass(frozen=True)
class WordRun:
    """A maximal run of words [start, stop) of a text that another text contains in the same order."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def words(text: str) -> Words:
    """Runs of letters and digits of any script; "don't" is one word."""
    found = list(_WORD.finditer(text))
    folded = (_folded(match[0]) for match in found)
    return Words(tuple(folded), tuple(match.span() for match in found))


def sentences(text: str) -> list[str]:
    """The text cut at sentence and line ends; a piece of fewer than three words joins the next one.

    An abbreviation may cut a sentence in two. That is harmless here, since each sentence only has to be safe.
    """
    found: list[str] = []
    waiting: list[str] = []  # pieces that have fewer than three words together
    num_words = 0
    for piece in filter(None, map(str.strip, _SENTENCE_END.split(text))):
        waiting.append(piece)
        num_words += len(_WORD.findall(piece))
        if num_words >= _SHORT_WORDS:
            found.append(" ".join(waiting))
            waiting, num_words = [], 0
    if num_words:
        found[-1:] = [" ".join([*found[-1:], *waiting])]
    return found


def shared_runs(source: Sequence[str], text: Sequence[str], at_least: int) -> list[WordRun]:
    """The maximal runs of at least `at_least` words of `text` that `source` contains too.

    The text is matched against a suffix automaton of the source, in time linear in both.
    """
    lengths = held_lengths(source, text)
    runs = []
    for end, length in enumerate(lengths):
        goes_on = end + 1 < len(lengths) and lengths[end + 1] == length + 1
        if length >= max(at_least, 1) and not goes_on:
            runs.append(WordRun(end + 1 - length, end + 1))
    return runs


def held_lengths(source: Sequence[str], text: Sequence[str]) -> list[int]:
    """For each word of the text, the length of the longest run of the source that ends there."""
    steps, links, lengths = _automaton(source)
    state, length, found = 0, 0, []
    for word in text:
        while state and word not in steps[state]:
            state = links[state]
            length = lengths[state]
        if word in steps[state]:
            state, length = steps[state][word], length + 1
        found.append(length)
    return found


def merged(runs: Sequence[WordRun]) -> list[WordRun]:
    """The runs in order, with overlapping ones merged, so that each word lies in at most one."""
    found: list[WordRun] = []
    for run in sorted(runs, key=lambda run: run.start):
        if found and run.start < found[-1].stop:
            found[-1] = WordRun(found[-1].start, max(found[-1].stop, run.stop))
        else:
            found.append(run)
    return found


def longest_run(runs: Sequence[WordRun]) -> int:
    """The number of words of the longest run; 0 without runs."""
    return max(map(len, runs), default=0)


def covered(runs: Sequence[WordRun]) -> int:
    """The number of words that lie in any run."""
    return sum(map(len, merged(runs)))


def ngrams(items: Sequence[str], n: int) -> collections.Counter[tuple[str, ...]]:
    """The number of occurrences of each run of n words."""
    return collections.Counter(zip(*(items[i:] for i in range(n)), strict=False))


def _folded(word: str) -> str:
    return word.lower() if word.isascii() else unicodedata.normalize("NFKC", word).casefold().replace("’", "'")


def _automaton(source: Sequence[str]) -> tuple[list[dict[str, int]], list[int], list[int]]:
    """Transitions, suffix links and lengths of the suffix automaton (Blumer et al. 1985)."""
    steps: list[dict[str, int]] = [{}]
    links, lengths = [-1], [0]
    last = 0
    for word in source:
        new = len(steps)
        steps.append({})
        lengths.append(lengths[last] + 1)
        links.append(0)
        state = last
        while state >= 0 and word not in steps[state]:
            steps[state][word] = new
            state = links[state]
        if state >= 0:
            links[new] = _target(steps, links, lengths, state, word)
        last = new
    return steps, links, lengths


def _target(steps: list[dict[str, int]], links: list[int], lengths: list[int], state: int, word: str) -> int:
    """The state for a new suffix link; a state that longer runs reach too is split."""
    target = steps[state][word]
    if lengths[target] == lengths[state] + 1:
        return target
    copy = len(steps)
    steps.append(dict(steps[target]))
    lengths.append(lengths[state] + 1)
    links.append(links[target])
    links[target] = copy
    while state >= 0 and steps[state].get(word) == target:
        steps[state][word] = copy
        state = links[state]
    return copy
