"""A look at all of the input before anything is written: scores that can be used, and every document there once.

Bad input shows in minutes, not after days of writing: workers read ids and scores of every shard, and what they refuse
(see `safelm.safety.synthesis.sources`) ends the run. Two rows of one source id end it too: their texts would get one
id, and could not be told apart when a run goes on.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from safelm import beam_runner
from safelm.safety.scoring.output import OutputFolder
from safelm.safety.scoring.shard import ShardJob
from safelm.safety.synthesis.sources import Selection, ShardRows

FOLDER = "_census"
SMALL_BYTES = 256 << 20  # less is read by this process, where workers would only take time to start


@dataclasses.dataclass(frozen=True)
class CensusWork:
    """What workers need (see `safelm.beam_jobs.Work`)."""

    output: str
    selection: Selection

    def load(self) -> None:
        """Nothing is loaded."""

    def run(self, job: ShardJob, loaded: None) -> None:
        """Leaves a shard's row numbers and hashes of source ids in a file."""
        found = [(row, _hash(identity)) for row, identity in ShardRows(job, self.selection).ids()]
        rows_N, hashes_N = np.array(found, np.uint64).reshape(-1, 2).T
        out = OutputFolder(self.output)
        with out.at_work(), out.staging() as staging:
            path = os.path.join(staging, "census.npy")
            np.save(path, np.stack([rows_N, hashes_N]))
            out.publish(path, _file(job))

    def failed(self, job: ShardJob, message: str) -> None:
        """Leaves the message where the calling process finds it."""
        OutputFolder(self.output).record_failure(job.name, message)


def take(
    out: OutputFolder, jobs: Sequence[ShardJob], selection: Selection, runner: beam_runner.Runner, input_bytes: int
) -> list[int]:
    """How many documents of each shard will be written from.

    Raises ValueError that names file and row for what can't be used, and both rows where two have one source id.
    """
    there = out.sizes(FOLDER)
    todo = [job for job in jobs if os.path.basename(_file(job)) not in there]
    work = CensusWork(out.root, selection)
    with tqdm(total=len(todo), unit="shard", desc="checking", disable=None) as bar:
        if runner.is_here and input_bytes <= SMALL_BYTES:
            for job in todo:
                work.run(job, None)
                bar.update()
        else:
            beam_runner.run_jobs(todo, work, runner, _on_tick(out, bar, len(jobs) - len(todo)))
    out.raise_failures()
    found = [_read(out, job) for job in jobs]
    _check_once(jobs, found, selection)
    return [rows_N.size for rows_N, _ in found]


def _on_tick(out: OutputFolder, bar: tqdm, before: int) -> Callable[[], object]:
    return lambda: None if bar.disable else bar.update(len(out.sizes(FOLDER)) - before - bar.n)


def _read(out: OutputFolder, job: ShardJob) -> tuple[np.ndarray, np.ndarray]:
    with out.open(_file(job)) as file:
        rows_N, hashes_N = np.load(io.BytesIO(file.read()))
    return rows_N, hashes_N


def _check_once(jobs: Sequence[ShardJob], found: Sequence[tuple[np.ndarray, np.ndarray]], selection: Selection) -> None:
    hashes_N = np.concatenate([hashes for _, hashes in found]) if found else np.zeros(0, np.uint64)
    order_N = np.argsort(hashes_N, kind="stable")
    twice = np.flatnonzero(hashes_N[order_N][1:] == hashes_N[order_N][:-1])
    ends = np.cumsum([hashes.size for _, hashes in found])
    for at in twice.tolist():
        places = []
        for index in order_N[at : at + 2].tolist():
            shard = int(np.searchsorted(ends, index, side="right"))
            row = int(found[shard][0][index - (int(ends[shard]) - found[shard][0].size)])
            places.append(_look_up(jobs[shard], row, selection))
        (first, one), (second, other) = places
        if one == other:  # else it was the hashes only
            more = f" ({len(twice)} such pairs)" if len(twice) > 1 else ""
            raise ValueError(f"{first} and {second} have one id, {one!r}: keep one of them{more}")


def _look_up(job: ShardJob, wanted: int, selection: Selection) -> tuple[str, str]:
    """Where a row stands, and its source id."""
    rows = ShardRows(job, selection)
    identity = next(identity for row, identity in rows.ids() if row == wanted)
    return f"{job.path}: row {rows.number(wanted)}", identity


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _file(job: ShardJob) -> str:
    return f"{FOLDER}/{job.name}.npy"
