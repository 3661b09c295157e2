"""Annotates a corpus: a run by Beam, a slice of an array, what is put together and counted at the end."""

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import documents
from safelm.documents import MANIFEST_NAME, WRITTEN_BY, DocumentFile
from safelm.io.files import BusyError
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.jobs.array_tasks import ArrayTask
from safelm.jobs.beam_jobs import Worker
from safelm.jobs.file_shards import RECORDS, run_speed
from safelm.jobs.output import OutputFolder
from safelm.jobs.progress import FolderProgress
from safelm.safety.ensemble import Agreement
from safelm.safety.scoring import scorers
from safelm.safety.scoring.annotating import PARTS, AnnotateJob, AnnotateWork
from safelm.safety.scoring.annotation_plan import FORMAT, MERGED, AnnotatePlan, done_records, make_plan, record_name
from safelm.safety.scoring.answers import numeric
from safelm.safety.scoring.manifest import scorer_records
from safelm.safety.scoring.plan import COMMAND
from safelm.safety.scoring.shard import rows_under_way

_SHOWN_REASONS = 3
_logger = logging.getLogger("safelm.score")


def annotate(
    files: Sequence[DocumentFile], work: AnnotateWork, runner: beam_runner.Runner, part_bytes: int
) -> dict[str, Any]:
    """Annotates what is missing in `work.output`; the manifest."""
    out = OutputFolder(work.output)
    with out.only_writer():
        plan = make_plan(out, work, files, part_bytes, None)
        former = next(out.read_json([MANIFEST_NAME]))
        if not plan.jobs and former is not None:
            _logger.info("%s: nothing is left to do; what was done before:", work.output)
            return former
        started = time.monotonic()
        if not runner.may_stay_here(len(plan.jobs)):
            scorers.forget()
        with Bar(total=len(plan.shards), initial=len(plan.shards) - len(plan.jobs), unit="shard", disable=None) as bar:
            progress = FolderProgress(out, bar, functools.partial(_show_progress, out, bar))
            beam_runner.run_jobs(plan.jobs, work, runner, progress)
            progress.show()
        out.raise_failures()
        return _finish(out, plan, started, runner.name)


def annotate_slice(
    files: Sequence[DocumentFile], work: AnnotateWork, part_bytes: int, task: ArrayTask
) -> dict[str, Any] | None:
    """Annotates one slice in this process; the manifest if that was the last shard of all, else None.

    Done-records are written shard by shard and wait for no other slice. Whoever finds a record for every shard puts
    the parts together and writes the manifest.
    """
    out = OutputFolder(work.output)
    started, do = time.monotonic(), Worker(work)
    with out.only_writer_of_slice(task.index, task.count):
        plan = make_plan(out, work, files, part_bytes, task)
        for job in Bar(plan.jobs, unit="shard", desc=f"slice {task}", disable=None):
            do(job)
        out.raise_failures({job.name for job in plan.jobs})
    left = len(plan.shards) - len(out.sizes(RECORDS))
    if left > 0:
        _logger.info("%s: slice %s is done; %d shards of others are left", work.output, task, left)
        return None
    try:
        with out.only_writer():
            former = next(out.read_json([MANIFEST_NAME]))
            return former if former and not plan.jobs else _finish(out, plan, started, f"slice {task}")
    except BusyError:
        _logger.info("%s: slice %s is done; another call is at work there and will finish", work.output, task)
        return None


def _show_progress(out: OutputFolder, bar: Any) -> None:
    if not out.is_remote:
        bar.set_postfix_str(f"{rows_under_way(out):,} rows of shards under way", refresh=False)
    bar.update(len(out.sizes(RECORDS)) - bar.n)
    bar.refresh()


def _finish(out: OutputFolder, plan: AnnotatePlan, started: float, runner: str) -> dict[str, Any]:
    """Puts parts together and writes the manifest.

    Raises ValueError where a shard has no record, and where every row of the input is malformed.
    """
    done = done_records(out, plan.shards)
    missing = [job.name for job in plan.shards if job.name not in done]
    if missing:
        raise ValueError(f"{out.root}: {len(missing)} shards have no record, the first is {missing[0]}: run again")
    _check_any_left(out, plan, [done[job.name] for job in plan.shards])
    parted = {target: jobs for target, jobs in plan.files.items() if jobs[0].part is not None}
    for target, jobs in parted.items():
        _merge(out, target, jobs, done)
    own = [done[job.name] for job in plan.jobs]
    speed = run_speed(own, time.monotonic() - started, runner, unit="bytes")
    manifest = _manifest(plan, [done[job.name] for job in plan.shards], speed)
    out.write_json(MANIFEST_NAME, manifest)
    out.remove_folder(PARTS)
    return manifest


def _check_any_left(out: OutputFolder, plan: AnnotatePlan, records: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, and forgets the shards, so that files can be mended, if every row is malformed."""
    reasons = _summed(record["malformed"] for record in records)
    more = ", ".join(f"{reason} ({count})" for reason, count in list(reasons.items())[:_SHOWN_REASONS])
    try:
        paths, rows = (job.path for job in plan.shards), sum(record["rows"] for record in records)
        plan.work.limit.check_any_left(paths, sum(reasons.values()), rows, more=more)
    except ValueError:
        for job in plan.shards:
            out.remove(job.record)
        raise


def _merge(out: OutputFolder, target: str, jobs: Sequence[AnnotateJob], done: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts the parts of a file together, unless that was done before. Raises ValueError if rows are lost."""
    import pyarrow.parquet

    record = f"{MERGED}/{record_name(target)}.json"
    (former,) = out.read_json([record])
    there = out.sizes(os.path.dirname(target)).get(os.path.basename(target))
    if former and former["files"].get(target, {}).get("bytes") == there:
        return
    rows = sum(done[job.name]["rows"] for job in jobs)
    with out.staging() as staging:
        local = os.path.join(staging, "whole")
        with contextlib.ExitStack() as files:
            writer: Any = None
            for job in jobs:
                with documents.open_parquet(out.path(job.output)) as part:
                    if writer is None:
                        writer = pyarrow.parquet.ParquetWriter(
                            local, part.schema_arrow, compression="zstd", write_page_checksum=True
                        )
                        files.enter_context(writer)
                    for group in range(part.num_row_groups):
                        writer.write_table(part.read_row_group(group))
        found = pyarrow.parquet.read_metadata(local).num_rows
        if found != rows:
            raise ValueError(f"{out.path(target)}: {found} rows, and its parts have {rows}")
        facts = {"rows": rows} | out.publish(local, target)
    out.write_json(record, {"files": {target: facts}})


def _manifest(plan: AnnotatePlan, records: Sequence[Mapping[str, Any]], speed: Mapping[str, Any]) -> dict[str, Any]:
    work = plan.work
    agreements = [Agreement.from_json(record["agreement"]) for record in records]
    return {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "output_rows": "annotations",
        "files": {},  # of documents
        "annotations": {"files": len(plan.files), "columns": numeric(work.columns)},
        "input": {"files": len(plan.files), "bytes": sum(jobs[0].bytes for jobs in plan.files.values())},
        "scorers": scorer_records(work.scorers),
        "safe_bound": work.safe_bound,
        "text_column": work.text_column,
        "id_column": work.id_column,
        "max_chunks": work.max_chunks,
        "totals": {name: sum(record[name] for record in records) for name in ("rows", "asked", "bytes")},
        "scores": _summed(record["scores"] for record in records),
        "flags": _summed(record["flags"] for record in records),
        "malformed": _summed(record["malformed"] for record in records),
        "agreement": functools.reduce(
            Agreement.merge, agreements, Agreement([spec.name for spec in work.scorers])
        ).report(),
        "speed": dict(speed),
    }


def _summed(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def report(output: str, manifest: Mapping[str, Any]) -> None:
    """Logs what a run did."""
    totals, speed = manifest["totals"], manifest["speed"]
    scores = ", ".join(f"{name} {count}" for name, count in manifest["scores"].items())
    flags = ", ".join(f"{name} {count}" for name, count in manifest["flags"].items())
    _logger.info(
        "%s: %d rows, %d texts asked about; harm_score %s; flags %s; %s shards in %.1f s, %.1f rows/s",
        *(output, totals["rows"], totals["asked"], scores, flags or "none"),
        *(speed["shards"], speed["seconds"], speed["documents_per_second"]),
    )


def describe_plan(
    files: Sequence[DocumentFile], part_bytes: int, task: ArrayTask | None, command: Sequence[str] = ()
) -> list[str]:
    """Lines that say what a run would do, and the script for SLURM; nothing is written and no scorer loaded."""
    from safelm.jobs import array_tasks
    from safelm.jobs.file_shards import side_by_side, split

    parts = side_by_side(lambda file: split(file, part_bytes), files)
    sizes = [file.bytes / len(found) for file, found in zip(files, parts, strict=True) for _ in found]
    tasks = task.count if task else min(len(sizes), array_tasks.MOST_TASKS)
    own = [sum(ArrayTask(index, tasks).of(sizes, float)) for index in range(tasks)]
    return [
        f"# {len(files):,} files, {sum(sizes):,.0f} bytes: {len(sizes):,} shards, the largest {max(sizes):,.0f} bytes",
        f"# {tasks} slices of {min(own):,.0f} to {max(own):,.0f} bytes",
        *array_tasks.slurm_script(command or [sys.executable, "-m", COMMAND], tasks).splitlines(),
    ]
