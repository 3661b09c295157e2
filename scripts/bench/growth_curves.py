"""The curves of `scripts/bench/growth.py`, one a process; not started by hand. Prints `CURVE` and a JSON object."""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from growth import CURVES

from safelm import cli

ROOT = Path(__file__).parents[2]
Cost = Callable[[], float]
BATCH_ROWS, SEQ_LEN = 32, 512  # of the loader's batches
LINKS = 50_000  # to one file


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve's x values, and what makes the measurement at one: a function that gives the cost once."""

    points: Sequence[float]
    make: Callable[[float, Path], contextlib.AbstractContextManager[Cost]]
    small: Sequence[float] = ()
    rounds_from: tuple[float, int] = (float("inf"), 0)  # from this x on, at most so many rounds


def processor_seconds() -> float:
    """Of this process and its children that have ended."""
    usages = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def cost_of(call: Callable[[], Any], times: int, scale: float) -> float:
    """Processor seconds of one of `times` calls, times `scale`."""
    began = processor_seconds()
    for _ in range(times):
        call()
    return (processor_seconds() - began) / times * scale


# ---- training ----

SIZES = {(2, 64): 2, (2, 128): 2, (4, 128): 2, (4, 256): 4, (6, 384): 6, (8, 512): 8}  # (layers, width): heads


def _training(folder: Path, layers: int, width: int, heads: int, rows: int, seq_len: int) -> tuple[Any, dict]:
    import train_safelm

    sizes = {"vocab_size": 4096, "num_layers": layers, "d_model": width, "d_ff": 3 * width, "num_heads": heads}
    sizes |= {"num_kv_heads": heads, "head_dim": width // heads}
    settings = {"model": sizes, "batch_size": rows, "seq_len": seq_len, "dtype": "float32"}
    train_safelm.write_folder(folder, settings | {"remat": "none", "scan_layers": False})
    step, about = train_safelm.make_step(folder)
    for _ in range(2):
        step()
    return step, about


@contextlib.contextmanager
def model_size(number: float, folder: Path) -> Iterator[Cost]:
    (layers, width), heads = list(SIZES.items())[_size_number(number)]
    step, _ = _training(folder, layers, width, heads, 4, 256)
    yield lambda: cost_of(step, 2, 1e6 / 1024)


def _size_number(millions: float) -> int:
    return min(range(len(SIZES)), key=lambda i: abs(_millions(i) - millions))


def _millions(index: int) -> float:
    """Millions of FLOPs a token of a size, forward and backward."""
    from safelm.models.config import ModelConfig

    (layers, width), heads = list(SIZES.items())[index]
    config = ModelConfig(4096, layers, width, 3 * width, heads, heads, width // heads)
    return round(config.flops_per_token(256) / 1e6, 2)


@contextlib.contextmanager
def context(seq_len: float, folder: Path) -> Iterator[Cost]:
    tokens = max(4096, int(seq_len))
    step, _ = _training(folder, 4, 128, 4, tokens // int(seq_len), int(seq_len))
    yield lambda: cost_of(step, 1, 1e6 / tokens)


@contextlib.contextmanager
def batch(rows: float, folder: Path) -> Iterator[Cost]:
    step, _ = _training(folder, 4, 128, 4, int(rows), 128)
    yield lambda: cost_of(step, max(1, int(16 / rows)), 1e3)


# ---- data ----


def _store(folder: Path, shards: int, tokens_each: int) -> Any:
    """A store of so many shards of random documents; their files are links to those of the first."""
    from safelm.data.shard import shard_file
    from safelm.data.store import Manifest, ShardWriter, TokenStore, write_manifest

    rng = np.random.default_rng(0)
    lengths_n = np.full(max(1, tokens_each // 500), min(500, tokens_each))
    tokens = rng.integers(4, 49_152, lengths_n.sum(), dtype=np.uint16)
    tokens[np.cumsum(lengths_n) - 1] = 0
    with ShardWriter(folder, 0, shards, np.uint16, harm_tag_id=3) as writer:
        writer.add_many(tokens, lengths_n)
        first = writer.close()
    for index in range(1, shards):
        for kind in ("tokens", "bounds", "sums"):
            os.link(folder / shard_file(kind, 0, shards), folder / shard_file(kind, index, shards))
    infos = tuple(dataclasses.replace(first, index=index) for index in range(shards))
    counts = [shards * getattr(first, f"num_{what}") for what in ("documents", "tokens", "tag_tokens")]
    write_manifest(folder, Manifest("bench", "train", "v", 49_152, 0, 3, "uint16", infos, *counts))
    return TokenStore.open(folder, verify_checksums=False)


def _batch_cost(stores: dict[str, Any]) -> Cost:
    from safelm.data.batches import Batches
    from safelm.data.schedule import MixtureSchedule, Phase

    rates = {name: 1 / len(stores) for name in stores}
    schedule = MixtureSchedule([Phase(0.0, rates)], batch_size=BATCH_ROWS, seq_len=SEQ_LEN, total_steps=10**6)
    batches, steps = Batches(stores, schedule), iter(range(10**6))

    def one() -> None:
        for array in batches.batch(0, next(steps), 0, BATCH_ROWS)[:5]:
            array.reshape(-1).view(np.int64).sum()

    for _ in range(100):
        one()
    return lambda: cost_of(one, 200, 1e3)


@contextlib.contextmanager
def sources(count: float, folder: Path) -> Iterator[Cost]:
    """One total of tokens, so that what is read is as far apart in memory for few sources as for many."""
    each = 4_000_000 // int(count)
    yield _batch_cost({f"s{i:04d}": _store(folder / str(i), 1, each) for i in range(int(count))})


@contextlib.contextmanager
def shards_fed(count: float, folder: Path) -> Iterator[Cost]:
    yield _batch_cost({"one": _store(folder, int(count), 4_000_000 // int(count))})


@contextlib.contextmanager
def store_opened(count: float, folder: Path) -> Iterator[Cost]:
    from safelm.data.store import TokenStore

    _store(folder, int(count), 500)
    yield lambda: cost_of(lambda: TokenStore.open(folder, verify_checksums=False), 1, 1)


def _write_files(folder: Path, count: int) -> None:
    """So many files of one row, 1,000 in a folder: links to as few as a file system allows."""
    row = json.dumps({"id": "a", "text": "The meadow and the river."}) + "\n"
    for start in range(0, count, 1000):
        inner = folder / f"{start // 1000:04d}"
        inner.mkdir(parents=True)
        if start % LINKS == 0:
            original = inner / f"train-{start:07d}.jsonl"
            original.write_text(row)
        for number in range(start + (start % LINKS == 0), min(start + 1000, count)):
            os.link(original, inner / f"train-{number:07d}.jsonl")


@contextlib.contextmanager
def shards_listed(count: float, folder: Path) -> Iterator[Cost]:
    from safelm import documents

    _write_files(folder / "web", int(count))
    yield lambda: cost_of(lambda: documents.find(str(folder / "web")), 1, 1)


@contextlib.contextmanager
def shards_planned(count: float, folder: Path) -> Iterator[Cost]:
    from safelm import documents
    from safelm.jobs.output import OutputFolder
    from safelm.safety.scoring import columns, plan, scorers, shard

    _write_files(folder / "web", int(count))
    found = documents.find(str(folder / "web"))
    specs = scorers.parse_specs("bundled")
    loaded = scorers.load_scorers(specs)
    described = scorers.describe(specs, loaded)
    work = shard.ScoreWork(str(folder / "out"), described, columns.probe(loaded), "text", "id")
    out = OutputFolder(str(folder / "out"))
    yield lambda: cost_of(lambda: plan.make_plan(out, work, found, 64 << 20), 1, 1)


# ---- documents ----


def _corpus(folder: Path, count: int) -> str:
    """Pages of the synthetic web in files of at most 20,000 rows."""
    from safelm.synthetic_web import corpus

    rows = (row for number in range(count) for _, row in corpus.rows(0, "train", number))
    texts = [row["text"] for row, _ in zip(rows, range(min(count, 2000)), strict=False)]
    for start in range(0, count, 20_000):
        with open(folder / f"train-{start:07d}.jsonl", "w", encoding="utf-8") as file:
            for number in range(start, min(start + 20_000, count)):
                file.write(json.dumps({"id": str(number), "text": f"{number} {texts[number % len(texts)]}"}) + "\n")
    return str(folder / "train-*.jsonl")


def _command(*arguments: str) -> tuple[float, float]:
    """Processor seconds and MiB at most of a command."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-m", *arguments], stderr=subprocess.PIPE, text=True, env=environ)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments[0]} ended with {process.returncode}: {said[-500:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


@contextlib.contextmanager
def _documents(count: float, folder: Path, module: str, which: int) -> Iterator[Cost]:
    pattern, numbers = _corpus(folder, int(count)), iter(range(10**6))

    def run() -> float:
        output = folder / f"out-{next(numbers)}"
        return _command(module, f"--input={pattern}", f"--output={output}", "--workers=1")[which]

    yield run


def documents_scored(count: float, folder: Path) -> Any:
    return _documents(count, folder, "safelm.score", 0)


def memory_of_scoring(count: float, folder: Path) -> Any:
    return _documents(count, folder, "safelm.score", 1)


def report_card(count: float, folder: Path) -> Any:
    return _documents(count, folder, "safelm.report_card", 0)


# ---- serving ----


_server: list[tuple[str, subprocess.Popen]] = []  # that the first level of clients starts, and ends when all are done


@contextlib.contextmanager
def clients(count: float, folder: Path) -> Iterator[Cost]:
    """Processor time of the server for a reply of 32 tokens of a tiny model, 32 slots, all clients at once."""
    import serve

    flags = argparse.Namespace(max_new_tokens=32, method="greedy")
    with contextlib.ExitStack() as stack:
        if not _server:
            given = ["--slots=32", "--steps_per_call=4", "--request_seconds=1800"]
            checkpoint = serve.model_flags(tiny=True, folder=str(folder))
            _server.append(stack.enter_context(serve.server(*checkpoint, *given)))
        url, process = _server[0]
        rounds = itertools.count()

        def run() -> float:
            began, requests = _seconds_of(process.pid), max(16, 2 * int(count))
            prompts = serve.prompts_of(int(count), requests, next(rounds), shared_words=0)
            asyncio.run(serve.level(url, int(count), prompts, flags))
            return (_seconds_of(process.pid) - began) / requests * 1e3

        for _ in range(2):
            run()
        yield run


def _seconds_of(pid: int) -> float:
    """Processor seconds of a process that we started, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def curves() -> dict[str, Curve]:
    """Every curve by its name in `growth.CURVES`, but for chips."""
    sizes = [_millions(index) for index in range(len(SIZES))]
    to_a_million = (10, 100, 1000, 10_000, 100_000, 1_000_000)
    many = (100, 1000, 10_000, 30_000)
    return {
        "model size": Curve(sizes, model_size, sizes[:3]),
        "context": Curve((64, 256, 512, 1024, 2048, 4096), context, (64, 128, 256)),
        "batch": Curve((1, 4, 16, 64, 128), batch, (1, 2, 4)),
        "sources": Curve((1, 2, 4, 8, 16, 32, 64, 128, 256), sources, (1, 2, 4)),
        "shards listed": Curve(to_a_million, shards_listed, (10, 100, 1000), (1e6, 2)),
        "shards planned": Curve(to_a_million, shards_planned, (10, 100, 1000), (1e6, 1)),
        "store opened": Curve((10, 100, 1000, 4000, 9000), store_opened, (2, 5, 10)),
        "shards fed": Curve((1, 10, 100, 1000, 4000), shards_fed, (1, 2, 4)),
        "documents scored": Curve(many, documents_scored, (10, 20, 40)),
        "memory of scoring": Curve(many, memory_of_scoring, (10, 20, 40), (0, 2)),
        "report card": Curve(many, report_card, (10, 20, 40)),
        "clients": Curve((1, 2, 4, 8, 16, 32, 64), clients, (1, 2, 4)),
    }


def main() -> None:
    parser = cli.parser("scripts.bench.growth_curves", __doc__)
    parser.add_argument("curve", choices=tuple(name for name in CURVES if name != "chips"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    flags = parser.parse_args()
    curve = curves()[flags.curve]
    points = list(curve.small if flags.small else curve.points)
    costs: dict[float, list[float]] = {x: [] for x in points}
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        calls = {}
        for number, x in enumerate(points):
            (folder := Path(root, str(number))).mkdir()
            calls[x] = stack.enter_context(curve.make(x, folder))
            print(f"{flags.curve}: {x:g} is ready", file=sys.stderr, flush=True)
        for turn in range(flags.rounds):
            for x in points[turn % len(points) :] + points[: turn % len(points)]:
                if x < curve.rounds_from[0] or turn < curve.rounds_from[1]:
                    costs[x].append(calls[x]())
            print(f"{flags.curve}: round {turn + 1} of {flags.rounds}", file=sys.stderr, flush=True)
    print("CURVE " + json.dumps({"points": [[x, *found] for x, found in costs.items()]}), flush=True)


if __name__ == "__main__":
    main()
