"""A constitution: a file of the user's with numbered sections, which notes cite as [2.1].

Sections are the headings that begin with a number (`## 2.1 Care for people`) or, in a file without such headings, the
lines that begin with one (`2.1 Care for people.`).
"""

import dataclasses
import re

from safelm.documents import read_text

_HEADING = re.compile(r"^[ \t]*+#++[ \t]*+(\d++(?:\.\d++)*+)\.?+[ \t]++\S")
_LINE = re.compile(r"^[ \t]*+(\d++(?:\.\d++)*+)\.?+[ \t]++\S")
_CITED = re.compile(r"\[(\d++(?:\.\d++)*+)\]")
MAX_CHARACTERS = 100_000


@dataclasses.dataclass(frozen=True)
class Constitution:
    """The text and the numbers of its sections, in order."""

    text: str = dataclasses.field(repr=False)
    sections: tuple[str, ...]


def read_constitution(path: str) -> Constitution:
    """Reads a file. Raises OSError, and ValueError that names the file for one without sections or with one twice."""
    text = read_text(path).strip()
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{path}: {len(text)} characters, a constitution may have {MAX_CHARACTERS}: it is in every prompt"
        )
    lines = list(enumerate(text.splitlines(), 1))
    places: dict[str, int] = {}
    for pattern in (_HEADING, _LINE):
        for number, line in lines:
            if found := pattern.match(line):
                if found[1] in places:
                    raise ValueError(f"{path}: section {found[1]} is at line {places[found[1]]} and at line {number}")
                places[found[1]] = number
        if places:
            return Constitution(text, tuple(places))
    raise ValueError(f"{path}: no section there: a line such as '## 2.1 Care for people' begins one")


def cited(text: str) -> list[str]:
    """The sections that a text cites, each once, in order: "2.1" of [2.1]."""
    return list(dict.fromkeys(_CITED.findall(text)))


def without_citations(text: str) -> str:
    """The text without its citations."""
    return _CITED.sub("", text)
