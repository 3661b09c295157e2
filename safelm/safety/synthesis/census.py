"""Checks the whole input before anything is written: harm scores must be usable and documents unique.

So bad input shows within minutes, not after days of writing. Workers read the ids and scores of every shard, and what
they refuse (see `safelm.safety.synthesis.sources`) ends the run. Two rows with one source id end it too, since their
texts would share an id and a resumed run couldn't tell them apart. Rows whose id is a hash of their text are copies of
one document; all but the first are left out. Hashes are compared by way of files in the output's folder, in memory that
doesn't grow with the rows but for a bit each.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, UInt64

from safelm import documents
from safelm.io.hashed import HashedFiles, Marks
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis.sources import Selection, ShardRows

FOLDER, _SUFFIX = "_census", ".npy"
_RECORD = np.dtype([("hash", "<u8"), ("number", "<u8"), ("is_text", "u1")])
_ROW_BYTES = 24  # of a row in a shard's file
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
    return _leave_out_copies(out, jobs, selection)


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


def _leave_out_copies(out: OutputFolder, jobs: Sequence[ShardJob], selection: Selection) -> list[int]:
    """Writes which rows of each shard are copies; the number of its other rows. Raises ValueError like `take`."""
    counts = [0] * len(jobs)
    with out.staging() as staging:
        # Of every row a hash is on disk, and in memory a bit.
        total = sum(out.sizes(FOLDER)[os.path.basename(_file(job))] for job in jobs) // _ROW_BYTES
        files, ends = HashedFiles(os.path.join(staging, "hashes"), _RECORD, total), [0]
        for job in jobs:
            _, hashes_N, are_texts_N = _read(out, job)
            records = np.empty(len(hashes_N), _RECORD)
            records["hash"], records["is_text"] = hashes_N, are_texts_N
            records["number"] = np.arange(ends[-1], ends[-1] + len(hashes_N))
            files.add(records, hashes_N)
            ends.append(ends[-1] + len(hashes_N))
        marks = _find_copies(files, jobs, np.array(ends), lambda job, index: _look_up(out, job, index, selection))
    for place, job in enumerate(jobs):
        rows_N, are_copies_N = _read(out, job)[0], marks.get(ends[place], ends[place + 1])
        counts[place] = len(rows_N) - int(are_copies_N.sum())
        if are_copies_N.any():
            out.write_json(_copies_file(job), {"rows": rows_N[are_copies_N].tolist()})
    return counts


def _find_copies(
    files: HashedFiles,
    jobs: Sequence[ShardJob],
    ends_J: Int[np.ndarray, " J"],
    look_up: Callable[[ShardJob, int], tuple[str, str]],
) -> Marks:
    """Marks the rows whose id an earlier row has too. Raises ValueError if that id is not a hash of a text.

    Args:
      ends_J: by shard, the number of its first row among those of all shards; last the number of all.
      look_up: place and source id of a shard's row with this index.
    """
    marks, pairs, refused = Marks(int(ends_J[-1])), 0, ""
    for records in files.read():
        records = records[np.argsort(records["hash"], kind="stable")]
        second_M = 1 + np.flatnonzero(records["hash"][1:] == records["hash"][:-1])
        are_texts_M = (records["is_text"][second_M] & records["is_text"][second_M - 1]).astype(np.bool_)
        marks.add(records["number"][second_M[are_texts_M]].astype(np.int64))
        pairs += len(second_M)
        for at in second_M[~are_texts_M].tolist() if not refused else ():
            numbers = records["number"][at - 1 : at + 1].astype(np.int64)
            shards = np.searchsorted(ends_J, numbers, side="right") - 1
            found = [look_up(jobs[j], n) for j, n in zip(shards, (numbers - ends_J[shards]).tolist(), strict=True)]
            (first, one), (second, other) = found
            if one == other:  # else it was the hashes only
                refused = f"{first} and {second} have one id, {one!r}: keep one of them"
                break
    if refused:
        raise ValueError(refused + (f" ({pairs} such pairs)" if pairs > 1 else ""))
    return marks


def _look_up(out: OutputFolder, job: ShardJob, index: int, selection: Selection) -> tuple[str, str]:
    """Place and source id of the row with this index among a shard's counted ones."""
    wanted, rows = int(_read(out, job)[0][index]), ShardRows(job, selection)
    identity = next(identity for row, identity in rows.ids() if row == wanted)
    return f"{job.path}: row {rows.number(wanted)}", identity


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _file(job: ShardJob) -> str:
    return f"{FOLDER}/{job.name}{_SUFFIX}"


def _copies_file(job: ShardJob) -> str:
    return f"{FOLDER}/{job.name}.copies.json"
