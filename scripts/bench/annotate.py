"""What annotating costs beside its scorer: rows/s, peak memory of the largest process, time over the scorer alone.

    python scripts/bench/annotate.py [--rows=N] [--files=N] [--characters=N] [--scorer=SPEC] [--repeated=SHARE]
    python scripts/bench/annotate.py --case=group [--megabytes=2048]        one row group of so much text
    python scripts/bench/annotate.py --case=document [--megabytes=200]      one text of that size among short ones
    python scripts/bench/annotate.py --case=slices --scorer=SPEC [--files=8] [--rows=N] [--characters=N]

Makes a corpus of Parquet in a folder that is removed afterwards, then runs two processes, one after the other: the
scorer alone (every distinct text, in the same batches, nothing read or written while the clock runs) and
`safelm.score --output_rows=annotations --array_task=0/1`, one slice of all shards in one process. Seconds by the clock
are without imports and loading, those of processors with them. The default scorer costs nothing, so that all that is
left is reading, finding repeated texts, writing; it isn't timed alone. Rows per second of a processor give the time for
--target rows, divided by the processes that share them.

--case=slices says what annotating adds to a scorer that costs something, in one process and one run, so that other work
on the machine disturbs both alike: a slice a file, as many as workers would take, each by the clock from planning to
its last record, and in that the time inside the scorer's `score`. What it compiles is compiled before. The last slice
writes the manifest. Imports and loading the scorer, some seconds a process, are printed apart.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from safelm import cli, documents
from safelm.safety.scorer import Verdict, load_scorer
from safelm.safety.scoring import shard

CASES = ("rows", "group", "document", "slices")
FREE = "python:annotate:Free"
_WORDS = 20_000
_PHRASES, _PHRASE = 100_000, 240  # long texts are made of so many phrases of so many characters
_MOST_ROWS = 200_000  # made at once


class Free:
    """The score is the text's length: no work at all."""

    name, fingerprint = "free", "free"

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """A verdict a text."""
        return [Verdict(len(text) % 6) for text in texts]


def main() -> None:
    """Makes the corpus, runs both sides, prints the table."""
    flags = _parser().parse_args()
    if flags.alone:
        print(json.dumps(_alone(flags.alone, flags.scorer)))
        return
    if flags.sliced:
        _slices(Path(flags.sliced), flags.scorer)
        return
    if flags.make:
        print(json.dumps(_make(flags, Path(flags.make))))
        return
    with tempfile.TemporaryDirectory(prefix="safelm-bench-", dir=flags.folder) as folder:
        made = _run([__file__, *sys.argv[1:], f"--make={folder}/corpus"])[0]  # a process counts its parent's memory
        rows, text_bytes, flags.files = json.loads(made)
        size = sum(path.stat().st_size for path in Path(folder, "corpus").iterdir())
        if flags.case == "slices":
            print(f"{rows:,} rows, {text_bytes:,} bytes of text, {flags.files} files; load {os.getloadavg()[0]:.1f}")
            print(_run([__file__, f"--sliced={folder}", f"--scorer={flags.scorer}"])[0], end="")
            return
        print(f"{flags.case}: {rows:,} rows, {text_bytes:,} bytes of text, {size:,} on disk, {flags.files} files")
        alone = {"seconds": 0.0, "processor": 0.0, "texts": 0}
        if flags.scorer != FREE:
            alone = json.loads(_run([__file__, f"--alone={folder}/corpus", f"--scorer={flags.scorer}"])[0])
        command = ["-m", "safelm.score", f"--input={folder}/corpus", f"--output={folder}/out", "--array_task=0/1"]
        command += ["--output_rows=annotations", f"--scorers={flags.scorer}"]
        _, usage = _run(command)
        manifest = json.loads(Path(folder, "out", "manifest.json").read_text())
        written = sum(path.stat().st_size for path in Path(folder, "out").glob("*.parquet"))
    assert manifest["totals"]["rows"] == rows, "rows were lost"
    _report(flags, (rows, text_bytes, written), alone, manifest, usage)


def _report(
    flags: argparse.Namespace,
    sizes: tuple[int, int, int],
    alone: Mapping[str, float],
    manifest: Mapping[str, Any],
    usage: resource.struct_rusage,
) -> None:
    rows, text_bytes, written = sizes
    seconds, processor = manifest["speed"]["seconds"], usage.ru_utime + usage.ru_stime
    rate = rows / processor
    print(f"annotated: {seconds:.1f} s, {rows / seconds:,.0f} rows/s, {text_bytes / seconds / 1e6:,.1f} MB of text/s")
    print(f"of processors: {processor:.1f} s with imports and loading, {1e6 * processor / rows:.2f} us a row")
    if alone["texts"]:
        ratio = seconds / alone["seconds"] - 1
        print(f"scorer alone: {alone['texts']:,} distinct texts, {alone['seconds']:.1f} s; {ratio:+.1%} to annotate")
        print(f"of processors: {alone['processor']:.1f} s; {processor / alone['processor'] - 1:+.1%} with imports")
    print(f"written: {written / rows:.1f} bytes a row; peak of the process: {usage.ru_maxrss / 1024:,.0f} MB")
    for processes in (1, 8, 64) if flags.case == "rows" else ():
        hours = flags.target / rate / processes / 3600
        print(f"{flags.target:.2g} rows / ({rate:,.0f} rows/s of a processor * {processes}) = {hours:.2f} h")


def _run(command: Sequence[str]) -> tuple[str, resource.struct_rusage]:
    """What a Python process prints, and what it used."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return printed, usage


def _alone(folder: str, spec: str) -> dict[str, float]:
    """Seconds of a scorer on every distinct text of each file, in the batches of `safelm.score`."""
    scorer, seconds, processor, count = load_scorer(spec), 0.0, 0.0, 0
    for path in documents.list_files(folder):
        texts, seen = [], set()
        for _, row in documents.read_rows(path, []):
            key = hashlib.blake2b(row["text"].encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                texts.append((row["text"][: 1 << 20], None))
        if not count:
            scorer.score([texts[0][0]])  # compiles
        count += len(texts)
        for batch in shard.batches(iter(texts)):
            chosen = [text for text, _ in batch]
            started, used = time.perf_counter(), time.process_time()
            scorer.score(chosen)
            seconds, processor = seconds + time.perf_counter() - started, processor + time.process_time() - used
    return {"seconds": seconds, "processor": processor, "texts": count}


class Timed:
    """A scorer whose seconds inside `score` are counted, by the clock and of this process's processors."""

    def __init__(self, scorer: Any):
        self._scorer, self.seconds, self.processor = scorer, 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        if name == "_scorer":
            raise AttributeError(name)
        return getattr(self._scorer, name)

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """A verdict a text."""
        started, used = time.perf_counter(), time.process_time()
        try:
            return self._scorer.score(texts)
        finally:
            self.seconds += time.perf_counter() - started
            self.processor += time.process_time() - used


def _slices(folder: Path, spec: str) -> None:
    """Prints, for every slice and for all, the time of annotating over that of the scorer inside it."""
    from safelm.jobs.array_tasks import ArrayTask
    from safelm.safety.scoring import annotation_run, columns, scorers
    from safelm.safety.scoring.annotating import AnnotateWork

    started = time.perf_counter()
    files, specs = documents.find(str(folder / "corpus")), scorers.parse_specs(spec)
    loaded = [Timed(scorer) for scorer in scorers.load_scorers(specs)]
    described, probed = scorers.describe(specs, loaded), columns.probe(loaded)
    scorers.keep(described, loaded)
    loading = time.perf_counter() - started
    whole: list[tuple[float, ...]] = []
    for turn, output in enumerate(("first", "out")):  # the first run, of one slice, compiles
        work = AnnotateWork(str(folder / output), described, probed, "text", "id")
        for index in range(len(files) if turn else 1):
            for each in loaded:
                each.seconds = each.processor = 0.0
            clock, used = time.perf_counter(), time.process_time()
            annotation_run.annotate_slice(files, work, 256 << 20, ArrayTask(index, len(files)))
            clock, used = time.perf_counter() - clock, time.process_time() - used
            if turn:
                inside = sum(each.seconds for each in loaded), sum(each.processor for each in loaded)
                whole.append((clock, inside[0], used, inside[1]))
    for index, (clock, scoring, _, _) in enumerate(whole):
        print(f"slice {index}: {clock:.2f} s, {scoring:.2f} s in the scorer, {clock / scoring - 1:+.2%}")
    clock, scoring, used, inside_used = (sum(column) for column in zip(*whole, strict=True))
    print(f"all: {clock:.2f} s, {scoring:.2f} s in the scorer: {clock / scoring - 1:+.2%} by the clock")
    print(f"of processors: {used:.2f} s, {inside_used:.2f} s in the scorer: {used / inside_used - 1:+.2%}")
    print(f"imports of the scorer and loading it: {loading:.1f} s")


def _make(flags: argparse.Namespace, folder: Path) -> tuple[int, int, int]:
    """Writes the corpus; its rows, the bytes of its texts, its files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    if flags.case in ("rows", "slices"):
        counts, length, group = [flags.rows // flags.files] * flags.files, flags.characters, 100_000
    elif flags.case == "group":
        length = 4000
        counts = [(flags.megabytes << 20) // length]
        group = counts[0]
    else:
        counts, length, group = [1000], 4000, 1000
    rows = text_bytes = 0
    for index, count in enumerate(counts):
        texts = _texts(rng, count, length, flags.repeated)
        if flags.case == "document":
            long = "meadow " * (flags.megabytes * 1_000_000 // 7)
            texts = pyarrow.concat_arrays([texts, pyarrow.array([long], pyarrow.large_string())])
        ids = pyarrow.array([f"{index}-{at}" for at in range(len(texts))])
        table = pyarrow.table({"id": ids, "text": texts, "url": ids})
        pyarrow.parquet.write_table(
            table, folder / f"part-{index:05d}.parquet", row_group_size=group, compression="zstd"
        )
        rows += len(texts)
        text_bytes += pyarrow.compute.sum(pyarrow.compute.binary_length(texts)).as_py()
    return rows, text_bytes, len(counts)


def _texts(rng: np.random.Generator, count: int, length: int, repeated: float) -> pyarrow.Array:
    """Texts of about `length` characters of invented words, of which a share comes again."""
    words = pyarrow.array([f"{''.join(chr(97 + d % 26) for d in divmod(i * 7919, 26 * 31))}{i}" for i in range(_WORDS)])
    if length > _PHRASE:
        words, own = _joined(rng, words, _PHRASES, _PHRASE // 8), _PHRASE
    else:
        own = 8
    distinct = max(1, round(count * (1 - repeated)))
    starts = range(0, distinct, _MOST_ROWS)
    pieces = [_joined(rng, words, min(_MOST_ROWS, distinct - start), max(1, length // own)) for start in starts]
    texts = pyarrow.concat_arrays(pieces)
    order = np.concatenate([np.arange(distinct), rng.integers(0, distinct, count - distinct)])
    return texts.take(pyarrow.array(rng.permutation(order))) if distinct < count else texts


def _joined(rng: np.random.Generator, words: pyarrow.Array, count: int, times: int) -> pyarrow.Array:
    """Texts of so many words each, drawn at random."""
    drawn = [words.take(pyarrow.array(rng.integers(0, len(words), count))) for _ in range(times)]
    separator = pyarrow.scalar(" ", words.type)
    return pyarrow.compute.binary_join_element_wise(*drawn, separator).cast(pyarrow.large_string())


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.bench.annotate", __doc__)
    add = parser.add_argument
    add("--case", choices=CASES, default="rows", help="(default %(default)s)")
    add("--rows", type=int, default=200_000, help="of --case=rows (default %(default)s)")
    add("--files", type=int, default=8, help="of --case=rows (default %(default)s)")
    add("--characters", type=int, default=100, help="of a row, about (default %(default)s)")
    add("--repeated", type=float, default=0.0, help="share of rows whose text came before (default %(default)s)")
    add("--megabytes", type=int, default=200, help="of text, of the other cases (default %(default)s)")
    add("--scorer", default=FREE, help="as safelm.score's --scorers, one (default %(default)s)")
    add("--target", type=float, default=1.2e9, help="rows to extrapolate to (default %(default)s)")
    add("--folder", help="where the corpus is made for as long as it runs (default: the machine's)")
    add("--alone", help=argparse.SUPPRESS)
    add("--make", help=argparse.SUPPRESS)
    add("--sliced", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
