"""Real text for safelm.synthesize, from public files on disk: sources with scores, and what to train a scorer on.

  python scripts/prepare_scored_text.py --source=DATA --output=W

DATA holds `text/` (C4) and `classifier/` (Civil Comments with raters' votes). Written are

  W/sources/score=N/   comments of 40 to 160 words; the share of raters who say toxic, nearest of 0, .25, .5, .75, 1,
                       gives harm score 0, 1, 3, 4, 4 (`civil_comments` of safelm.train_classifier): so no 2 and no 5
  W/pages/             C4 pages of 40 to 160 words, to be scored by safelm.score
  W/training/          other comments, those on which all raters agree, tweets (Davidson), and other C4 pages (safe),
                       for safelm.train_classifier

Which side a text goes to is decided by a hash of the text, so no scorer sees in training what it judges. Nothing read
is logged. What came of it, with the commands, stands in `safelm.safety.synthesis`.
"""

import argparse
import csv
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safelm import cli
from safelm.safety.classifier.labels import LABEL_TABLE

COMMENT_WORDS, PAGE_WORDS = (40, 160), (40, 160)
SOURCES = {1: 100, 3: 60, 4: 60}  # comments of each score
PAGES, TRAINING_COMMENTS, TRAINING_PAGES, TRAINING_TWEETS = 300, 3000, 400, 2000


def is_for_training(text: str) -> bool:
    """Half of all texts, by hash."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[0] < 128


def comments(source: Path) -> Iterator[dict[str, Any]]:
    """Civil Comments, a repeated text once: id, text, votes, harm_score."""
    seen = set()
    for row in _rows(source / "classifier/civil_toxic_comments.jsonl.gz"):
        if row["text"] not in seen:
            seen.add(row["text"])
            score = LABEL_TABLE["civil_comments"].score(row, "n_all_toxic")
            yield {"id": f"civil-{row['comment_id']}", **row, "harm_score": score}


def pages(source: Path) -> Iterator[dict[str, Any]]:
    """C4 pages of the right length: id, text, url."""
    for name in ("c4_train", "c4_validation"):
        for index, row in enumerate(_rows(source / f"text/{name}.jsonl.gz")):
            if _has_words(row, PAGE_WORDS):
                yield {"id": f"{name}-{index}", "text": row["text"], "url": row.get("url", ""), "language": "en"}


def main(flags: argparse.Namespace) -> None:
    """Writes the three folders and prints how many rows each file has."""
    source, output = Path(flags.source), Path(flags.output)
    training = {True: [], False: []}
    for row in comments(source):
        training[is_for_training(row["text"])].append(row)
    training[True] = [row for row in training[True] if row["n_all_toxic"] in (0, row["n_raters"])]
    votes = ("comment_id", "text", "n_raters", "n_all_toxic")
    _write(output / "training/comments.jsonl.gz", ({k: r[k] for k in votes} for r in training[True]), TRAINING_COMMENTS)
    for score, count in SOURCES.items():
        found = (row for row in training[False] if row["harm_score"] == score and _has_words(row, COMMENT_WORDS))
        kept = ({"id": r["id"], "text": r["text"], "language": "en", "harm_score": score} for r in found)
        _write(output / f"sources/score={score}/comments.jsonl.gz", kept, count)
    with gzip.open(source / "classifier/davidson_labeled_data.csv.gz", "rt", encoding="utf-8") as file:
        tweets = [{"text": row["tweet"], "class": row["class"]} for row in csv.DictReader(file)]
    _write(output / "training/tweets.jsonl.gz", tweets, TRAINING_TWEETS)
    split = {True: [], False: []}
    for row in pages(source):
        split[is_for_training(row["text"])].append(row)
    _write(output / "training/pages.jsonl.gz", split[True], TRAINING_PAGES)
    _write(output / "pages/c4.jsonl.gz", split[False], PAGES)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _has_words(row: Mapping[str, Any], limits: tuple[int, int]) -> bool:
    return limits[0] <= len(row["text"].split()) <= limits[1]


def _write(path: Path, rows: Iterable[Mapping[str, Any]], limit: int) -> None:
    """The rows with the smallest hashes, so that a file's order (by time, by score) doesn't matter."""
    kept = sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).digest())[:limit]
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(f"{path}.partial", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
    Path(f"{path}.partial").rename(path)
    print(f"{len(kept):6d} rows  {path}")


if __name__ == "__main__":
    example = "python scripts/prepare_scored_text.py --source=DATA --output=W"
    arguments = cli.parser("scripts.prepare_scored_text", __doc__, example)
    arguments.add_argument("--source", required=True, help="folder that holds text/ and classifier/")
    arguments.add_argument("--output", required=True, help="folder to write into")
    cli.run(main, arguments)
