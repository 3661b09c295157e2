"""Real text for safelm.synthesize, from public files on disk: sources with scores, and what to train a scorer on.

  python scripts/studies/prepare_scored_text.py --source=DATA --output=W

DATA holds `text/` (C4) and `classifier/` (comments and posts labelled by people). Written are

  W/sources/score=3/   Civil Comments of 40 to 160 words that its raters found toxic (the file has no others, and its
                       votes don't say how toxic)
  W/sources/score=5/   hateful posts of DynaHate, as long
  W/pages/             C4 pages of 40 to 160 words, to be scored by safelm.score
  W/training/          other posts of DynaHate, tweets (Davidson), and other C4 pages (safe), for
                       safelm.train_classifier

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

WORDS = (40, 160)
COMMENTS, POSTS = 160, 60  # to rewrite, to refuse
PAGES, TRAINING_POSTS, TRAINING_PAGES, TRAINING_TWEETS = 300, 2000, 400, 2000


def is_for_training(text: str) -> bool:
    """Half of all texts, by hash."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[0] < 128


def pages(source: Path) -> Iterator[dict[str, Any]]:
    """C4 pages of the right length: id, text, url."""
    for name in ("c4_train", "c4_validation"):
        for index, row in enumerate(_rows(source / f"text/{name}.jsonl.gz")):
            if _is_long_enough(row["text"]):
                yield {"id": f"{name}-{index}", "text": row["text"], "url": row.get("url", ""), "language": "en"}


def main(flags: argparse.Namespace) -> None:
    """Writes the three folders and prints how many rows each file has."""
    source, output = Path(flags.source), Path(flags.output)
    comments = (
        {"id": f"civil-{row['comment_id']}", "text": row["text"], "language": "en", "harm_score": 3}
        for row in _each_text(source / "classifier/civil_toxic_comments.jsonl.gz")
        if _is_long_enough(row["text"])
    )
    _write(output / "sources/score=3/comments.jsonl.gz", comments, COMMENTS)
    posts = [row for row in _each_text(source / "classifier/dyn21_train_union.jsonl.gz") if row["label"] in (0, 1)]
    hateful = (
        {"id": f"dynahate-{_digest(row['text']).hex()[:12]}", "text": row["text"], "language": "en", "harm_score": 5}
        for row in posts
        if row["label"] == 1 and _is_long_enough(row["text"]) and not is_for_training(row["text"])
    )
    _write(output / "sources/score=5/posts.jsonl.gz", hateful, POSTS)
    training = ({"text": row["text"], "label": row["label"]} for row in posts if is_for_training(row["text"]))
    _write(output / "training/posts.jsonl.gz", training, TRAINING_POSTS)
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


def _each_text(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, a repeated text once."""
    seen = set()
    for row in _rows(path):
        if row["text"] not in seen:
            seen.add(row["text"])
            yield row


def _is_long_enough(text: str) -> bool:
    return WORDS[0] <= len(text.split()) <= WORDS[1]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _write(path: Path, rows: Iterable[Mapping[str, Any]], limit: int) -> None:
    """The rows with the smallest hashes, so that a file's order (by time, by score) doesn't matter."""
    kept = sorted(rows, key=lambda row: _digest(row["text"]))[:limit]
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(f"{path}.partial", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
    Path(f"{path}.partial").rename(path)
    print(f"{len(kept):6d} rows  {path}")


if __name__ == "__main__":
    example = "python scripts/studies/prepare_scored_text.py --source=DATA --output=W"
    arguments = cli.parser("scripts.studies.prepare_scored_text", __doc__, example)
    arguments.add_argument("--source", required=True, help="folder that holds text/ and classifier/")
    arguments.add_argument("--output", required=True, help="folder to write into")
    cli.run(main, arguments)
