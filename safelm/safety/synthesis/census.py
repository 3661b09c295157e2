"""Checks the whole input before anything is written: harm scores must be usable and documents unique.

So bad input shows within minutes, not after days of writing. Workers read the ids and scores of every shard, and what
they refuse (see `safelm.safety.synthesis.sources`) ends the run. Two rows with one source id end it too, since their
texts would share an id and a resumed run couldn't tell them apart. Rows whose id is a hash of their text are copies of
one document; all but the first are left out.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt64

from safelm import documents
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis.sources import Selection, ShardRows

FOLDER, _SUFFIX = "_census", ".npy"
SMALL_BYTES = 256 << 20  # less is read by this process, where workers would only take time to start


@dataclasses.dataclass(frozen=True)
class CensusWork:
    """The work of checking shards (see `safelm.jobs.beam_jobs.Work`)."""

    output: str
    selection: Selection

    def load(self) -> None:
        """Loads nothing."""

    def run(self, job: ShardJob, loaded: None) -> None:
        """Stores each row's number, the hash of its source id, and whether that id is a hash of its text."""
        rows = ShardRows(job, self.selection)
        found = [(row, _hash(identity), documents.is_content_id(identity)) for row, identity in rows.ids()]
        out = OutputFolder(self.output)
        with out.at_work(), out.staging() as staging:
            path = os.path.join(staging, "census.npy")
            np.save(path, np.array(found, np.uint64).reshape(-1, 3).T)
            out.publish(path, _file(job))

    def failed(self, job: ShardJob, message: str) -> None:
        """Stores the message where the calling process finds it."""
        OutputFolder(self.output).record_failure(job.name, message)


def take(
    out: OutputFolder, jobs: Sequence[ShardJob], selection: Selection, runner: beam_runner.Runner, input_bytes: int
) -> list[int]:
    """The number of usable documents in each shard; afterwards `copies` tells which rows are left out.

    Raises ValueError naming file and row of an unusable row, or both rows with one source id.
    """
    there = out.sizes(FOLDER)
    todo = [job for job in jobs if os.path.basename(_file(job)) not in there]
    work = CensusWork(out.root, selection)
    with Bar(total=len(todo), unit="shard", desc="checking", disable=None) as bar:
        if runner.is_here and input_bytes <= SMALL_BYTES:
            for job in todo:
                work.run(job, None)
                bar.update()
        else:
            beam_runner.run_jobs(todo, work, runner, _on_tick(out, bar, len(jobs) - len(todo)))
    out.raise_failures()
    found = [_read(out, job) for job in jobs]
    repeated = _find_copies(jobs, found, selection)
    for job, rows in zip(jobs, repeated, strict=True):
        if rows:
            out.write_json(_copies_file(job), {"rows": sorted(rows)})
    return [facts_3N.shape[1] - len(rows) for facts_3N, rows in zip(found, repeated, strict=True)]


def copies(out: OutputFolder, job: ShardJob) -> frozenset[int]:
    """The rows of a shard that are left out as copies, numbered from its first row."""
    (found,) = out.read_json([_copies_file(job)])
    return frozenset(found["rows"]) if found else frozenset()


def _on_tick(out: OutputFolder, bar: Bar, before: int) -> Callable[[], object]:
    def count() -> int:
        return sum(name.endswith(_SUFFIX) for name in out.sizes(FOLDER))

    return lambda: None if bar.disable else bar.update(count() - before - bar.n)


def _read(out: OutputFolder, job: ShardJob) -> UInt64[np.ndarray, "3 N"]:
    with out.open(_file(job)) as file:
        return np.load(io.BytesIO(file.read()))


def _find_copies(
    jobs: Sequence[ShardJob], found: Sequence[UInt64[np.ndarray, "3 _"]], selection: Selection
) -> list[set[int]]:
    """The rows of each shard whose id an earlier row has too. Raises ValueError if that id is not a hash of a text."""
    rows_N, hashes_N, are_texts_N = np.concatenate([np.zeros((3, 0), np.uint64), *found], axis=1)
    order_N = np.argsort(hashes_N, kind="stable")
    twice = np.flatnonzero(hashes_N[order_N][1:] == hashes_N[order_N][:-1])
    ends = np.cumsum([facts_3N.shape[1] for facts_3N in found])
    repeated: list[set[int]] = [set() for _ in jobs]
    for at in twice.tolist():
        pair = order_N[at : at + 2]
        shards, rows = np.searchsorted(ends, pair, side="right").tolist(), rows_N[pair].astype(int).tolist()
        if are_texts_N[pair].all():
            repeated[shards[1]].add(rows[1])
            continue
        places = [_look_up(jobs[shard], row, selection) for shard, row in zip(shards, rows, strict=True)]
        (first, one), (second, other) = places
        if one == other:  # else it was the hashes only
            more = f" ({len(twice)} such pairs)" if len(twice) > 1 else ""
            raise ValueError(f"{first} and {second} have one id, {one!r}: keep one of them{more}")
    return repeated


def _look_up(job: ShardJob, wanted: int, selection: Selection) -> tuple[str, str]:
    """A row's place and its source id."""
    rows = ShardRows(job, selection)
    identity = next(identity for row, identity in rows.ids() if row == wanted)
    return f"{job.path}: row {rows.number(wanted)}", identity


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _file(job: ShardJob) -> str:
    return f"{FOLDER}/{job.name}{_SUFFIX}"


def _copies_file(job: ShardJob) -> str:
    return f"{FOLDER}/{job.name}.copies.json"
