"""Leaves near-duplicates out of a finished run, in bounded memory: of two texts the earlier one stays.

What it needs lies on disk, in a folder of the output (of one in a bucket: of the cache folder) that is removed at the
end; a second pass after a kill begins anew and decides the same.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt32

from safelm.io import records
from safelm.io.hashed import Marks
from safelm.io.progress import Bar
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis.gates.duplicate_index import DuplicateIndex
from safelm.safety.synthesis.plan import SynthesisPlan
from safelm.safety.synthesis.report import Funnel
from safelm.safety.synthesis.shard import REJECTED, REJECTED_SUFFIX, output_names

_NAME = f"{REJECTED}/near_duplicates{REJECTED_SUFFIX}"
_ROWS_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """The passed rows that are left out, a bit each, by their number among the passed rows of all shards.

    Attributes:
      rows: by shard, the numbers of its passed rows.
    """

    rows: dict[str, range]
    marks: Marks

    def of(self, job: ShardJob) -> set[int]:
        """The rows of a shard that are left out, by their places among its passed rows."""
        rows = self.rows[job.name]
        return set(np.flatnonzero(self.marks.get(rows.start, rows.stop)).tolist())


def remove(out: OutputFolder, plan: SynthesisPlan, funnel: Funnel) -> NearDuplicates:
    """Finds the rows that are left out and lists them in `rejected`; updates the funnel."""
    rows, total = {}, 0
    for job in plan.shards:
        rows[job.name] = range(total, total + plan.done[job.name]["passed"])
        total = rows[job.name].stop
    found, threshold = NearDuplicates(rows, Marks(total)), plan.work.gates.duplicate_threshold
    with (
        out.staging() as staging,
        DuplicateIndex(os.path.join(staging, "index"), total, threshold) as index,
        Bar(total=2 * total, desc="comparing", disable=None) as bar,
    ):
        for job in plan.shards:
            for signatures_ND in _signatures(out, job, len(rows[job.name])):
                index.add(signatures_ND)
                bar.update(len(signatures_ND))
        index.group()
        path = os.path.join(staging, "duplicates")
        with open(path, "w", encoding="utf-8") as file:
            for job in plan.shards:
                for number, (identity, style, score, category), first in _repeats(out, job, rows[job.name], index):
                    found.marks.add(np.array([number]))
                    funnel.drop_near_duplicate(style, score, category)
                    file.write(json.dumps({"id": identity, "near_duplicate_of": first}) + "\n")
                bar.update(len(rows[job.name]))
        if funnel.near_duplicates:
            out.publish(path, _NAME)
    return found


def read_facts(out: OutputFolder, job: ShardJob) -> dict[str, Any]:
    """What a shard with passed rows keeps for the finishing pass."""
    name = output_names(job)["facts"]
    with out.open(name) as file:
        return records.parse(file.read(), out.path(name), "remove it and run the same command again")


def _repeats(
    out: OutputFolder, job: ShardJob, rows: range, index: DuplicateIndex
) -> Iterator[tuple[int, tuple[str, str, int, str], str]]:
    """(number, facts, id of the one that it repeats) of the rows of a shard that are left out."""
    shared = dict(index.shared(rows.start, rows.stop))
    if not shared:
        return
    facts, start = read_facts(out, job)["rows"], rows.start
    for signatures_ND in _signatures(out, job, len(rows)):
        for number in range(start, start + len(signatures_ND)):
            if number in shared:
                row = facts[number - rows.start]
                first = index.first_like(shared[number], signatures_ND[number - start], row[0])
                if first is not None:
                    yield number, tuple(row), first
        start += len(signatures_ND)


def _signatures(out: OutputFolder, job: ShardJob, count: int) -> Iterator[UInt32[np.ndarray, "N 128"]]:
    """The signatures of a shard's passed rows, some at a time. Raises ValueError for a damaged file."""
    if not count:
        return
    name = output_names(job)["signatures.npy"]
    with out.open(name) as file:
        np.lib.format.read_magic(file)
        (rows, width), _, kind = np.lib.format.read_array_header_1_0(file)
        for start in range(0, count, _ROWS_AT_ONCE):
            wanted = min(_ROWS_AT_ONCE, count - start)
            data = file.read(wanted * width * kind.itemsize)
            if rows != count or len(data) != wanted * width * kind.itemsize:
                raise ValueError(f"{out.path(name)}: damaged, it has not {count} rows: remove it and run again")
            yield np.frombuffer(data, kind).reshape(wanted, width)
