"""What annotating costs beside its scorer: rows/s, peak memory of the largest process, time over the scorer alone.

    python scripts/bench/annotate.py [--rows=N] [--files=N] [--characters=N] [--scorer=SPEC] [--repeated=SHARE]
    python scripts/bench/annotate.py --case=group [--megabytes=2048]        one row group of so much text
    python scripts/bench/annotate.py --case=document [--megabytes=200]      one text of that size among short ones

Makes a corpus of Parquet in a folder that is removed afterwards, then runs two processes, one after the other: the
scorer alone (every distinct text, in the same batches, nothing read or written while the clock runs) and
`safelm.score --output_rows=annotations --array_task=0/1`, one slice of all shards in one process. Seconds are those of
the run without imports and loading, by the clock and of processors. --scorer=python:annotate:Free costs nothing, so
that all that is left is reading, finding repeated texts, writing. The rows per second give the time for --target rows,
divided by the processes that share them.
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from safelm import cli, documents
from safelm.safety.scorer import Verdict, load_scorer
from safelm.safety.scoring import shard

CASES = ("rows", "group", "document")
FREE = "python:annotate:Free"
_WORDS = 20_000
_MOST_ROWS = 500_000  # made at once


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
    with tempfile.TemporaryDirectory(prefix="safelm-bench-", dir=flags.folder) as folder:
        rows, text_bytes = _make(flags, Path(folder, "corpus"))
        size = sum(path.stat().st_size for path in Path(folder, "corpus").iterdir())
        print(f"{flags.case}: {rows:,} rows, {text_bytes:,} bytes of text, {size:,} on disk, {flags.files} files")
        alone = json.loads(_run([__file__, f"--alone={folder}/corpus", f"--scorer={flags.scorer}"])[0])
        command = ["-m", "safelm.score", f"--input={folder}/corpus", f"--output={folder}/out", "--array_task=0/1"]
        command += ["--output_rows=annotations", f"--scorers={flags.scorer}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _, peak = _run(command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        manifest = json.loads(Path(folder, "out", "manifest.json").read_text())
        written = sum(path.stat().st_size for path in Path(folder, "out").glob("*.parquet"))
    _report(flags, rows, text_bytes, alone, manifest, peak, written)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"the whole process: {processor:.1f} s of processors, imports and loading included")


def _report(flags, rows: int, text_bytes: int, alone: dict, manifest: dict, peak: int, written: int) -> None:
    seconds = manifest["speed"]["seconds"]
    assert manifest["totals"]["rows"] == rows, "rows were lost"
    rate = rows / seconds
    print(f"scorer alone: {alone['texts']:,} distinct texts in {alone['seconds']:.2f} s")
    print(f"annotated: {seconds:.2f} s, {rate:,.0f} rows/s, {text_bytes / seconds / 1e6:,.1f} MB of text/s")
    print(
        f"over the scorer alone: {seconds / max(alone['seconds'], 1e-9) - 1:.1%}, "
        f"{1e6 * (seconds - alone['seconds']) / rows:.2f} us a row"
    )
    print(f"written: {written / rows:.1f} bytes a row; peak of the process: {peak / 1024:,.0f} MB")
    for processes in (1, 8, 64):
        print(
            f"{flags.target:.2g} rows / ({rate:,.0f} rows/s * {processes}) = "
            f"{flags.target / rate / processes / 3600:.2f} h"
        )


def _run(command: Sequence[str]) -> tuple[str, int]:
    """What a Python process prints, and its peak memory (KiB)."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return printed, usage.ru_maxrss


def _alone(folder: str, spec: str) -> dict:
    """Seconds of a scorer on every distinct text of each file, in the batches of `safelm.score`."""
    scorer, seconds, count = load_scorer(spec), 0.0, 0
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
            started = time.perf_counter()
            scorer.score(chosen)
            seconds += time.perf_counter() - started
    return {"seconds": seconds, "texts": count}


def _make(flags: argparse.Namespace, folder: Path) -> tuple[int, int]:
    """Writes the corpus; its rows and the bytes of its texts."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    if flags.case == "rows":
        counts, length, group = [flags.rows // flags.files] * flags.files, flags.characters, 100_000
    elif flags.case == "group":
        flags.files, length = 1, 4000
        counts = [(flags.megabytes << 20) // length]
        group = counts[0]
    else:
        flags.files, counts, length, group = 1, [1000], 4000, 1000
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
    return rows, text_bytes


def _texts(rng: np.random.Generator, count: int, length: int, repeated: float) -> pyarrow.Array:
    """Texts of about `length` characters of invented words, of which a share comes again."""
    words = pyarrow.array([f"{''.join(chr(97 + d % 26) for d in divmod(i * 7919, 26 * 31))}{i}" for i in range(_WORDS)])
    distinct = max(1, round(count * (1 - repeated)))
    pieces = []
    for start in range(0, distinct, _MOST_ROWS):
        size = min(_MOST_ROWS, distinct - start)
        parts = [words.take(pyarrow.array(rng.integers(0, _WORDS, size))) for _ in range(max(1, min(16, length // 7)))]
        joined = pyarrow.compute.binary_join_element_wise(*parts, " ").cast(pyarrow.large_string())
        times = max(1, round(length / (8 * len(parts))))
        pieces.append(pyarrow.compute.binary_repeat(joined, times))
    texts = pyarrow.concat_arrays(pieces)
    order = np.concatenate([np.arange(distinct), rng.integers(0, distinct, count - distinct)])
    return texts.take(pyarrow.array(rng.permutation(order))) if distinct < count else texts


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
    return parser


if __name__ == "__main__":
    main()
