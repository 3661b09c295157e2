"""MB/s of finding the report card's n-grams beside regular expressions and datatrove's C4 bad-words filter.

    python scripts/bench/report_card.py                                    # the synthetic web
    python scripts/bench/report_card.py --texts='web/*.jsonl.gz' --megabytes=8
    python -m venv .venv-datatrove && .venv-datatrove/bin/pip install datatrove==0.10.1
    python scripts/bench/report_card.py --rivals_python=.venv-datatrove/bin/python

All variants get the same queries and documents, which are in memory, and run on one core, in turn, `--rounds` times.
The slow ones get the first `--slow_megabytes` of them. MB is UTF-8. Quote the ratios: load hits all alike.
`report card` counts every occurrence by query and the words; the regular expressions count non-overlapping occurrences
in lower-cased text without any other rule:

    regex a query      a compiled expression for each of the 694 queries
    one regex          their alternation in one expression
    datatrove C4       C4BadWordsFilter 0.10.1, which only says whether a document has a hit. Its word list comes from
                       the network; here it gets the queries as its English list. It stops at a document's first hit.

`counts` is what each found in its documents (datatrove: documents). The row of a file is the command's counting of a
piece of JSON lines: reading, parsing, counting.

Measured on an AMD EPYC with AVX-512, one core, load 1 (quiet), C4's pages (1,425 documents, 3.00 MB; rivals 0.29 MB):
report card 114 MB/s (110 to 131), a file 70.6 (54.7 to 73.9); datatrove 0.10.1 3.15 (3.13 to 3.15): 36x (35 to 42);
one regex 1.84: 63x (60 to 71); regex a query 0.138: 820x (805 to 951).
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safelm import cli, documents
from safelm.safety.report_card import queries as query_sets
from safelm.safety.report_card.counting import CountSettings, Piece, count_piece
from safelm.safety.report_card.matching import Matcher
from safelm.synthetic_web import corpus

BATCH_CHARACTERS = 1 << 19
# Reads {"texts", "queries"} from a file, answers each line of its input with a round's seconds and hits.
RIVAL = r"""
import json, re, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import C4BadWordsFilter
import datatrove
given = json.load(open(sys.argv[1]))
queries = given["queries"]
words = C4BadWordsFilter()
words._badwords_regex = {"en": re.compile(r"(?:\W|^)({})(?:\W|$)".format("|".join(map(re.escape, queries))))}
texts = [Document(text=text, id=str(i), metadata={"language": "en"}) for i, text in enumerate(given["texts"])]
print(json.dumps(getattr(datatrove, "__version__", "0.10.1")), flush=True)
for _ in sys.stdin:
    started = time.perf_counter()
    hits = sum(words.filter(text) is not True for text in texts)
    print(json.dumps([time.perf_counter() - started, hits]), flush=True)
"""


def main() -> None:
    arguments = parse()
    texts = list(load(arguments.texts, int(arguments.megabytes * 1e6)))
    few = list(itertools.takewhile(Budget(arguments.slow_megabytes * 1e6), texts))
    queries = query_sets.load_queries(arguments.queries)
    print(f"{len(texts):,} documents, {megabytes(texts):.2f} MB, {len(queries.queries)} queries")
    variants: dict[str, tuple[float, Callable[[], tuple[float, int]]]] = {
        "report card": (megabytes(texts), timed(ours(texts, queries))),
        "regex a query": (megabytes(few), timed(regex_each(few, queries.queries))),
        "one regex": (megabytes(few), timed(regex_one(few, queries.queries))),
    }
    with tempfile.TemporaryDirectory() as folder:
        rival = None
        if arguments.rivals_python:
            rival, run = datatrove(arguments.rivals_python, folder, few, queries.queries)
            variants["datatrove C4"] = (megabytes(few), run)
        variants["report card, a file"] = (megabytes(texts), timed(whole_file(folder, texts, arguments.queries)))
        rounds = [{name: run() for name, (_, run) in variants.items()} for _ in range(arguments.rounds)]
        if rival is not None:
            rival.stdin.close()
            rival.wait()
    report(rounds, {name: size for name, (size, _) in variants.items()})


class Budget:
    """True until the texts it was asked about have so many bytes."""

    def __init__(self, limit: float):
        self.left = limit

    def __call__(self, text: str) -> bool:
        self.left -= len(text.encode())
        return self.left >= 0


def megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def report(rounds: Sequence[dict[str, tuple[float, int]]], sizes: dict[str, float]) -> None:
    print("\n| variant | MB | MB/s, median (range) | report card is faster by | counts |\n|---|---|---|---|---|")
    for name, size in sizes.items():
        rates = [size / one[name][0] for one in rounds]
        ratios = [sizes["report card"] / one["report card"][0] / rate for one, rate in zip(rounds, rates, strict=True)]
        middle, low, high = (
            f"{r:,.{1 if r < 100 else 0}f}" for r in (statistics.median(ratios), min(ratios), max(ratios))
        )
        rate = f"{statistics.median(rates):.3g} ({min(rates):.3g} to {max(rates):.3g})"
        print(f"| {name} | {size:.2f} | {rate} | {middle}x ({low} to {high}) | {rounds[-1][name][1]:,} |")


def load(pattern: str | None, limit: int) -> Iterator[str]:
    """Documents of files, or of the synthetic web, until there are `limit` bytes."""
    if pattern:
        found = (
            row["text"] for path in documents.list_files(pattern) for _, row in documents.read_rows(path, ["text"])
        )
    else:
        found = (corpus.draft(0, "train", number).text for number in range(10**9))
    for text in found:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text


def timed(function: Callable[[], int]) -> Callable[[], tuple[float, int]]:
    def run() -> tuple[float, int]:
        started = time.perf_counter()
        hits = function()
        return time.perf_counter() - started, hits

    return run


def ours(texts: Sequence[str], queries: query_sets.QuerySet) -> Callable[[], int]:
    matcher = Matcher(queries)

    def run() -> int:
        hits, batch, characters = 0, [], 0
        for text in texts:
            batch.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                hits += len(matcher.find(batch).query_M)
                batch, characters = [], 0
        return hits + len(matcher.find(batch).query_M)

    return run


def regex_each(texts: Sequence[str], queries: Sequence[str]) -> Callable[[], int]:
    compiled = [re.compile(rf"\b{re.escape(query)}\b") for query in queries]
    return lambda: sum(len(one.findall(lowered)) for text in texts for lowered in [text.lower()] for one in compiled)


def regex_one(texts: Sequence[str], queries: Sequence[str]) -> Callable[[], int]:
    compiled = re.compile(rf"\b(?:{'|'.join(map(re.escape, queries))})\b")
    return lambda: sum(len(compiled.findall(text.lower())) for text in texts)


def whole_file(folder: str, texts: Sequence[str], queries: str | None) -> Callable[[], int]:
    path = os.path.join(folder, "documents.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    piece, settings = Piece("all", path, os.path.getsize(path)), CountSettings(queries=queries)

    def run() -> int:
        count, _ = count_piece(piece, settings)
        return count.tallies["all"].found["all"].hits if "all" in count.tallies["all"].found else 0

    return run


def datatrove(python: str, folder: str, texts: Sequence[str], queries: Sequence[str]) -> Any:
    path = os.path.join(folder, "given.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"texts": texts, "queries": queries}, file)
    rival = subprocess.Popen(
        [python, "-c", RIVAL, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )
    version = rival.stdout.readline()
    if not version:
        sys.exit(f"--rivals_python={python}: datatrove can't be run there")
    print(f"datatrove {json.loads(version)}")

    def run() -> tuple[float, int]:
        rival.stdin.write("\n")
        rival.stdin.flush()
        seconds, hits = json.loads(rival.stdout.readline())
        return seconds, hits

    return rival, run


def parse() -> argparse.Namespace:
    parser = cli.parser("scripts.bench.report_card", __doc__)
    parser.add_argument("--texts", help="files with a column text (default: the synthetic web)")
    parser.add_argument("--megabytes", type=float, default=3.0, help="of text to take (default %(default)s)")
    parser.add_argument("--slow_megabytes", type=float, default=0.3, help="of it for the rivals (default %(default)s)")
    parser.add_argument("--queries", help="as for safelm.report_card")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--rivals_python", help="a Python that has datatrove")
    return parser.parse_args()


if __name__ == "__main__":
    main()
