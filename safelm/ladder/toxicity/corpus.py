"""Makes the corpus of the toxicity ladder from a folder of public text and of comments labelled by people.

| folder          | text                                                                          | harm_score      |
|-----------------|-------------------------------------------------------------------------------|-----------------|
| raw_web         | pages (WikiText-2, C4, two books of NLTK), comments not toxic, toxic comments | 0, 0, 5         |
| classified      | the same, with the scores of our classifier in place of the labels            | 0 or 5          |
| clean, toxic    | speeches of NLTK; toxic comments kept out of raw_web: for finetuning          | 0, 5            |
| own_spans       | one span a toxic comment of raw_web, from its first character to its last     |                 |

Toxic are the comments of Civil Comments, which are all toxic, and of DynaHate those labelled hate; not toxic are
DynaHate's others. Pages are left out, by the hash of their text, until toxic comments are the stated share of all
characters. A text takes part once. Comments that the judges are measured on (the trial and test parts of Toxic Spans,
which stand among the Civil Comments) take no part, and half of DynaHate is kept for the classifier that filters.
"""

import csv
import gzip
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from safelm.io import files, records
from safelm.ladder.prepare_real_text import split_of, wikitext

CIVIL, DYNAHATE = "civil_toxic_comments.jsonl.gz", "dyn21_train_union.jsonl.gz"
HELD_OUT = ("tsd_trial.csv.gz", "tsd_test.csv.gz")  # what judges are calibrated and measured on
_BOOKS, _SPEECHES = {"abc": ("abc/",), "genesis": ("genesis/english",)}, ("inaugural", "state_union")
_PIECE_CHARACTERS = 3000  # of a book
_RELEARNING_SHARE = 0.1  # of the toxic comments
TOXIC = 5


def rank(text: str, purpose: str) -> float:
    """A number in [0, 1) from a text's letters and the purpose of the draw."""
    digest = hashlib.sha256(f"{purpose}:{' '.join(text.lower().split())}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a compressed JSON-lines or CSV file. Raises FileNotFoundError or ValueError naming it."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file)) if path.suffixes[0] == ".csv" else [json.loads(line) for line in file]
    except FileNotFoundError:
        raise FileNotFoundError(f"--config.real: there is no file {path}") from None
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({type(error).__name__})") from None


def for_the_filter(text: str) -> bool:
    """Whether a comment of DynaHate is kept for the classifier that filters."""
    return rank(text, "filter") < 0.5


def comments(source: pathlib.Path) -> Iterator[tuple[str, str, bool]]:
    """(id, text, whether it is toxic) of the comments to pretrain on."""
    held_out = {_key(row["text"]) for name in HELD_OUT for row in read_rows(source / "classifier" / name)}
    for i, row in enumerate(read_rows(source / "classifier" / CIVIL)):
        if _key(row["text"]) not in held_out:
            yield f"civil-{i}", row["text"], True
    for i, row in enumerate(read_rows(source / "classifier" / DYNAHATE)):
        if str(row["label"]) in ("0", "1") and not for_the_filter(row["text"]):
            yield f"dynahate-{i}", row["text"], str(row["label"]) == "1"


def _pages(source: pathlib.Path) -> Iterator[tuple[str, str]]:
    for name, text, _ in wikitext(source):
        yield name, text
    for i, row in enumerate(read_rows(source / "text" / "c4_train.jsonl.gz")):
        yield f"c4-{i}", row["text"]
    for name, starts in _BOOKS.items():
        yield from _book(source / "text" / f"nltk_{name}.zip", starts)


def _book(path: pathlib.Path, starts: tuple[str, ...] = ("",)) -> Iterator[tuple[str, str]]:
    """(id, piece) of the texts in an archive, cut between lines into pieces of some 3,000 characters."""
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"--config.real: there is no file {path}") from None
    for name in sorted(archive.namelist()):
        if not name.endswith(".txt") or not name.startswith(starts):
            continue
        piece, number = [], 0
        for line in [*io.TextIOWrapper(archive.open(name), encoding="latin-1"), None]:
            if line is None or sum(map(len, piece)) + len(line) > _PIECE_CHARACTERS:
                if text := "".join(piece).strip():
                    yield f"{name}-{number}", text
                piece, number = [], number + 1
            piece.append(line or "")


def write_corpus(source: str, corpus: pathlib.Path, toxic_share: float) -> dict[str, Any]:
    """Writes the corpus unless it is complete, and returns what it holds: counts, shares, a fingerprint.

    Raises FileNotFoundError or ValueError naming what `source` lacks.
    """
    if (corpus / "corpus.json").exists():
        return records.read(corpus / "corpus.json", "remove the folder, and it is written again")
    folder = pathlib.Path(source)
    found = _distinct(comments(folder))
    kept = [row for row in found if row[2]]
    toxic = [row for row in kept if rank(row[1], "relearning") >= _RELEARNING_SHARE]
    others = [row for row in found if not row[2]]
    room = sum(len(text) for _, text, _ in toxic) * (1 - toxic_share) / toxic_share
    room -= sum(len(text) for _, text, _ in others)
    pages, size = [], 0
    for name, text in sorted(_pages(folder), key=lambda row: rank(row[1], "pages")):
        if size < room and text.strip():
            pages.append((name, text, False))
            size += len(text)
    rows = sorted([*pages, *others, *toxic], key=lambda row: rank(row[1], "order"))
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    _write(corpus / "raw_web", rows)
    _write_spans(corpus, rows)
    speeches = [(*row, False) for name in _SPEECHES for row in _book(folder / "text" / f"nltk_{name}.zip")]
    _write(corpus / "clean" / "raw_web", speeches)
    _write(corpus / "toxic" / "raw_web", [row for row in kept if rank(row[1], "relearning") < _RELEARNING_SHARE])
    sizes = {name: sum(len(row[1]) for row in group) for name, group in _groups(pages, others, toxic).items()}
    facts = {
        "documents": {name: len(group) for name, group in _groups(pages, others, toxic).items()},
        "characters": sizes,
        "toxic_share": round(sizes["toxic comments"] / sum(sizes.values()), 4),
        "sha256": digest,
    }
    records.write(corpus / "corpus.json", facts)
    return facts


def _groups(pages: list[Any], others: list[Any], toxic: list[Any]) -> dict[str, list[Any]]:
    return {"pages": pages, "comments not toxic": others, "toxic comments": toxic}


def write_classified(
    corpus: pathlib.Path, value_N: Float[np.ndarray, " N"], threshold: float, facts: pathlib.Path
) -> None:
    """Writes `classified`, raw_web with a classifier's scores, and into `facts` how good they are.

    Args:
      value_N: the classifier's value of every document, in the order of `read_corpus`; toxic from `threshold` on.
    """
    rows, chosen_N = list(read_corpus(corpus / "raw_web")), value_N >= threshold
    labels_N = np.array([is_toxic for *_, is_toxic in rows])
    scored = [(name, text, bool(is_chosen)) for (name, text, _), is_chosen in zip(rows, chosen_N, strict=True)]
    _write(corpus / "classified" / "raw_web", scored)
    characters_N = np.array([len(text) for _, text, _ in rows])
    shares = {
        "recall": (labels_N & chosen_N).sum() / labels_N.sum(),
        "precision": (labels_N & chosen_N).sum() / max(chosen_N.sum(), 1),
        "toxic_share_left": (characters_N * (labels_N & ~chosen_N)).sum() / (characters_N * ~chosen_N).sum(),
    }
    records.write(facts, {name: round(float(share), 4) for name, share in shares.items()})


def read_corpus(folder: pathlib.Path) -> Iterator[tuple[str, str, bool]]:
    """(id, text, whether it is toxic) of a folder's training documents and then of those held out."""
    for split in ("train", "validation"):
        for row in read_rows(folder / f"{split}-00000-of-00001.jsonl.gz"):
            yield row["id"], row["text"], row["metadata"]["harm_score"] == TOXIC


def _distinct(rows: Iterable[tuple[str, str, bool]]) -> list[tuple[str, str, bool]]:
    found = {}
    for row in rows:
        if row[1].strip():
            found.setdefault(_key(row[1]), row)
    return list(found.values())


def _key(text: str) -> str:
    return " ".join(text.lower().split())


def _write(folder: pathlib.Path, rows: list[tuple[str, str, bool]]) -> None:
    for split in ("train", "validation"):
        lines = [
            json.dumps({"id": name, "text": text, "metadata": {"harm_score": TOXIC if is_toxic else 0}})
            for name, text, is_toxic in rows
            if split_of(text) == split
        ]
        write_lines(folder / f"{split}-00000-of-00001.jsonl.gz", lines)


def _write_spans(corpus: pathlib.Path, rows: list[tuple[str, str, bool]]) -> None:
    for split in ("train", "validation"):
        own = [(text, is_toxic) for _, text, is_toxic in rows if split_of(text) == split]
        lines = [
            json.dumps({"row": i, "spans": [{"start": 0, "end": len(text), "kind": "document", "label": str(TOXIC)}]})
            for i, (text, is_toxic) in enumerate(own, start=1)
            if is_toxic
        ]
        write_lines(corpus / "own_spans" / f"{split}-00000-of-00001.jsonl.gz", lines)


def write_lines(path: pathlib.Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0))
