"""Answers that people have labelled: what judges are measured and trained on. None is bundled.

A source is named by one string:

    xstest:PATH      XSTest's completions of models (columns prompt, completion, type, final_label); a file or a folder
    pyrit            people's "objective achieved" inside the installed package pyrit, which isn't imported
    pyrit_refusal    people's "is a refusal" inside the same
    labelled:PATH    your own: columns prompt, response, asks_harm (0 or 1), label (compliance, partial, refusal), and
                     author (which model) where there are several

Messages name file, row and column, never a text.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm.documents.tables import shown
from safelm.evaluate.judges.verdicts import Exchange
from safelm.evaluate.suites.prompt_files import read_rows
from safelm.io.files import installed_folders

COMPLIES, PARTLY, REFUSES = LABELS = ("compliance", "partial", "refusal")
_XSTEST = {"1_full_compliance": COMPLIES, "2_full_refusal": REFUSES, "3_partial_refusal": PARTLY}
_YES_OR_NO = {"0": False, "false": False, "1": True, "true": True}
_PACKAGED = {
    "pyrit": ("datasets/scorer_evals/objective/*.csv", {"1": COMPLIES, "0": REFUSES}, True),
    "pyrit_refusal": ("datasets/scorer_evals/refusal_scorer/*.csv", {"0": COMPLIES, "1": REFUSES}, False),
}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An exchange and what people said of it.

    Attributes:
      label: of `LABELS`. An answer to a request for harm is harmful where it complies in full; as in XSTest's own
        analysis, a partial refusal is a refusal.
      group: exchanges of one request never stand on both sides of a split.
      author: which model answered.
    """

    exchange: Exchange
    label: str
    group: str
    author: str

    @property
    def key(self) -> str:
        """A hash of request and answer."""
        text = f"{self.exchange.request}\0{self.exchange.answer}"
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def read_labelled(sources: Sequence[str]) -> list[Labelled]:
    """All that the sources name, each exchange once.

    Raises ValueError, naming file, row and column, for missing columns or unknown labels; FileNotFoundError where
    nothing is there.
    """
    found: dict[str, Labelled] = {}
    for source in sources:
        rows = list(_read(source))
        if not rows:
            raise ValueError(f"--judge_calibration={source}: holds no labelled answers")
        found |= {row.key: row for row in rows}
    return list(found.values())


def choose(rows: Sequence[Labelled], most: int) -> list[Labelled]:
    """At most `most` (0: all), in their order: by hash, as evenly as can be over authors, kinds of request and labels.

    Raises ValueError for a negative number.
    """
    if most < 0:
        raise ValueError(f"{most} labelled answers: must be 0 (all) or more")
    if not most or most >= len(rows):
        return list(rows)
    cells: dict[tuple[str, bool, bool], list[str]] = {}
    for row in rows:
        cells.setdefault((row.author, row.exchange.asks_harm, row.label == COMPLIES), []).append(row.key)
    turns = sorted((turn, cell, key) for cell, keys in cells.items() for turn, key in enumerate(sorted(keys)))
    chosen = {key for _, _, key in turns[:most]}
    return [row for row in rows if row.key in chosen]


def describe(rows: Sequence[Labelled]) -> dict[str, Any]:
    """How many there are, and a hash of them all."""
    digest = hashlib.sha256("".join(sorted(f"{row.key}{row.label}" for row in rows)).encode()).hexdigest()
    return {"answers": len(rows), "requests": len({row.group for row in rows}), "sha256": digest}


def _read(source: str) -> Iterator[Labelled]:
    scheme, _, place = source.partition(":")
    if source in _PACKAGED:
        pattern, labels, asks_harm = _PACKAGED[source]
        for path in _package_files(source, pattern):
            columns = ("objective", "assistant_response", "human_score")
            yield from _file(path, columns, labels, asks_harm, author=source)
        return
    if scheme not in ("xstest", "labelled") or not place:
        wanted = "xstest:PATH, labelled:PATH, pyrit or pyrit_refusal"
        raise ValueError(f"--judge_calibration={source}: expected {wanted}")
    for path in _files(source, place):
        if scheme == "xstest":
            yield from _file(path, ("prompt", "completion", "final_label", "type"), _XSTEST, None)
        else:
            yield from _file(path, ("prompt", "response", "label", "asks_harm"), {n: n for n in LABELS}, None)


def _files(source: str, place: str) -> list[str]:
    folder = pathlib.Path(place)
    if "://" in place or not folder.is_dir():
        return [place]
    found = sorted(str(path) for path in folder.iterdir() if ".csv" in path.suffixes or ".jsonl" in path.suffixes)
    if not found:
        raise FileNotFoundError(f"--judge_calibration={source}: the folder holds no .csv or .jsonl")
    return found


def _package_files(source: str, pattern: str) -> list[str]:
    found = [str(path) for folder in installed_folders("pyrit") for path in sorted(folder.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"--judge_calibration={source}: not installed (pip install --no-deps pyrit==1.1.0)")
    return found


def _file(
    path: str, columns: Sequence[str], labels: Mapping[str, str], asks_harm: bool | None, *, author: str = ""
) -> Iterator[Labelled]:
    for number, row in read_rows(path):
        missing = next((name for name in columns if name not in row), None)
        if missing is not None:
            raise ValueError(f"{path}: row {number}: no column {missing!r}; it has {', '.join(sorted(map(str, row)))}")
        label = labels.get(str(row[columns[2]]).strip().removesuffix(".0"))
        if label is None:
            raise ValueError(
                f"{path}: row {number}: {columns[2]}={shown(row[columns[2]])}, want one of {', '.join(labels)}"
            )
        request, answer = row[columns[0]], row[columns[1]]
        if not isinstance(request, str) or not isinstance(answer, str):
            raise ValueError(f"{path}: row {number}: {columns[0]} and {columns[1]} must be texts")
        exchange = Exchange(request, answer, _asks_harm(row, asks_harm, f"{path}: row {number}"))
        group = hashlib.sha256(" ".join(request.lower().split()).encode("utf-8", "replace")).hexdigest()[:16]
        yield Labelled(exchange, label, group, author or str(row.get("author") or pathlib.PurePath(path).name))


def _asks_harm(row: Mapping[str, Any], known: bool | None, where: str) -> bool:
    if known is not None:
        return known
    if "asks_harm" in row:
        said = str(row["asks_harm"]).strip().lower().removesuffix(".0")
        if said not in _YES_OR_NO:
            raise ValueError(f"{where}: asks_harm={shown(row['asks_harm'])}, want 0 or 1")
        return _YES_OR_NO[said]
    return str(row["type"]).startswith("contrast_")
