"""Reads a row's harm score, 0 to 5, and reports which column it came from.

A column that the user names (`--score_column`, perhaps `struct.field`) is the only one read. Otherwise it is the first
of these that the row has:

    harm_score, metadata.harm_score    what safelm.score writes, and says so by its name
    metadata.int_score                 of rows that safelm.synthesize wrote: they have prompt_version and source_id
    the folder score_N, score_N_...    of the published sets (locuslab's fineweb_annotated, safeweb, refuseweb and
                                       moral_education), whose rows have metadata.dump and metadata.int_score
    safety_score                       of published annotations: rows that have safety_probs too

A text made from another one keeps its source's score. What is asked of the text itself, by the report card, by
`safelm.select` and by `safelm.label`, is `text_harm_score`: see there.

Columns called just `score` or `int_score` are never read, because in FineWeb-Edu and its derivatives they say how
educational a page is. Fractions are rounded, halves up.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from safelm.documents.json_lines import field
from safelm.tags import MAX_SCORE, MIN_SCORE

_NAMED = "harm_score"
NAMED_COLUMNS = (_NAMED, "metadata.harm_score")
TEXT_COLUMNS = ("text_harm_score", "metadata.text_harm_score")
_SCORED, _SCORER = "harm_reason", "score_"  # what safelm.score writes beside `harm_score`: the latter begins a column
SYNTHETIC = ("prompt_version", "source_id")
_PUBLISHED = ("metadata.dump", "metadata.int_score")
_ANNOTATED = ("safety_score", "safety_probs")
_PUBLISHED_FOLDER = re.compile(r"score_([0-5])(_[a-z]+)?")
_EDUCATIONAL = ("int_score", "metadata.int_score", "score", "metadata.score")


@dataclasses.dataclass(frozen=True)
class HarmScore:
    """A row's harm score.

    Attributes:
      value: 0 to 5; None if the row has no usable score.
      column: the source of the score, as reports name it; "" if the row has none.
      found: the raw value in that column.
    """

    value: int | None = None
    column: str = ""
    found: Any = None

    @property
    def problem(self) -> str:
        """Why there is no value; never contains a text."""
        if not self.column:
            return f"no harm score (looked for {', '.join((*NAMED_COLUMNS, 'and what published sets have'))})"
        shown = self.found if isinstance(self.found, int | float) else type(self.found).__name__
        return f"field {self.column!r} is {shown}, not a harm score from {MIN_SCORE} to {MAX_SCORE}"


def harm_score(row: Mapping[str, Any], path: str = "", column: str | None = None) -> HarmScore:
    """The harm score of a row of the file `path`, from the user's `column` if one was named."""
    for name in (column,) if column else NAMED_COLUMNS:
        if (found := field(row, name)) is not None:
            return _score(name, found)
    if column:
        return HarmScore()
    if all(isinstance(row.get(name), str) for name in SYNTHETIC):
        return _score(_PUBLISHED[1], field(row, _PUBLISHED[1]))
    folder = published_folder(path)
    if folder and all(field(row, name) is not None for name in _PUBLISHED):
        return HarmScore(int(folder.split("_")[1]), f"folder {folder}", folder)
    if all(row.get(name) is not None for name in _ANNOTATED):
        return _score(_ANNOTATED[0], row[_ANNOTATED[0]])
    return HarmScore()


def text_harm_score(
    row: Mapping[str, Any], path: str = "", column: str | None = None, annotated: Collection[str] = ()
) -> HarmScore:
    """The harm score of a row's own text, never that of the source that it was rewritten from.

    Without a column that the user names it is the first of these: `harm_score` where annotations or `safelm.score` say
    it, also that there is none; `text_harm_score`; for a text that was not rewritten, that of `harm_score`.

    Args:
      annotated: the columns that annotations add to the row.
    """
    if column is None:
        if _NAMED in annotated or (_NAMED in row and any(map(_is_of_scoring, row))):
            return HarmScore() if row.get(_NAMED) is None else _score(_NAMED, row[_NAMED])
        for name in TEXT_COLUMNS:
            if (found := field(row, name)) is not None:
                return _score(name, found)
        if is_rewritten(row, path):
            return HarmScore()
    return harm_score(row, path, column)


def is_rewritten(row: Mapping[str, Any], path: str) -> bool:
    """Whether a row's text was rewritten from another document, whose harm score the row keeps."""
    return all(isinstance(row.get(name), str) for name in SYNTHETIC) or published_folder(path).count("_") > 1


def score_columns(column: str | None = None) -> tuple[str, ...]:
    """The columns that `harm_score` needs, to be read from files that have them."""
    return (column,) if column else (*NAMED_COLUMNS, *SYNTHETIC, *_PUBLISHED, *_ANNOTATED)


def text_score_columns(names: Iterable[str], column: str | None = None) -> list[str]:
    """Those of a file's columns that `text_harm_score` needs."""
    names = list(names)
    wanted = {*score_columns(column), *TEXT_COLUMNS, *filter(_is_of_scoring, names)}
    return [name for name in names if name in wanted]


def choose_column(names: Collection[str], column: str | None = None) -> str | None:
    """The column from which every row of a table with these columns gets its harm score; None if there is none."""
    if column or any(name in names for name in NAMED_COLUMNS):
        return next((name for name in ((column,) if column else NAMED_COLUMNS) if name in names), None)
    if all(name in names for name in (*SYNTHETIC, _PUBLISHED[1])):
        return _PUBLISHED[1]
    return _ANNOTATED[0] if all(name in names for name in _ANNOTATED) else None


def required_columns(path: str, column: str | None = None) -> tuple[str, ...]:
    """The columns of which a scored file must have at least one."""
    if column:
        return (column,)
    published = _PUBLISHED[1:] if published_folder(path) else ()
    return (*NAMED_COLUMNS, SYNTHETIC[0], _ANNOTATED[1], *published)


def mistakable(names: Collection[str]) -> list[str]:
    """Those columns of an unscored file or row that could be mistaken for a harm score."""
    return [name for name in _EDUCATIONAL if name in names or _has_inside(names, name)]


def advice(names: Collection[str]) -> str:
    """Advice for a file or row without a harm score that has these columns."""
    found = mistakable(names)
    if not found:
        return "score it first (safelm.score), or name the column (--score_column)"
    return (
        f"{found[0]!r} is not taken for harm: in FineWeb-Edu it tells how educational a page is; score the corpus "
        f"first (safelm.score), or say that it is harm (--score_column={found[0]})"
    )


def published_folder(path: str) -> str:
    """The part of a path that gives the harm score of a published set's rows, such as "score_4_refusal", or ""."""
    folders = re.split(r"[/\\]", path)[:-1]
    return next((name for name in reversed(folders) if _PUBLISHED_FOLDER.fullmatch(name)), "")


def _is_of_scoring(name: str) -> bool:
    """Whether `safelm.score` writes a column of that name beside `harm_score`; annotations have no reasons."""
    return name == _SCORED or name.startswith(_SCORER)


def _has_inside(names: Collection[str], name: str) -> bool:
    return isinstance(names, Mapping) and field(names, name) is not None


def _score(column: str, found: Any) -> HarmScore:
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if is_number and MIN_SCORE <= found <= MAX_SCORE:
        return HarmScore(math.floor(found + 0.5), column, found)
    return HarmScore(None, column, found)
