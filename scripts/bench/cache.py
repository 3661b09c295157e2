"""Tokens/s of caching a SeqIO task beside the `tokenizers` package's own batched encoding: ratios of one run.

    python scripts/bench/cache.py [--tokenizer=DIR_OR_GGUF] [--input=DIR] [--megabytes=24] [--rounds=3] [--slow]

All sides have the same documents, generated web-like ones or those of `--input`, and the same vocabulary; in every
round each does all of them, in turn, so that load hits all alike. A ratio is a round's; the table has the median and
the range.

    encode_batch_fast     of the package itself, 256 texts at a time, all cores: texts in memory, what it made dropped
    encode_batch          the same with each token's place in the text
    read and kept         `encode_batch_fast`, the same files read, the ids in an array and in a file: no checks at all
    cache_tasks           the command's own work in this process: files read and unpacked, rows checked, split and
                          filtered, tokens, bounds, checksums and manifest written and synced
    .. vocabulary loaded  the same without the seconds in which it loads the vocabulary, whatever the input's size
    SeqIO's graph (--slow)  cache_tasks of a task with a step of somebody else's: TensorFlow's graph of single examples
    one by one (--slow)   `vocabulary.encode_tf` over single documents, as `seqio.preprocessors.tokenize` does

Seconds are of the clock and of processors (threads included): the first says how long one waits, the second what the
rest of the work costs, which other work on the machine disturbs less.
"""

import argparse
import gzip
import itertools
import json
import os
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tokenizers

from safelm import cli, documents
from safelm.text.tokenizer import Tokenizer

_WORD_COUNT = 8000
_BATCH_DOCUMENTS = 256  # as the task's own step takes them
BATCHED, PLACED, KEPT = "encode_batch_fast", "encode_batch", "read and kept"
CACHED, LOADED, GRAPH, SLOW = "cache_tasks", ".. vocabulary loaded", "SeqIO's graph", "one by one"
Seconds = tuple[float, float]  # of the clock and of processors


def main() -> None:
    """Prints rates and ratios."""
    parser = cli.parser("scripts.bench.cache", __doc__)
    parser.add_argument("--tokenizer", help="default: one trained on the generated words")
    parser.add_argument("--input", metavar="DIR", help="files named train-*, with a column `text` (default: generated)")
    parser.add_argument("--megabytes", type=int, default=24, help="of generated text")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--slow", action="store_true", help="with documents tokenized one by one")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = _words(np.random.default_rng(0))
        tokenizer = os.path.join(folder, "tokenizer")
        trained = Tokenizer.from_pretrained(flags.tokenizer) if flags.tokenizer else Tokenizer.train(words * 2, 4096)
        trained.save(tokenizer)  # as JSON, which loads in a second; reading a GGUF vocabulary takes several
        corpus = flags.input or os.path.join(folder, "corpus")
        if not flags.input:
            _write_corpus(corpus, words, flags.megabytes)
        _measure(folder, corpus, tokenizer, flags)


def _measure(folder: str, corpus: str, tokenizer: str, flags: argparse.Namespace) -> None:
    from data_tasks import tasks

    tasks.register(None, tokenizer, corpora={"raw_web": corpus}, settings={"validation_fraction": 0.0})
    sides: dict[str, Callable[[int], int]] = {
        BATCHED: _batched(corpus, tokenizer, "encode_batch_fast"),
        PLACED: _batched(corpus, tokenizer, "encode_batch"),
        KEPT: lambda turn: _kept(corpus, tokenizer, os.path.join(folder, "kept")),
        CACHED: lambda turn: _cached(corpus, tokenizer, os.path.join(folder, f"tokens-{turn}")),
    }
    if flags.slow:
        sides[GRAPH] = lambda turn: _through_the_graph(corpus, tokenizer, os.path.join(folder, f"graph-{turn}"))
        sides[SLOW] = lambda turn: _one_by_one("safelm_raw_web")
    found: dict[str, list[Seconds]] = {name: [] for name in (*sides, LOADED)}
    counts = {}
    for turn in range(flags.rounds):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            counts[name], seconds = _timed(lambda: sides[name](turn))  # noqa: B023
            found[name].append(seconds)
        _, loading = _timed(lambda: Tokenizer.from_pretrained(tokenizer))
        found[LOADED].append((found[CACHED][-1][0] - loading[0], found[CACHED][-1][1] - loading[1]))
    if len(set(counts.values())) > 1:
        raise SystemExit(f"not the same work: tokens made are {counts}")
    _report(found, counts[CACHED])


def _timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    began, processor = time.perf_counter(), time.process_time()
    made = work()
    return made, (time.perf_counter() - began, time.process_time() - processor)


def _report(found: dict[str, list[Seconds]], tokens: int) -> None:
    print(f"{tokens:,} tokens, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| side | tokens/s | times encode_batch_fast | times encode_batch | tokens/s a processor | times | times |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, seconds in found.items():
        cells = []
        for kind in (0, 1):
            cells.append(f"{tokens / statistics.median(each[kind] for each in seconds):,.0f}")
            for base in (BATCHED, PLACED):
                ratios = [other[kind] / own[kind] for own, other in zip(seconds, found[base], strict=True)]
                cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        print(f"| {name} | {' | '.join(cells)} |")


def _texts(corpus: str) -> Iterator[str]:
    for path in documents.list_files(corpus):
        for _, row in documents.read_rows(path, ["text"]):
            yield row["text"]


def _batched(corpus: str, tokenizer: str, method: str) -> Callable[[int], int]:
    """The package's own rate: nothing is read, nothing is kept."""
    encode_all = getattr(tokenizers.Tokenizer.from_file(os.path.join(tokenizer, "tokenizer.json")), method)
    texts = list(_texts(corpus))

    def encode(turn: int) -> int:
        tokens = 0
        for start in range(0, len(texts), _BATCH_DOCUMENTS):
            made = encode_all(texts[start : start + _BATCH_DOCUMENTS], add_special_tokens=False)
            tokens += sum(map(len, made)) + len(made)  # with the ends of documents that a store has
        return tokens

    return encode


def _kept(corpus: str, tokenizer: str, output: str) -> int:
    """The shortest program that leaves the ids of the files' texts on the disk."""
    backend, tokens = tokenizers.Tokenizer.from_file(os.path.join(tokenizer, "tokenizer.json")), 0
    texts = _texts(corpus)
    with open(output, "wb") as file:
        while batch := list(itertools.islice(texts, _BATCH_DOCUMENTS)):
            for made in backend.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.asarray([*made.ids, 0], np.uint16)
                file.write(ids.tobytes())
                tokens += len(ids)
    return tokens


def _cached(corpus: str, tokenizer: str, output: str) -> int:
    from safelm import cache_tasks
    from safelm.data.store import TokenStore

    argv = ["--tasks=raw_web", f"--corpus=raw_web={corpus}", f"--tokenizer={tokenizer}", f"--output={output}"]
    more = ["--splits=train", "--validation_fraction=0", "--workers=1"]
    cache_tasks.main(cache_tasks.arguments().parse_args([*argv, *more]))
    return TokenStore.open(os.path.join(output, "raw_web", "train"), verify_checksums=False).num_tokens


def _through_the_graph(corpus: str, tokenizer: str, output: str) -> int:
    from safelm.caching import shards

    with unittest.mock.patch.object(shards, "batched", lambda task: None):
        return _cached(corpus, tokenizer, output)


def _one_by_one(task_name: str) -> int:
    import seqio

    task = seqio.get_mixture_or_task(task_name)
    vocabulary = task.output_features["targets"].vocabulary
    vocabulary.encode("loaded before the clock starts")
    texts = task.source.get_dataset(split="train", shuffle=False).map(lambda e: vocabulary.encode_tf(e["text"]))
    return sum(len(ids) + 1 for ids in texts.as_numpy_iterator())


def _words(generator: np.random.Generator) -> list[str]:
    letters, lengths = np.array(list("etaoinshrdlucmfwypvbgk")), generator.integers(2, 9, _WORD_COUNT)
    weights = 1 / np.arange(2, len(letters) + 2)
    return ["".join(generator.choice(letters, length, p=weights / weights.sum())) for length in lengths]


def _write_corpus(folder: str, words: list[str], megabytes: int) -> None:
    generator, written, shard = np.random.default_rng(1), 0, 0
    frequencies = 1 / np.arange(2, _WORD_COUNT + 2)
    os.makedirs(folder)
    while written < megabytes << 20:
        with gzip.open(os.path.join(folder, f"train-{shard:05d}.jsonl.gz"), "wt", compresslevel=1) as file:
            for i in range(2000):
                length = int(generator.integers(50, 900))
                text = " ".join(generator.choice(words, length, p=frequencies / frequencies.sum()))
                file.write(json.dumps({"id": f"{shard}-{i}", "text": text, "harm_score": i % 6}) + "\n")
                written += len(text)
        shard += 1


if __name__ == "__main__":
    main()
