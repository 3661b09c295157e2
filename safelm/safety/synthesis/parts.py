"""Splits long documents where a reader would pause, without losing or repeating text."""

import itertools
import re

# From the strongest pause to the weakest; a part ends behind the match. A run of stops is tried once, from its start.
_PAUSES = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # paragraphs
    re.compile(r"(?<![.!?…。！？])[.!?…。！？]++[\"'”’»)\]]*+\s++|[。！？]|\n"),  # sentences and lines
    re.compile(r"\s+"),  # words
)


def split(text: str, max_chars: int) -> list[str]:
    """Splits a text into one or more parts of at most `max_chars` characters; joined, they are the text.

    Parts are about equally long. Each ends after a paragraph if possible, otherwise after a sentence, after a word, or
    anywhere.

    Raises ValueError if `max_chars` is below 1.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars={max_chars}: must be at least 1")
    cuts = [0]
    while len(text) - cuts[-1] > max_chars:
        cuts.append(_cut(text, cuts[-1], max_chars))
    return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]


def _cut(text: str, start: int, max_chars: int) -> int:
    """The end of the part that begins at `start`: the strongest pause of its second half, near its fair share."""
    left = len(text) - start
    count = -(-left // max_chars)
    ideal = start + -(-left // count)
    earliest, latest = start + max(1, max_chars // 2), start + max_chars
    for pause in _PAUSES:
        ends = [match.end() for match in pause.finditer(text, start, latest) if earliest <= match.end() <= latest]
        if ends:
            return min(ends, key=lambda end: (abs(end - ideal), end))
    return latest
