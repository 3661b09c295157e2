"""Reads the prompts, one versioned file per kind, and chooses the style of each document.

A file `prompts/KIND_vVERSION.txt` has sections that begin with `@name`: `system`, `user` (with the slots {style},
{mark}, {document}, {part}), `first_part`, `middle_part` and `last_part` for long documents, one `style NAME` per style,
and `reply_start` (for all styles) or `reply_start NAME` if replies must begin with given words. Prompts of notes have
the slot {constitution} in `system`, no parts and only version 1. Version 1 spells out every rule; version 2 is short,
for models below about a billion parameters. The file of a released version never changes; another wording is a new
version.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence

from safelm.safety.synthesis.kinds import KINDS, NOTE_KINDS, Kind

VERSION = 1
DOCUMENT_SLOT = "{document}"
_CONSTITUTION_SLOT = "{constitution}"
_VERSIONS = {True: "there are 1 and 2", False: "there is 1"}
_SECTION = re.compile(r"^@(\w+(?: \w+)?)\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The instructions for writers of one kind (Maini et al. 2025, sections 3.2 to 3.4; the wording is SafeLM's own).

    Attributes:
      user: the user's message with the slots {style}, {mark}, {document} and {part}.
      parts: the words about a part of a long document, by "first", "middle" and "last"; slots {part_number}, {parts}.
      styles: description of each style by name, in the file's order.
      reply_starts: the required beginning of a style's replies by name; "" for none.
      hash: SHA-256 (hex) of the file, and of the constitution that was put in.
      sections: of that constitution.
    """

    kind: Kind
    version: int
    system: str = dataclasses.field(repr=False)
    user: str = dataclasses.field(repr=False)
    parts: Mapping[str, str] = dataclasses.field(repr=False)
    styles: Mapping[str, str] = dataclasses.field(repr=False)
    reply_starts: Mapping[str, str] = dataclasses.field(repr=False)
    hash: str
    sections: tuple[str, ...] = ()

    def with_constitution(self, text: str, sections: Sequence[str]) -> "Prompts":
        """The prompts of notes with a constitution in its slot."""
        system = self.system.replace(_CONSTITUTION_SLOT, text)
        whole = hashlib.sha256(f"{self.hash}\0{text}".encode()).hexdigest()
        return dataclasses.replace(self, system=system, hash=whole, sections=tuple(sections))


@functools.cache
def load_prompts(kind: Kind, version: int = VERSION) -> Prompts:
    """The prompts of a kind. Raises ValueError for an unknown kind or version."""
    if kind not in (*KINDS, *NOTE_KINDS):
        raise ValueError(f"kind={kind!r}: one of {', '.join((*KINDS, *NOTE_KINDS))}")
    file = importlib.resources.files(__package__) / "prompts" / f"{kind}_v{version}.txt"
    if not file.is_file():
        raise ValueError(f"prompt version {version}: there is none for {kind}, {_VERSIONS[kind in KINDS]}")
    text = file.read_text(encoding="utf-8")
    _, *parts = _SECTION.split(text)
    sections = {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}
    styles = {name.removeprefix("style "): body for name, body in sections.items() if name.startswith("style ")}
    every = sections.get("reply_start", "")
    return Prompts(
        kind=kind,
        version=version,
        system=sections["system"],
        user=sections["user"],
        parts={place: sections.get(f"{place}_part", "") for place in ("first", "middle", "last")},
        styles=styles,
        reply_starts={style: sections.get(f"reply_start {style}", every) for style in styles},
        hash=hashlib.sha256(text.encode()).hexdigest(),
    )


def choose_style(prompts: Prompts, source_id: str, seed: int, attempt: int = 0) -> str:
    """The name of a document's style: a pure function of the arguments, equal on every machine.

    All styles are equally likely. Attempts 0, 1, 2 ... of one document use every style once before one repeats. Neither
    other documents nor the styles' order in the file matter.
    """
    order = sorted(prompts.styles, key=lambda style: _digest("style", seed, source_id, prompts.kind, style))
    return order[attempt % len(order)]


def derived_seed(seed: int, *identity: str | int) -> int:
    """A seed in [0, 2**31) that is a pure function of the arguments, equal on every machine."""
    return int(_digest("seed", seed, *identity)[:8], 16) >> 1


def _digest(*values: str | int) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
