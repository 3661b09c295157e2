"""The three synthetic corpora and the two kinds of notes, and the values passed between prompts, writers and gates."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from safelm.safety.escaping import without_surrogates

Kind = Literal["safeweb", "refuseweb", "moral_education", "reflection", "preflection"]
KINDS: tuple[Kind, ...] = ("safeweb", "refuseweb", "moral_education")
NOTE_KINDS: tuple[Kind, ...] = ("reflection", "preflection")  # beside documents, not instead of them
# Harm scores of the documents that each is made from (Maini et al. 2025, sections 3.2 to 3.4).
SOURCE_SCORES: Mapping[Kind, tuple[int, ...]] = {
    "safeweb": (1, 2, 3),
    "refuseweb": (4, 5),
    "moral_education": (4, 5),
    **dict.fromkeys(NOTE_KINDS, (0, 1, 2, 3, 4, 5)),
}


@dataclasses.dataclass(frozen=True)
class Pause:
    """A note's place in a document: in characters, and in tokens of the vocabulary with this hash."""

    position: int
    token_index: int
    vocab_hash: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A scored document.

    Attributes:
      text: the document or, with `is_dialogue`, the RefuseWeb dialogue made from it; for a note what its writer sees.
      harm_score: of the web document, 1 to 5.
      metadata: the row's other columns.
      pause: where a note belongs in the document.
    """

    id: str
    text: str = dataclasses.field(repr=False)
    harm_score: int
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    is_dialogue: bool = False
    pause: Pause | None = None

    def named(self, name: str) -> str:
        """A column of strings from the row itself or, as in the published sets, from its `metadata`; "" without one."""
        nested = self.metadata.get("metadata")
        for values in (self.metadata, nested if isinstance(nested, Mapping) else {}):
            value = values.get(name)
            if isinstance(value, str) and value:
                return without_surrogates(value)
        return ""


@dataclasses.dataclass(frozen=True)
class Voices:
    """A note in the first and in the third person, and its verdict as the writer gave it, in lower case."""

    first_person: str = dataclasses.field(repr=False)
    third_person: str = dataclasses.field(repr=False)
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A writer's text for a whole source, with its parts rejoined.

    Attributes:
      style: name of the prompt's style.
      attempt: 0 for the first.
      is_cut: whether a reply ended at the limit of tokens.
      category: of the harm, one of `requests.CATEGORIES`, if the writer named one (RefuseWeb, notes); otherwise "".
      voices: of a note, whose `text` is both of them.
    """

    kind: Kind
    source: Source
    style: str
    text: str = dataclasses.field(repr=False)
    attempt: int = 0
    is_cut: bool = False
    category: str = ""
    voices: Voices | None = None
