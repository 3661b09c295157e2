"""Reads a writer's reply to a request for a note: four labelled parts, in any order."""

import re

from safelm.safety.synthesis.kinds import Voices

_PARTS = ("verdict", "category", "first person", "third person")
_LABEL = re.compile(
    r"^[ \t*_#>]*+(Verdict|Category|First person|Third person)(?:[*_]++:|:[*_]*+)", re.MULTILINE | re.IGNORECASE
)


def read_note(text: str) -> tuple[Voices, str] | None:
    """The note in both voices, on one line each, and its category; None if a part is missing, twice there or empty."""
    pieces = _LABEL.split(text)
    labels = [label.lower() for label in pieces[1::2]]
    if sorted(labels) != sorted(_PARTS):
        return None
    found = {label: " ".join(piece.split()) for label, piece in zip(labels, pieces[2::2], strict=True)}
    if not all(found.values()):
        return None
    verdict, category = (found[name].strip(".*_ ").lower() for name in _PARTS[:2])
    return Voices(found["first person"], found["third person"], verdict), category.replace("/", " or ")
