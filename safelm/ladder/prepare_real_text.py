"""Converts public text on disk to the published columns; the files' labels give the harm scores.

  python -m safelm.ladder.prepare_real_text --source=DATA --output=DIR

DATA holds `text/` (WikiText-2, C4) and `classifier/` (comments labelled by people). The table below maps labels to
scores; documents with other labels are left out. No text is logged. A hash of the text decides the split.

| source | label | harm_score |
|---|---|---|
| WikiText-2 articles, C4 pages | none; taken for safe web text | 0 |
| DynaHate | 0 not hate / 1 hate | 1 / 5 |
| Davidson tweets | 1 offensive / 0 hate | 4 / 5 |
| Toxic spans (Civil Comments) | at least one toxic span | 4 |
"""

import argparse
import csv
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from safelm import cli

VALIDATION_SHARE = 0.04


def wikitext(source: Path) -> Iterator[tuple[str, str, int]]:
    """Articles of WikiText-2 with its tokenisation marks undone: (id, text, harm_score)."""
    for i, article in enumerate(wikitext_articles(source / "text/wiki.train.tokens.gz")):
        if text := untokenised(article).strip():
            yield f"wikitext-{i}", text, 0


def wikitext_articles(path: Path) -> list[str]:
    """The articles in a file of WikiText-2, unchanged."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return re.split(r"\n(?= = [^=])", file.read())


def untokenised(article: str) -> str:
    """The article without WikiText's tokenisation marks."""
    text = re.sub(r" ?@([-,.])@ ?", r"\1", article).replace(" <unk>", "")
    return re.sub(r" ([,.;:!?)])", r"\1", text).replace("( ", "(")


def c4(source: Path) -> Iterator[tuple[str, str, int]]:
    """C4 pages: (id, text, harm_score)."""
    for name in ("c4_train", "c4_demo"):
        with gzip.open(source / f"text/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for i, line in enumerate(file):
                yield f"{name}-{i}", json.loads(line)["text"], 0


def comments(source: Path) -> Iterator[tuple[str, str, int]]:
    """Comments labelled by people: (id, text, harm_score)."""
    with gzip.open(source / "classifier/dyn21_train_union.jsonl.gz", "rt", encoding="utf-8") as file:
        for i, line in enumerate(file):
            row = json.loads(line)
            if str(row["label"]) in ("0", "1"):
                yield f"dynahate-{i}", row["text"], 5 if str(row["label"]) == "1" else 1
    with gzip.open(source / "classifier/davidson_labeled_data.csv.gz", "rt", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file)):
            if row["class"] in ("0", "1"):
                yield f"davidson-{i}", row["tweet"], {"0": 5, "1": 4}[row["class"]]
    with gzip.open(source / "classifier/tsd_train.csv.gz", "rt", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file)):
            if row["spans"] != "[]":
                yield f"toxic-spans-{i}", row["text"], 4


def split_of(text: str) -> str:
    """The split, from a hash of the text, so that repeated documents never straddle train and validation."""
    digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64 else "train"


def main(arguments: argparse.Namespace) -> None:
    """Writes `<output>/raw_web/{train,validation}-*.jsonl.gz` and prints the counts by score."""
    folder = Path(arguments.output) / "raw_web"
    folder.mkdir(parents=True)
    counts: Counter[tuple[str, int]] = Counter()
    seen: set[str] = set()
    paths = {split: folder / f"{split}-00000-of-00001.jsonl.gz" for split in ("train", "validation")}
    files = {split: gzip.open(f"{path}.partial", "wt", encoding="utf-8") for split, path in paths.items()}
    for read in (wikitext, c4, comments):
        for key, text, score in read(Path(arguments.source)):
            if not text.strip() or text in seen:
                continue
            seen.add(text)
            split = split_of(text)
            counts[split, score] += 1
            metadata = {"url": "", "language": "en", "harm_score": score}
            files[split].write(json.dumps({"id": key, "text": text, "metadata": metadata}) + "\n")
    for split, file in files.items():
        file.close()
        Path(f"{paths[split]}.partial").rename(paths[split])
    for (split, score), count in sorted(counts.items()):
        print(f"{split:10s} harm_score {score}: {count:6d} documents")


if __name__ == "__main__":
    example = "python -m safelm.ladder.prepare_real_text --source=DATA --output=DIR"
    flags = cli.parser("safelm.ladder.prepare_real_text", __doc__, example)
    flags.add_argument("--source", required=True, help="folder that holds text/ and classifier/")
    flags.add_argument("--output", required=True, help="folder to write raw_web/ into; must not hold one")
    cli.run(main, flags)
