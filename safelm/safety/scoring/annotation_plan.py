"""What a run that annotates has to do: the settings and files of its folder, its shards, those that are done.

OUTPUT/_settings.json   what decides the annotations
OUTPUT/_plan.jsonl      a line for each input file: its name, size, hash and parts
OUTPUT/_shards/         a record for each shard that is done
OUTPUT/_parts/          annotations of parts of large files, until there are all
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.documents import MANIFEST_NAME, SETTINGS_NAME, WRITTEN_BY, DocumentFile, Part, annotations
from safelm.io import files as whole_files
from safelm.io import remote
from safelm.jobs.array_tasks import ArrayTask
from safelm.jobs.file_shards import RECORDS, check_settings, file_sizes, is_whole, shard_name, side_by_side, split
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring.annotating import AnnotateJob, AnnotateWork
from safelm.safety.scoring.answers import numeric
from safelm.safety.scoring.plan import ARGUMENTS, COMMAND, scorer_facts

FORMAT = 1
PLAN_NAME = "_plan.jsonl"
MERGED = "_merged"  # records of files whose parts were put together


@dataclasses.dataclass
class AnnotatePlan:
    """A run: every shard in the order of the input, and the jobs of this call, large ones first."""

    work: AnnotateWork
    shards: Sequence[AnnotateJob]
    jobs: Sequence[AnnotateJob]
    part_bytes: int

    @property
    def files(self) -> dict[str, list[AnnotateJob]]:
        """The shards of each file of annotations."""
        found: dict[str, list[AnnotateJob]] = {}
        for job in self.shards:
            found.setdefault(job.target, []).append(job)
        return found


def make_plan(
    out: OutputFolder, work: AnnotateWork, files: Sequence[DocumentFile], part_bytes: int, task: ArrayTask | None
) -> AnnotatePlan:
    """Compares with what is in the folder, clears what no done shard of this call has there, and lists its jobs.

    A slice of an array looks at the contents of its own files only, when it runs them: another call has planned.

    Raises ValueError where the folder holds, or was begun with, something else, naming the difference.
    """
    settings = {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "output_rows": "annotations",
        "scorers": [scorer_facts(spec) for spec in work.scorers],
        **{name: (work.safe_bound or {}).get(name) for name in ("max_flagged_safe", "safe_sample")},
        "columns": numeric(work.columns),
        "text_column": work.text_column,
        "id_column": work.id_column,
        "part_bytes": part_bytes,
        "max_chunks": work.max_chunks,
    }
    check_settings(out, settings, ARGUMENTS)
    targets = annotations.names([file.path for file in files])
    former = _read_plan(out)
    if task is not None and former and _are_listed(former, targets, files):
        lines = former
    else:
        lines = side_by_side(lambda pair: _describe(*pair, part_bytes), zip(files, targets, strict=True))
        _check_same(out, former, lines, files)
    shards = list(_shards(files, lines))
    out.write_json(SETTINGS_NAME, settings)
    if lines is not former and lines != former:
        _write_plan(out, lines)
    sizes = {job.name: job.bytes / len(line["parts"]) for job, line in zip(shards, _of_shards(lines), strict=True)}
    own = (task or ArrayTask(0, 1)).of(shards, lambda job: sizes[job.name])
    done = done_records(out, own)
    jobs = [job for job in own if job.name not in done]
    _clear(out, jobs, is_alone=task is None)
    return AnnotatePlan(work, shards, jobs, part_bytes)


def done_records(out: OutputFolder, shards: Sequence[AnnotateJob]) -> dict[str, Mapping[str, Any]]:
    """Records, by name, of the shards whose rows are all in the folder, in a part or in the whole file."""
    recorded = out.sizes(RECORDS)
    jobs = [job for job in shards if os.path.basename(job.record) in recorded]
    sizes = file_sizes(out, {os.path.dirname(name) for job in jobs for name in (job.output, job.target)})
    parted = dict.fromkeys(job.target for job in jobs if job.part is not None)
    there = out.sizes(MERGED) if parted else {}
    merged_names = [target for target in parted if f"{record_name(target)}.json" in there]
    found = out.read_json([f"{MERGED}/{record_name(target)}.json" for target in merged_names])
    merged = {target for target, record in zip(merged_names, found, strict=True) if is_whole(record, sizes)}
    records = zip(jobs, out.read_json([job.record for job in jobs]), strict=True)
    return {
        job.name: record
        for job, record in records
        if is_whole(record, sizes) or (job.target in merged and isinstance(record, dict))
    }


def record_name(target: str) -> str:
    """The name of a merged file's record."""
    return target.replace("/", "__")


def _describe(file: DocumentFile, target: str, part_bytes: int) -> dict[str, Any]:
    parts = [[part.start, part.stop] if part else None for part in split(file, part_bytes)]
    return {"name": target, **annotations.input_facts(file), "parts": parts}


def _shards(files: Sequence[DocumentFile], lines: Sequence[Mapping[str, Any]]):
    index = 0
    for file, line in zip(files, lines, strict=True):
        for bounds in line["parts"]:
            part = Part(*bounds) if bounds else None
            name = shard_name(index, file.path)
            yield AnnotateJob(index, name, file.path, part, line["name"], line["bytes"], line["sha256"])
            index += 1


def _of_shards(lines: Sequence[Mapping[str, Any]]):
    for line in lines:
        yield from [line] * len(line["parts"])


def _are_listed(lines: Sequence[Mapping[str, Any]], targets: Sequence[str], files: Sequence[DocumentFile]) -> bool:
    return [(line["name"], line["bytes"]) for line in lines] == [
        (target, file.bytes) for target, file in zip(targets, files, strict=True)
    ]


def _check_same(
    out: OutputFolder,
    former: Sequence[Mapping[str, Any]] | None,
    lines: Sequence[Mapping[str, Any]],
    files: Sequence[DocumentFile],
) -> None:
    """Raises ValueError naming a file that was another when the folder was begun.

    A file of one shard may be mended as long as nothing of it is annotated: the names of others stay.
    """
    if former is None or former == lines:
        return
    place, remedy = f"--output {out.root} was begun with", "choose another --output, or remove that folder"
    if len(former) != len(lines):
        raise ValueError(f"{place} {len(former)} files of --input, now there are {len(lines)}: {remedy}")
    recorded = out.sizes(RECORDS)
    jobs = list(_shards(files, lines))
    firsts = {job.target: job for job in reversed(jobs)}
    for old, new in zip(former, lines, strict=True):
        if old == new:
            continue
        is_one = old["parts"] == new["parts"] == [None] and old["name"] == new["name"]
        if is_one and os.path.basename(firsts[new["name"]].record) not in recorded:
            continue
        raise ValueError(f"{place} --input {_shown(old)}, now it is {_shown(new)}: {remedy}")


def _shown(line: Mapping[str, Any]) -> str:
    return f"{line['name']} of {line['bytes']} bytes, {line['sha256'][:12]}"


def _read_plan(out: OutputFolder) -> list[Any] | None:
    try:
        with out.open(PLAN_NAME) as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{out.path(PLAN_NAME)}: damaged, not JSON; remove that folder") from None


def _write_plan(out: OutputFolder, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if out.is_remote:
        remote.write_text(out.path(PLAN_NAME), text)
    else:
        whole_files.write_whole(out.path(PLAN_NAME), text)


def _clear(out: OutputFolder, jobs: Sequence[AnnotateJob], *, is_alone: bool) -> None:
    """Removes what tells of the jobs of this call: files of a killed run, records without files, failures."""
    out.clear_failures(None if is_alone else {job.name for job in jobs})
    if not jobs:
        return
    out.remove(MANIFEST_NAME)
    recorded = out.sizes(RECORDS)
    for job in jobs:
        if os.path.basename(job.record) in recorded:
            out.remove(job.record)
