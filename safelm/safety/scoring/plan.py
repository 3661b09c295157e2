"""What a scoring run has to do: its settings against those of the output folder, its shards, those that are done."""

import dataclasses
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import documents
from safelm.documents import MANIFEST_NAME, SETTINGS_NAME, WRITTEN_BY, DocumentFile, Part
from safelm.io import hub, remote
from safelm.jobs.file_shards import (
    RECORDS,
    ShardJob,
    check_settings,
    done_records,
    is_one_shard,
    shard_name,
    side_by_side,
    split,
)
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring.columns import FOLDERS, QUARANTINE, check_free
from safelm.safety.scoring.scorers import ScorerSpec
from safelm.safety.scoring.shard import ScoreWork, output_name

_logger = logging.getLogger(__name__)

FORMAT = 1
COMMAND = "safelm.score"
ARGUMENTS = {
    "input": "--input",
    "max_flagged_safe": "--max_flagged_safe",
    "safe_sample": "--safe_sample",
    "scorers": "--scorers",
    "text_column": "--text_column",
    "id_column": "--id_column",
    "part_bytes": "--part_mb, in bytes:",
    "max_chunks": "--max_chunks",
    "output_rows": "--output_rows",
}


@dataclasses.dataclass
class ScorePlan:
    """A run: every shard, the records of those that are done, and the jobs for the others, large ones first."""

    work: ScoreWork
    settings: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    shards: Sequence[ShardJob]
    done: dict[str, Mapping[str, Any]]
    jobs: Sequence[ShardJob]


def check_input(path: str, work: ScoreWork) -> None:
    """Raises ValueError where a file lacks the text column (or a named one of ids) or has one that scoring adds."""
    for row in documents.check_names(path, work.text_column, work.id_column)[:1]:
        check_free(path, row.values, work.columns)


def make_plan(out: OutputFolder, work: ScoreWork, files: Sequence[DocumentFile], part_bytes: int) -> ScorePlan:
    """Compares with what is in the output folder, clears what no done shard has there, and lists the jobs.

    Raises ValueError where the folder holds, or was begun with, something else, naming the difference.
    """
    inputs = side_by_side(documents.describe, files)
    settings = {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "input": list(map(documents.without_place, inputs)),
        "scorers": [scorer_facts(spec) for spec in work.scorers],
        **{name: (work.safe_bound or {}).get(name) for name in ("max_flagged_safe", "safe_sample")},
        "columns": dict(work.columns.types),
        "text_column": work.text_column,
        "id_column": work.id_column,
        "part_bytes": part_bytes,
    }
    parts = side_by_side(lambda file: split(file, part_bytes), files)
    pieces = [(file, part) for file, found in zip(files, parts, strict=True) for part in found]
    owners = [(file, found) for file, found in zip(files, parts, strict=True) for _ in found]
    shards = [_job(index, file.path, part) for index, (file, part) in enumerate(pieces)]
    firsts = [next(found) for _, found in itertools.groupby(shards, key=lambda job: job.path)]
    check_settings(out, settings | {"input": _mended(out, settings, firsts)}, ARGUMENTS)
    done = done_records(out, shards, (*FOLDERS, QUARANTINE))
    _warn_of_newer(out, [job for job in shards if job.name in done])
    _clear(out, shards, done)
    sizes = {job.name: file.bytes / len(found) for job, (file, found) in zip(shards, owners, strict=True)}
    jobs = sorted((job for job in shards if job.name not in done), key=lambda job: -sizes[job.name])
    out.write_json(SETTINGS_NAME, settings)
    return ScorePlan(work, settings, inputs, shards, done, jobs)


def scorer_facts(scorer: ScorerSpec) -> dict[str, str]:
    """What of a scorer is kept; one of a hub with its commit."""
    facts = {"name": scorer.name, "fingerprint": scorer.fingerprint}
    return facts | ({"spec": scorer.spec} if hub.has_name(scorer.spec) else {})


def _mended(out: OutputFolder, wanted: Mapping[str, Any], firsts: Sequence[ShardJob]) -> list[Mapping[str, Any]]:
    """The input, but as the folder has it where a file changed of which nothing is scored: other shards lose nothing.

    Only files of one shard, before and now: else others' names would change. `firsts`: the first shard of each file.
    """
    (former,) = out.read_json([SETTINGS_NAME])
    found = former.get("input") if isinstance(former, dict) else None
    if not isinstance(found, list) or len(found) != len(firsts):
        return wanted["input"]
    recorded = out.sizes(RECORDS)

    def may_change(old: Mapping[str, Any], new: Mapping[str, Any], first: ShardJob) -> bool:
        is_one = first.part is None and is_one_shard(old["name"], old["bytes"], wanted["part_bytes"])
        return is_one and old["name"] == new["name"] and os.path.basename(first.record) not in recorded

    files = zip(found, wanted["input"], firsts, strict=True)
    return [old if may_change(old, new, first) else new for old, new, first in files]


def _job(index: int, path: str, part: Part | None) -> ShardJob:
    return ShardJob(index, shard_name(index, path), path, part)


def refresh(out: OutputFolder, plan: ScorePlan) -> None:
    """Looks again which shards are done."""
    plan.done = done_records(out, plan.shards, (*FOLDERS, QUARANTINE))


def _warn_of_newer(out: OutputFolder, scored: Sequence[ShardJob]) -> None:
    """Says which local files were written after they were scored: `describe` looks at their ends only."""
    if out.is_remote:
        return
    pairs = [(job.path, out.path(job.record)) for job in scored if not remote.is_remote(job.path)]
    newer = dict.fromkeys(path for path, record in pairs if os.path.getmtime(path) > os.path.getmtime(record))
    if newer:
        _logger.warning(
            "%s: %d input files were written after they were scored, the first is %s; their scores stay as they are: "
            "where the content is another now, begin in another --output",
            *(out.root, len(newer), next(iter(newer))),
        )


def _clear(out: OutputFolder, shards: Sequence[ShardJob], done: Mapping[str, Any]) -> None:
    """Removes what tells of shards that are not done: files of a killed run, records without files, failures."""
    out.clear_failures()
    if len(done) == len(shards):
        return
    out.remove(MANIFEST_NAME)
    there = {folder: out.sizes(folder) for folder in (*FOLDERS, QUARANTINE, RECORDS)}
    for job in shards:
        if job.name not in done:
            for folder in (*FOLDERS, QUARANTINE):
                if os.path.basename(output_name(job, folder)) in there[folder]:
                    out.remove(output_name(job, folder))
            if os.path.basename(job.record) in there[RECORDS]:
                out.remove(job.record)
