"""Notes: short remarks on a row's text for places in it, kept in files of annotations beside it, never in the text.

A file of annotations (`safelm.documents.annotations`) that has the column `notes` says for every row a list of

    kind           "reflection", on what stands before its place, or "preflection", before the document
    position       the place in characters (Unicode code points): the note belongs before the one with this number; of a
                   preflection 0, for which a place behind nothing but literal harm tags is taken
    token_index    the place in tokens, and
    vocab_hash     of the vocabulary that it was counted with
    first_person   the note in the first person, and
    third_person   in the third
    verdict        "safe" or "unsafe": what the note says of the text
    category       of the harm, or "none"
    sections       those of the writer's constitution that the note cites, such as "2.1"

`position` decides. With another vocabulary the token is found from it; with the same one both must agree.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safelm.text.harm_tags import remove_harm_tags

COLUMN = "notes"
KINDS = ("reflection", "preflection")
VERDICTS = ("safe", "unsafe")
NO_CATEGORY = "none"
VOICES = ("first_person", "third_person")
FORMS = ("note", "verdict", "verdict_note")
_STRINGS = ("vocab_hash", "first_person", "third_person", "verdict", "category")


@dataclasses.dataclass(frozen=True, order=True)
class Note:
    """A note for a place in a text, in characters and in tokens of one vocabulary."""

    position: int
    kind: str
    token_index: int = 0
    vocab_hash: str = ""
    first_person: str = dataclasses.field(default="", repr=False)
    third_person: str = dataclasses.field(default="", repr=False)
    verdict: str = ""
    category: str = ""
    sections: tuple[str, ...] = ()


def spelled(note: Note, voice: str = VOICES[0], form: str = FORMS[0]) -> str:
    """A note as text: in one of VOICES, and by FORMS the note, its verdict and category, or these before it."""
    category = f" ({note.category})" if note.category not in ("", NO_CATEGORY) else ""
    verdict = f"Verdict: {note.verdict}{category}."
    return {"note": getattr(note, voice), "verdict": verdict, "verdict_note": f"{verdict} {getattr(note, voice)}"}[form]


def arrow_type() -> Any:
    """The Arrow type of the column."""
    import pyarrow

    kinds = {"position": pyarrow.int64(), "kind": pyarrow.string(), "token_index": pyarrow.int64()}
    kinds |= dict.fromkeys(_STRINGS, pyarrow.string())
    return pyarrow.list_(pyarrow.struct([*kinds.items(), ("sections", pyarrow.list_(pyarrow.string()))]))


def parse(values: Any, text: str, where: str) -> tuple[Note, ...]:
    """The notes of a row in order, checked against its text.

    Args:
      values: what the column holds; None is no note.
      where: file and row, for errors.

    Raises ValueError naming `where`, the note's number from 1, and the field at fault; never a text.
    """
    if values is None:
        return ()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(f"{where}: {COLUMN} is no list but {type(values).__name__}")
    return merged([[_parse_one(value, text, f"{where}, note {at}") for at, value in enumerate(values, 1)]], where)


def merged(lists: Iterable[Iterable[Note]], where: str) -> tuple[Note, ...]:
    """The notes of several folders for one row, in order, each once.

    Raises ValueError where two of one kind at one place differ.
    """
    found: dict[tuple[int, str], Note] = {}
    for note in (note for notes in lists for note in notes):
        if found.setdefault((note.position, note.kind), note) != note:
            raise ValueError(f"{where}: two notes of kind {note.kind!r} at character {note.position} differ")
    return tuple(sorted(found.values()))


def to_json(notes: Iterable[Note]) -> str:
    """Notes as one string, for places that carry strings only."""
    return json.dumps([dataclasses.asdict(note) for note in notes], ensure_ascii=False)


def from_json(text: str) -> tuple[Note, ...]:
    """What `to_json` was given; "" is none."""
    values = json.loads(text) if text else []
    return tuple(Note(**value | {"sections": tuple(value["sections"])}) for value in values)


def _parse_one(value: Any, text: str, where: str) -> Note:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: no object with kind and position but {type(value).__name__}")
    kind = value.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{where}: kind {str(kind)[:40]!r} is none of {', '.join(KINDS)}")
    places = {name: _whole_number(value, name, where) for name in ("position", "token_index")}
    if places["position"] > len(text):
        raise ValueError(f"{where}: position {places['position']} is beyond the text's {len(text)} characters")
    if kind == "preflection" and places["position"]:
        if remove_harm_tags(text[: places["position"]])[0]:
            raise ValueError(f"{where}: a preflection stands before the document, not at {places['position']}")
        places["position"] = 0
    strings = {name: _string(value, name, where) for name in _STRINGS}
    if strings["verdict"] not in ("", *VERDICTS):
        raise ValueError(f"{where}: verdict {strings['verdict'][:40]!r} is none of {', '.join(VERDICTS)}")
    sections = value.get("sections") or ()
    if isinstance(sections, str) or not all(isinstance(section, str) for section in sections):
        raise ValueError(f"{where}: sections is no list of strings")
    return Note(kind=kind, sections=tuple(sections), **places, **strings)


def _whole_number(value: Mapping[str, Any], name: str, where: str) -> int:
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ValueError(f"{where}: {name} {found!r} is no whole number of at least 0")
    return found


def _string(value: Mapping[str, Any], name: str, where: str) -> str:
    found = value.get(name)
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{where}: {name} is no string but {type(found).__name__}")
    return found or ""
