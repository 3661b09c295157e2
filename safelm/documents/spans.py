"""Spans: stretches of a row's text that an annotator says something about, kept in files of annotations beside it.

A file of annotations (`safelm.documents.annotations`) that has the column `spans` says for every row a list of

    start, end   whole numbers: the first character and the one behind the last, of the text as it is in the corpus
    kind         what was looked at: "sentence", "window:256", "lexicon", a name of yours
    label        what it was found to be: a harm score such as "4", the label of a lexicon's term
    score        a number of the annotator's own, such as a probability, or null

Characters are Unicode code points, what Python's `str` counts, so that no offset lies inside one; they are neither
bytes of UTF-8 nor units of UTF-16, and the text is not normalized. Spans may overlap and nest: what holds for a token
in several is for the intervention to say. Two of one kind at the same place must have the same label.

An annotator that finds tokens also says which: `token_start` and `token_end`, the number of the first token of the text
and of the one behind the last, counted by the vocabulary whose hash (`vocab_hash`) the file's metadata have.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMN = "spans"
OFFSETS = "characters"  # what the metadata of a file of annotations say of its offsets


@dataclasses.dataclass(frozen=True, order=True)
class Span:
    """A stretch of a text, in characters and perhaps in tokens; an end is behind the last."""

    start: int
    end: int
    kind: str = ""
    label: str = ""
    score: float | None = dataclasses.field(default=None, compare=False)
    token_start: int | None = dataclasses.field(default=None, compare=False)
    token_end: int | None = dataclasses.field(default=None, compare=False)

    def as_row(self, *, with_tokens: bool = False) -> dict[str, Any]:
        """What the column holds, with the fields of `arrow_type`."""
        names = FIELDS if with_tokens else FIELDS[:5]
        return {name: getattr(self, name) for name in names}


FIELDS = tuple(field.name for field in dataclasses.fields(Span))


def arrow_type(*, with_tokens: bool = False) -> Any:
    """The Arrow type of the column."""
    import pyarrow

    whole, text = pyarrow.int64(), pyarrow.string()
    types = dict(zip(FIELDS, (whole, whole, text, text, pyarrow.float32(), whole, whole), strict=True))
    return pyarrow.list_(pyarrow.struct(list(types.items())[: len(FIELDS) if with_tokens else 5]))


def parse(values: Any, text: str, where: str) -> tuple[Span, ...]:
    """The spans of a row, in order and each once, checked against its text.

    A value may also quote the stretch (`text`), which is compared and not kept.

    Args:
      values: what the column holds; None is no span.
      where: file and row, for errors.

    Raises ValueError naming `where`, the span's number from 1, and the offset or field at fault; never the text.
    """
    if values is None:
        return ()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(f"{where}: {COLUMN} is no list but {type(values).__name__}")
    found: list[Span] = []
    for number, value in enumerate(values, start=1):
        found.append(_parse_one(value, text, f"{where}, span {number}"))
    return merged([found], where)


def merged(lists: Iterable[Iterable[Span]], where: str) -> tuple[Span, ...]:
    """The spans of several annotators of one row, in order, each once.

    Raises ValueError where two of one kind at the same place have different labels.
    """
    labels: dict[tuple[int, int, str], Span] = {}
    for span in (span for spans in lists for span in spans):
        former = labels.setdefault((span.start, span.end, span.kind), span)
        if former.label != span.label:
            raise ValueError(
                f"{where}: two spans of kind {span.kind!r} at {span.start} to {span.end} disagree: "
                f"{former.label!r} and {span.label!r}"
            )
    return tuple(sorted(labels.values()))


def columns(names: Iterable[str]) -> list[str]:
    """Those of a folder's columns that hold spans: `spans`, or `NAME_spans` of a folder that has a name."""
    return [name for name in names if name == COLUMN or name.endswith(f"_{COLUMN}")]


def to_json(spans: Iterable[Span]) -> str:
    """Spans as one string, for places that carry strings only."""
    return json.dumps([dataclasses.astuple(span) for span in spans], ensure_ascii=False)


def from_json(text: str) -> tuple[Span, ...]:
    """What `to_json` was given."""
    return tuple(Span(*values) for values in json.loads(text))


def _parse_one(value: Any, text: str, where: str) -> Span:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: no object with start and end but {type(value).__name__}")
    start, end = (_offset(value, name, where) for name in ("start", "end"))
    kind, label = (_string(value, name, where) for name in ("kind", "label"))
    if not 0 <= start < end:
        raise ValueError(f"{where}: goes from {start} to {end}: start must be at least 0 and below end")
    if end > len(text):
        advice = ""
        if end <= len(text.encode("utf-8", "surrogatepass")):
            advice = ": these look like bytes of UTF-8, and offsets are of characters"
        raise ValueError(f"{where}: ends at {end}, the text has {len(text)} characters{advice}")
    quoted = value.get("text")
    if quoted is not None and quoted != text[start:end]:
        of_bytes = text.encode("utf-8", "surrogatepass")[start:end].decode("utf-8", "replace")
        of_units = text.encode("utf-16-le", "surrogatepass")[2 * start : 2 * end].decode("utf-16-le", "replace")
        units = {of_bytes: "bytes of UTF-8", of_units: "units of UTF-16"}.get(quoted)
        advice = f": its offsets are of {units}, they must be of characters" if units else ""
        raise ValueError(f"{where}: {start} to {end} is not what its text says{advice}")
    score = value.get("score")
    if score is not None and (
        isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score)
    ):
        raise ValueError(f"{where}: score {score!r} is no finite number")
    tokens = [None if value.get(name) is None else _offset(value, name, where) for name in FIELDS[5:]]
    if tokens != [None, None] and not (None not in tokens and 0 <= tokens[0] < tokens[1]):
        raise ValueError(
            f"{where}: tokens {tokens[0]} to {tokens[1]}: want both, the first at least 0 and below the end"
        )
    return Span(start, end, kind, label, None if score is None else float(score), *tokens)


def _offset(value: Mapping[str, Any], name: str, where: str) -> int:
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, int):
        raise ValueError(f"{where}: {name} {found!r} is no whole number")
    return found


def _string(value: Mapping[str, Any], name: str, where: str) -> str:
    found = value.get(name)
    if found is not None and not isinstance(found, str | int):
        raise ValueError(f"{where}: {name} is no string but {type(found).__name__}")
    return "" if found is None else str(found)
