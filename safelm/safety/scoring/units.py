"""Finds the units of a text that scorers judge one by one, and a lexicon's terms: spans of characters."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

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
    """The terms of a lexicon by line, in lower case, with their labels behind a tab ("" without one).

    Raises ValueError naming the line for a term that comes twice with different labels, or if there is none.
    """
    terms: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        term, _, label = (part.strip() for part in line.partition("\t"))
        if term and terms.setdefault(term.lower(), label) != label:
            raise ValueError(f"{path}: line {number}: a term for the second time, with another label")
    if not terms:
        raise ValueError(f"{path}: no term there: one a line, perhaps a tab and its label")
    return terms


def find_terms(text: str, pattern: re.Pattern[str], terms: Mapping[str, str]) -> list[Span]:
    """The terms of a lexicon in a text, at borders of words, in any case; of two that overlap the first and longer."""
    return [Span(at.start(), at.end(), LEXICON, terms.get(at.group().lower(), "")) for at in pattern.finditer(text)]


def terms_pattern(terms: Iterable[str]) -> re.Pattern[str]:
    """The pattern of `find_terms`."""
    longest_first = sorted(terms, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


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
