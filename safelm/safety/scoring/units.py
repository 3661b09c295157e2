"""Finds the units of a text that scorers judge one by one, and a lexicon's terms: spans of characters."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from safelm.documents.spans import Span

SENTENCE, WINDOW, LEXICON = "sentence", "window", "lexicon"
# A sentence ends at a line's end, or behind a full stop (or the like) and closing quotes before whitespace; in Chinese
# and Japanese no whitespace follows. A run of stops is tried from its beginning only, and gives nothing back: else time
# would grow by the square of its length.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s)|[。！？]+[”’」』）]*|(?=[\n\r\u2028\u2029])")
_WORD = re.compile(r"\S+")


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is judged by itself: sentences, or stretches of `words` words."""

    words: int = 0  # 0: sentences

    @property
    def kind(self) -> str:
        """The kind of its spans."""
        return f"{WINDOW}:{self.words}" if self.words else SENTENCE

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of every unit of a text, without whitespace at either end; together they hold every word."""
        return _windows(text, self.words) if self.words else _sentences(text)


def parse_unit(text: str) -> Unit:
    """The unit of a flag: `sentence` or `window:WORDS`. Raises ValueError for another."""
    name, _, count = text.partition(":")
    if name == SENTENCE and not count:
        return Unit()
    if name == WINDOW and count.isascii() and count.isdigit() and int(count):
        return Unit(int(count))
    raise ValueError(f"--unit {text!r}: must be sentence, or window:N with N words, at least 1")


def read_lexicon(text: str, path: str) -> dict[str, str]:
    """The terms of a lexicon by line, as written, with their labels behind a tab ("" without one).

    Raises ValueError naming the line for a term that comes twice with different labels, or if there is none.
    """
    terms: dict[str, str] = {}
    labels: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        term, _, label = (part.strip() for part in line.partition("\t"))
        if term and labels.setdefault(_without_case(term), label) != label:
            raise ValueError(f"{path}: line {number}: a term for the second time, with another label")
        if term:
            terms[term] = label
    if not terms:
        raise ValueError(f"{path}: no term there: one a line, perhaps a tab and its label")
    return terms


class Lexicon:
    """Finds terms at borders of words, in any case; of two that overlap the first and longer."""

    def __init__(self, terms: Mapping[str, str]):
        """`terms` with their labels."""
        self._labels = {_without_case(term): label for term, label in terms.items()}
        longest_first = sorted(terms, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)

    def find(self, text: str) -> list[Span]:
        """The terms in a text."""
        return [
            Span(at.start(), at.end(), LEXICON, self._labels[_without_case(at.group())])
            for at in self._pattern.finditer(text)
        ]


def _without_case(term: str) -> str:
    """The same for two texts where `re.IGNORECASE` takes one for the other: there every i is one, dotted or not."""
    return term.casefold().replace("i\u0307", "i").replace("\u0131", "i")


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    begin = 0
    for stop in (*(found.end() for found in _SENTENCE_END.finditer(text)), len(text)):
        piece = text[begin:stop]
        if piece.strip():
            start = begin + len(piece) - len(piece.lstrip())
            yield start, start + len(piece.strip())
        begin = stop


def _windows(text: str, words: int) -> Iterator[tuple[int, int]]:
    first = last = None
    for number, word in enumerate(_WORD.finditer(text)):
        if number % words == 0:
            if first is not None:
                yield first.start(), last.end()
            first = word
        last = word
    if first is not None:
        yield first.start(), last.end()
