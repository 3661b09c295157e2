"""Tokens per second of the data path, beside Grain on ArrayRecord, HF `datasets` and LitData, in one run.

    scripts/bench/rivals.sh                           # once: .venv-bench with `datasets` and LitData
    python scripts/bench/data.py                      # 24M tokens in six sources, rows of 2048 tokens
    python scripts/bench/data.py --seq_len=256 --repeats=7

All variants read the same documents in random order and hand over batches of the same shape; every array of every
batch is summed, eight bytes at a time, so nothing stays unread. `arrays` is how many arrays of the batch's shape a
variant makes: SafeLM makes five (inputs, targets, positions, segment ids, loss weights); Grain's packing makes three
(tokens, positions, segment ids); pre-packed rows are measured with all five stored and with tokens alone, the least one
can do. "docs" mixes six sources document by document.

HF `datasets` streams from Arrow on disk, shuffles shards and a buffer of 1,000 documents, mixes by document and packs
as transformers' run_clm does, which drops the end of every thousand documents; two arrays (inputs, labels). LitData
reads LitGPT's way: blocks of a row + 1 cut from chunks when they were written, shuffled by chunk and inside, sources
mixed by block; two arrays, made as its loop does. "litdata-documents" is the same with our five arrays, made of its
blocks by numpy. None has a schedule; all have 1 and 6 sources, 0 and 2 workers, in a process of their own, one variant
at work at a time. Variants take turns, each opened anew and closed, so load on the machine hits them alike;
quote the ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from grain.experimental import ConcatThenSplitIterDataset, ElasticIterator

from safelm import cli
from safelm.data.assembly import Assembly
from safelm.data.batch import Batch
from safelm.data.batches import Batches
from safelm.data.loader import Loader
from safelm.data.rows import ConcatRows
from safelm.data.schedule import MixtureSchedule, Phase
from safelm.data.store import Manifest, ShardWriter, TokenStore, write_manifest

VOCAB_SIZE = 49_152
RATES = {"raw": 0.3, "filtered": 0.25, "safe": 0.2, "refuse": 0.12, "moral": 0.08, "tagged": 0.05}
PHASES = (
    Phase(0.0, {"raw": 1.0}),
    Phase(0.2, {"raw": 0.6, "filtered": 0.2, "safe": 0.2}),
    Phase(0.6, RATES),
)
RIVALS = Path(__file__).resolve().parent / "data_rivals.py"
RIVAL_ARRAYS = {"datasets": 2, "litdata": 2, "litdata-documents": 5}
ARRAYS = ("inputs_BT", "targets_BT", "positions_BT", "segment_ids_BT", "loss_weight_BT")
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # one thread is ArrayRecord's fastest on a local disk


def write_source(directory: str, num_tokens: int, seed: int, seq_len: int) -> TokenStore:
    """One source with web-like document lengths (median 450 tokens, long tail): store, documents and rows on disk."""
    rng, written, docs = np.random.default_rng(seed), 0, os.path.join(directory, "docs.array_record")
    os.makedirs(directory)
    records, documents = ArrayRecordWriter(docs, "group_size:1"), []
    with ShardWriter(directory, 0, 1, np.uint16, harm_tag_id=3) as shard:
        while written < num_tokens:
            length = int(np.clip(rng.lognormal(np.log(450), 1.1), 20, 20_000))
            document = np.append(rng.integers(4, VOCAB_SIZE, length, dtype=np.uint16), np.uint16(0))
            shard.add(document)
            records.write(document.tobytes())
            documents.append(document)
            written += len(document)
        info = shard.close()
    records.close()
    np.save(os.path.join(directory, "tokens.npy"), np.concatenate(documents))  # for the rivals' own formats
    np.save(os.path.join(directory, "lengths.npy"), [len(document) for document in documents])
    counts = (info.num_documents, info.num_tokens, info.num_tag_tokens)
    write_manifest(directory, Manifest("bench", "train", "v", VOCAB_SIZE, 0, 3, "uint16", (info,), *counts))
    store = TokenStore.open(directory)
    write_rows(store, directory, seq_len)
    return store


def write_rows(store: TokenStore, directory: str, seq_len: int) -> None:
    """The store's rows as ArrayRecord: all five arrays as uint16, and the inputs alone."""
    plan = ConcatRows(store, seq_len)
    assembly = Assembly([plan])
    full = ArrayRecordWriter(os.path.join(directory, "rows5.array_record"), "group_size:1")
    bare = ArrayRecordWriter(os.path.join(directory, "rows1.array_record"), "group_size:1")
    for start in range(0, plan.num_rows, 512):
        rows = np.arange(start, min(start + 512, plan.num_rows))
        batch = assembly.batch(np.zeros(len(rows), np.int32), rows, len(rows))
        arrays = np.stack([array.astype(np.uint16) for array in batch[: len(ARRAYS)]], axis=1)
        for row in arrays:
            full.write(row.tobytes())
            bare.write(row[0].tobytes())
    full.close()
    bare.close()


class DecodeDocument(grain.transforms.Map):
    """Record to tokens."""

    def map(self, element: bytes) -> dict[str, np.ndarray]:
        return {"tokens": np.frombuffer(element, np.uint16).astype(np.int32)}


class DecodeRow(grain.transforms.Map):
    """Record to the arrays of a row."""

    def __init__(self, seq_len: int):
        self.seq_len = seq_len

    def map(self, element: bytes) -> dict[str, np.ndarray]:
        arrays = np.frombuffer(element, np.uint16).reshape(-1, self.seq_len)
        return {
            name: values.astype(np.float32 if name == "loss_weight_BT" else np.int32)
            for name, values in zip(ARRAYS, arrays, strict=False)
        }


def mixed_records(root: str, name: str) -> grain.MapDataset:
    """The six sources' records, each shuffled and repeated, mixed by Grain at the last phase's rates."""
    sources = []
    for seed, source in enumerate(RATES):
        records = grain.sources.ArrayRecordDataSource(os.path.join(root, source, f"{name}.array_record"))
        sources.append(grain.MapDataset.source(records).shuffle(seed=seed).repeat())
    return grain.MapDataset.mix(sources, weights=list(RATES.values()))


def grain_documents(root: str, seq_len: int, batch_size: int, num_workers: int) -> Iterator[dict[str, np.ndarray]]:
    """Grain: documents from ArrayRecord, concatenated and split while reading."""
    dataset = mixed_records(root, "docs").map(DecodeDocument()).to_iter_dataset(READ)
    dataset = ConcatThenSplitIterDataset(dataset, length_struct={"tokens": seq_len}).batch(batch_size)
    if num_workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(dataset)


def grain_rows(root: str, name: str, seq_len: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Grain: pre-packed rows from ArrayRecord through ElasticIterator."""
    dataset = mixed_records(root, name).map(DecodeRow(seq_len))
    shard = grain.sharding.ShardOptions(shard_index=0, shard_count=1)
    return iter(ElasticIterator(dataset, batch_size, shard, read_options=READ))


def ours(stores: Mapping[str, TokenStore], phases, seq_len: int, batch_size: int, **options) -> Loader:
    """SafeLM's loader, from the middle of the schedule's last phase on."""
    packing, total_steps = options.pop("packing", "concat"), 100_000
    schedule = MixtureSchedule(phases, batch_size=batch_size, seq_len=seq_len, total_steps=total_steps)
    return Loader(Batches(stores, schedule, packing=packing), seed=0, start_step=total_steps * 7 // 10, **options)


def measure(batches: Iterator[dict[str, np.ndarray]], seq_len: int, seconds: float) -> float:
    """Tokens a second over at least `seconds`, after draining what was read ahead."""
    for _ in range(16):
        touch(next(batches))
    rows, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        rows += touch(next(batches))
    return rows * seq_len / elapsed


def touch(batch: Batch | Mapping[str, np.ndarray]) -> int:
    """Reads every byte of a batch; the number of rows."""
    arrays = jax.tree.leaves(batch)
    for array in arrays:
        array = np.asarray(array).reshape(-1)
        array.view(np.int64 if array.nbytes % 8 == 0 else array.dtype).sum()
    return max(len(array) for array in arrays)


class Rivals:
    """The process of `scripts/bench/data_rivals.py`, or none where its Python is missing."""

    def __init__(self, root: str, python: str, seq_len: int, batch_size: int):
        self._process = None
        if not os.access(python, os.X_OK):
            print(f"datasets and litdata skipped: no {python}: scripts/bench/rivals.sh")
            return
        rates = json.dumps({os.path.join(root, name): rate for name, rate in RATES.items()})
        command = [python, str(RIVALS), rates, f"--seq_len={seq_len}", f"--batch_size={batch_size}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._read()

    def variants(self) -> list[tuple[str, int, int]]:
        """(library, sources, workers) of every variant."""
        if self._process is None:
            return []
        return [(kind, sources, workers) for kind in RIVAL_ARRAYS for sources in (1, len(RATES)) for workers in (0, 2)]

    def measure(self, kind: str, sources: int, workers: int, seconds: float) -> float:
        """Tokens a second of one variant, opened anew."""
        print(kind, sources, workers, seconds, file=self._process.stdin, flush=True)
        return self._read()["rate"]

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("BENCH "):
                return json.loads(line.removeprefix("BENCH "))
        raise SystemExit(f"{RIVALS.name} ended with {self._process.wait()}")


def main() -> None:
    """Makes the data in a temporary folder, measures every variant in turn, prints a table and one JSON line."""
    parser = cli.parser("scripts.bench.data", __doc__)
    parser.add_argument("--tokens", type=int, default=24_000_000, help="tokens in all sources together")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens a row")
    parser.add_argument("--batch_tokens", type=int, default=131_072, help="tokens a batch")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument("--rivals_python", default=str(RIVALS.parents[2] / ".venv-bench/bin/python"))
    parser.add_argument("--folder", default=None, help="where the temporary data goes")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    seq_len, batch_size = args.seq_len, args.batch_tokens // args.seq_len
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        stores = {
            name: write_source(os.path.join(root, name), args.tokens // len(RATES), seed, seq_len)
            for seed, name in enumerate(RATES)
        }
        one = (Phase(0.0, {"raw": 1.0}),)
        variants = {
            "safelm, 1 source": (5, lambda: ours(stores, one, seq_len, batch_size)),
            "safelm, 6 sources, 3 phases": (5, lambda: ours(stores, PHASES, seq_len, batch_size)),
            "safelm, 6 sources, 3 phases, 2 workers": (
                5,
                lambda: ours(stores, PHASES, seq_len, batch_size, num_workers=2),
            ),
            "safelm, 6 sources, whole documents": (5, lambda: ours(stores, PHASES, seq_len, batch_size, packing="fit")),
            "grain docs, concat-split": (3, lambda: grain_documents(root, seq_len, batch_size, 0)),
            "grain docs, concat-split, 2 workers": (3, lambda: grain_documents(root, seq_len, batch_size, 2)),
            "grain pre-packed rows, elastic": (5, lambda: grain_rows(root, "rows5", seq_len, batch_size)),
            "grain pre-packed rows, elastic, tokens only": (1, lambda: grain_rows(root, "rows1", seq_len, batch_size)),
        }
        rivals = Rivals(root, args.rivals_python, seq_len, batch_size)
        names = {f"{k}, {s} source{'s'[: s - 1]}, {w} workers": (k, s, w) for k, s, w in rivals.variants()}
        rates: dict[str, list[float]] = {name: [] for name in (*variants, *names)}
        for _ in range(args.repeats):
            for name, (_, make) in variants.items():
                batches = make()
                rates[name].append(measure(batches, seq_len, args.seconds))
                batches.close()
            for name, variant in names.items():
                rates[name].append(rivals.measure(*variant, args.seconds))
        rivals.close()
        arrays = {name: number for name, (number, _) in variants.items()}
        report(rates, arrays | {name: RIVAL_ARRAYS[kind] for name, (kind, _, _) in names.items()}, args)


def report(rates: Mapping[str, list[float]], arrays: Mapping[str, int], args: argparse.Namespace) -> None:
    """The table: median, smallest and largest of the repeats in million tokens/s, and our mixture over each."""
    ours = rates["safelm, 6 sources, 3 phases"]
    print(f"rows of {args.seq_len} tokens, {args.batch_tokens} tokens a batch, {os.cpu_count()} cores")
    print(f"{'variant':46s} {'arrays':>6s} {'Mtok/s':>8s} {'min':>7s} {'max':>7s}  ours/it (spread)")
    for name, values in rates.items():
        low, middle, high = (pick(values) / 1e6 for pick in (min, statistics.median, max))
        ratios = [mine / theirs for mine, theirs in zip(ours, values, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:46s} {arrays[name]:6d} {middle:8.2f} {low:7.2f} {high:7.2f}  {spread}")
    rounded = {name: [round(value) for value in values] for name, values in rates.items()}
    print(json.dumps({"seq_len": args.seq_len, "batch_tokens": args.batch_tokens, "tokens_per_second": rounded}))


if __name__ == "__main__":
    main()
