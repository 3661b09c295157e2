"""Measures memory, disk and time of what `safelm synthesize` does with all rows at once: near-duplicates, the census.

    python scripts/bench/finish.py --documents=1000000 --families=500000

Signatures are random; those of a family agree in a share of their values, so that some are near-duplicates and some
share a band and are not. Memory is what the process holds itself (RssAnon), the most of samples every 20 ms, without
pages of mapped files, which the system takes back. Prints a JSON object a part.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from safelm.io.hashed import mixed
from safelm.jobs import beam_runner
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis import census
from safelm.safety.synthesis.gates.duplicate_index import DuplicateIndex
from safelm.safety.synthesis.gates.duplicates import Duplicates
from safelm.safety.synthesis.sources import Selection

_PIECE = 10_000


def pieces(documents: int, families: int) -> Iterator[np.ndarray]:
    """Signatures of so many documents, the same ones at every call."""
    first_FP = np.random.default_rng(0).integers(0, 1 << 32, (families, 128), dtype=np.uint32)
    for start in range(0, documents, _PIECE):
        rng = np.random.default_rng(start + 1)
        count = min(_PIECE, documents - start)
        found_NP = first_FP[rng.integers(0, families, count)]
        is_other_NP = rng.random((count, 128)) < rng.choice([0.1, 0.3, 0.5, 1.0], count)[:, None]
        found_NP[is_other_NP] = rng.integers(0, 1 << 32, int(is_other_NP.sum()), dtype=np.uint32)
        yield found_NP


def on_disk(folder: str, signatures: str, documents: int) -> int:
    """The number of near-duplicates, by the index on disk."""
    found = 0
    with DuplicateIndex(f"{folder}/index", documents, 0.7) as index:
        for piece in saved(signatures):
            index.add(piece)
        index.group()
        for number, piece in enumerate(saved(signatures)):
            start = number * _PIECE
            for document, cells in index.shared(start, start + len(piece)):
                found += index.first_like(cells, piece[document - start], f"document-{document}") is not None
    return found


def in_memory(signatures: str) -> int:
    """The same by the index in memory."""
    seen, number = Duplicates(0.7), 0
    for piece in saved(signatures):
        for signature in piece:
            seen.add(number, signature)
            number += 1
    return number - len(seen)


def saved(path: str) -> Iterator[np.ndarray]:
    """Signatures of a file, piece by piece."""
    with open(path, "rb") as file:
        while data := file.read(_PIECE * 512):
            yield np.frombuffer(data, np.uint32).reshape(-1, 128)


def take_census(folder: str, rows: int) -> int:
    """The number of rows that are no copies, a third of which are."""
    out, rng = OutputFolder(f"{folder}/out"), np.random.default_rng(0)
    jobs = [ShardJob(index, f"train-{index:06d}", "none.jsonl") for index in range(-(-rows // 50_000))]
    for job in jobs:
        hash_N = mixed(rng.integers(0, rows, 50_000).astype(np.uint64))
        np.save(f"{folder}/made.npy", np.array([np.arange(1, 50_001), hash_N, np.ones(50_000)], np.uint64))
        out.publish(f"{folder}/made.npy", f"{census.FOLDER}/{job.name}.npy")
    return sum(census.take(out, jobs, Selection("safeweb", (1,)), beam_runner.Runner(), 1))


def measured(what: str, folder: str, work: Callable[[], int]) -> None:
    """Runs it and prints what it took."""
    most, stop = {"memory": 0, "disk": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            most["memory"] = max(most["memory"], anonymous_kb() - before)
            paths = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
            most["disk"] = max(most["disk"], sum(os.path.getsize(path) for path in paths if os.path.exists(path)))

    before, started = anonymous_kb(), time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        stop.set()
        watcher.join()
    seconds = round(time.monotonic() - started, 1)
    facts = {"seconds": seconds, "memory_mb": most["memory"] >> 10, "disk_mb": most["disk"] >> 20}
    print(json.dumps({"what": what, "result": result, **facts}), flush=True)


def anonymous_kb() -> int:
    """The process's own memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python scripts/bench/finish.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--families", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the census")
    parser.add_argument("--in_memory", action="store_true", help="measure the index in memory too")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        signatures = f"{folder}/signatures"
        with open(signatures, "wb") as file:
            for piece in pieces(flags.documents, flags.families):
                file.write(piece.tobytes())
        with tempfile.TemporaryDirectory() as own:
            measured("near-duplicates", own, lambda: on_disk(own, signatures, flags.documents))
        with tempfile.TemporaryDirectory() as own:
            measured("census", own, lambda: take_census(own, flags.rows))
        if flags.in_memory:
            with tempfile.TemporaryDirectory() as own:
                measured("near-duplicates in memory", own, lambda: in_memory(signatures))


if __name__ == "__main__":
    main()
