"""Padding and documents/s of neural scorers' batches: by the finer table and wider windows here, and by those before.

    python scripts/bench/batching.py --texts='c4/*.jsonl.gz' [--max_tokens=512] [--first_only]
    python scripts/bench/batching.py --texts='c4/*.jsonl.gz' --max_tokens=2048 --batch_tokens=16384 --plan --repeat=20

MiniLM's tokenizer cuts the texts into chunks of --max_tokens, or with --first_only reads their beginning. "Before" are
22 lengths up to 6,144 (with a budget of 512, that of CPUs, all multiples of 8 below 256), chunks sorted among 16
batches or 262,144 tokens, and calls of 2 MB of text. --plan computes nothing: padding alone, also of budgets and
lengths that are for other devices or models. --repeat reads the texts so often, each time cut at another place, where
there are too few for a call. Compilation is not in the time; both sides run in turn, the ratio is of each round.

Padding and programs by --plan on 1,500 pages of C4, with a budget of 16,384 --repeat=20:

| chunks                             | budget | before        | now           |
|------------------------------------|-------:|--------------:|--------------:|
| 256 tokens                         |    512 |  1.22%, of 32 |  1.22%, of 32 |
| 512 tokens                         |    512 |  3.11%, of 36 |  1.33%, of 48 |
| the first 512                      |    512 |  3.74%, of 36 |  1.62%, of 48 |
| the first 2,048                    |    512 | 10.97%, of 40 |  2.14%, of 96 |
| 512 tokens                         | 16,384 | 13.59%, of 15 |  1.92%, of 48 |
| the first 2,048                    | 16,384 | 22.73%, of 19 |  2.69%, of 96 |
| the first 8,192                    | 16,384 | 25.04%, of 23 | 2.95%, of 128 |
"""

import argparse
import bisect
import dataclasses
import glob
import gzip
import json
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from safelm import cli

BEFORE = (16, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144)
BEFORE_CPU = (*range(8, 256, 8), *(length for length in BEFORE if length >= 256))
CALL_CHARACTERS = 2 << 20
CPU_BUDGET = 512


def main() -> None:
    """Prints a line a side."""
    flags = _parser().parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from safelm.safety.embedding import Embedder, load_backbone

    backbone = load_backbone("minilm", max_tokens=min(flags.max_tokens, 512))
    tokenizer = backbone.tokenizer.first_only() if flags.first_only else backbone.tokenizer
    texts = _texts(flags.texts, flags.documents, flags.repeat)
    lengths = [len(chunk) for _, chunk in tokenizer.chunks(texts, flags.max_tokens)]
    tokens = sum(lengths)
    print(
        f"{len(texts):,} texts, {tokens:,} tokens in {len(lengths):,} chunks of at most {flags.max_tokens}, budget "
        f"{flags.batch_tokens:,}, {flags.devices} devices; load {os.getloadavg()[0]:.1f}"
    )
    ours = Embedder(dataclasses.replace(backbone, max_tokens=flags.max_tokens), batch_tokens=flags.batch_tokens)
    table = BEFORE_CPU if flags.batch_tokens <= CPU_BUDGET else BEFORE
    former = (*(length for length in table if length < flags.max_tokens), flags.max_tokens)
    per_batch = flags.batch_tokens * flags.devices
    sides = {
        "before": (former, max(1 << 18, 16 * per_batch), CALL_CHARACTERS),
        "now": (ours.buckets, max(1 << 18, 512 * per_batch), max(CALL_CHARACTERS, 4 * 512 * per_batch)),
    }
    for name, (buckets, window, characters) in sides.items():
        calls = _calls(texts, characters)
        found = [[len(chunk) for _, chunk in tokenizer.chunks(call, flags.max_tokens)] for call in calls]
        share, programs = padding(found, buckets, flags.batch_tokens, flags.devices, window)
        print(f"{name}: {share:.2%} padding, {programs} programs of {len(buckets)}, {len(calls)} calls")
    if not flags.plan:
        _speed(flags, dataclasses.replace(backbone, tokenizer=tokenizer), texts, sides)


def padding(
    calls: Sequence[Sequence[int]], buckets: Sequence[int], budget: int, devices: int, window: int
) -> tuple[float, int]:
    """Share of positions that hold no token, and how many row lengths occur, for the chunks of each call."""
    positions, used = 0, set()

    def rows(length: int) -> int:
        return max(budget // length, 1) * devices

    for lengths in calls:
        for waiting in _windows(lengths, window):
            order, start = sorted(waiting, reverse=True), 0
            while start < len(order):
                length = buckets[bisect.bisect_left(buckets, order[start])]
                positions, start = positions + rows(length) * length, start + rows(length)
                used.add(length)
    return 1 - sum(map(sum, calls)) / positions, len(used)


def _windows(lengths: Sequence[int], window: int) -> list[list[int]]:
    found: list[list[int]] = [[]]
    tokens = 0
    for length in lengths:
        if tokens >= window:
            found.append([])
            tokens = 0
        found[-1].append(length)
        tokens += length
    return found


def _calls(texts: Sequence[str], characters: int) -> list[list[str]]:
    calls: list[list[str]] = [[]]
    held = 0
    for text in texts:
        if held >= characters:
            calls.append([])
            held = 0
        calls[-1].append(text)
        held += len(text)
    return calls


def _speed(flags: argparse.Namespace, backbone: Any, texts: Sequence[str], sides: dict[str, Any]) -> None:
    """Documents/s of both sides, and the ratio in each round."""
    from safelm.safety.embedding import Embedder

    embedders = {}
    for name, (buckets, _, _) in sides.items():
        embedders[name] = Embedder(backbone, batch_tokens=flags.batch_tokens)
        embedders[name].buckets = buckets
        embedders[name].embed(texts)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(flags.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            for call in _calls(texts, sides[name][2]):
                embedders[name].embed(call)
            seconds[name].append(time.perf_counter() - started)
    for name, taken in seconds.items():
        print(f"{name}: {len(texts) / statistics.median(taken):.1f} documents/s")
    ratios = [before / now for before, now in zip(seconds["before"], seconds["now"], strict=True)]
    print(f"before / now: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def _texts(pattern: str, count: int, repeat: int) -> list[str]:
    texts: list[str] = []
    for path in sorted(glob.glob(pattern)):
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    if not texts:
        raise ValueError(f"--texts={pattern}: no texts found")
    rng = np.random.default_rng(0)
    again = [text[: int(len(text) * rng.uniform(0.5, 1))] for _ in range(repeat - 1) for text in texts[:count]]
    return texts[:count] + again


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.bench.batching", __doc__)
    add = parser.add_argument
    add("--texts", required=True, help="jsonl(.gz) files with a column text")
    add("--documents", type=int, default=1 << 30, help="the first N (default: all)")
    add("--repeat", type=int, default=1, help="times the texts are read (default %(default)s)")
    add("--max_tokens", type=int, default=512, help="of a chunk (default %(default)s)")
    add("--first_only", action="store_true", help="a text's first chunk alone")
    add("--batch_tokens", type=int, default=CPU_BUDGET, help="of a device's batch (default %(default)s)")
    add("--devices", type=int, default=1, help="of --plan: that share a batch (default %(default)s)")
    add("--plan", action="store_true", help="padding alone, nothing is computed")
    add("--rounds", type=int, default=5, help="(default %(default)s)")
    return parser


if __name__ == "__main__":
    main()
