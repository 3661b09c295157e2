"""The finishing pass: gives files the names that tasks read, without near-duplicates, and writes the manifest.

It decides in the order of the shards and from their files alone, so a second pass after a kill gives the same result.
"""

import functools
import heapq
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from safelm.documents import MANIFEST_NAME, WRITTEN_BY
from safelm.io.progress import Bar
from safelm.jobs.file_shards import RECORDS, ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis import census, columns, journal
from safelm.safety.synthesis.attempts import MIN_REPLIES, nothing_written
from safelm.safety.synthesis.near_duplicates import NearDuplicates, read_facts
from safelm.safety.synthesis.notes import publishing
from safelm.safety.synthesis.plan import COMMAND, FORMAT, SynthesisPlan
from safelm.safety.synthesis.report import Funnel, cards
from safelm.safety.synthesis.shard import PASSED, PROGRESS, output_names

_NO_TEXT = ("writer_filtered", "writer_refused", "writer_error", "writer_empty", "writer_reasoning")
_OF_SHARDS = ("rows", "passed", "rejected", "malformed", "replies", "seconds")
_TOTALS = ("rows", "passed", "rejected", "malformed", "repeats", "replies", "prompt_tokens", "completion_tokens")


def check_writes(out: OutputFolder, plan: SynthesisPlan, model: str) -> Funnel:
    """The funnel of all shards. Raises ValueError if the writer wrote (almost) nothing, and deletes those shards.

    So it does if every row to use is malformed.
    """
    empty = Funnel(plan.work.selection.kind)
    funnels = {job.name: Funnel.from_json(plan.done[job.name]["funnel"]) for job in plan.shards}
    whole = functools.reduce(_merged, funnels.values(), empty)
    _check_any_left(out, plan)
    missing = {reason: whole.no_draft[reason] for reason in _NO_TEXT if whole.no_draft[reason]}
    lost, tried = sum(missing.values()), whole.attempts
    if lost and (lost == tried or (tried >= MIN_REPLIES and lost > plan.work.max_without_text * tried)):
        for job in plan.shards:
            if any(funnels[job.name].no_draft[reason] for reason in _NO_TEXT):
                out.remove(job.record)
        raise ValueError(nothing_written(model, missing, tried))
    return whole


def _check_any_left(out: OutputFolder, plan: SynthesisPlan) -> None:
    """Raises ValueError, and forgets the shards, so that files can be mended, if every row to use is malformed."""
    malformed, rows = (sum(plan.done[job.name][name] for job in plan.shards) for name in ("malformed", "rows"))
    try:
        plan.work.selection.limit.check_any_left((job.path for job in plan.shards), malformed, rows + malformed)
    except ValueError:
        for job in plan.shards:
            out.remove(job.record)
        raise


def _merged(one: Funnel, other: Funnel) -> Funnel:
    one.merge(other)
    return one


def publish(out: OutputFolder, plan: SynthesisPlan, duplicates: NearDuplicates) -> dict[str, dict[str, Any]]:
    """Writes each shard's rows without duplicates where tasks find them; returns rows, bytes and SHA-256 by file."""
    if plan.work.notes is not None:
        return publishing.publish(out, plan, lambda job: _passed(out, plan, job, duplicates.of(job)))
    files = {}
    for job in Bar(plan.shards, unit="file", desc="publishing", disable=None):
        name = job.name + columns.suffix(job.path)
        without = duplicates.of(job)
        rows = plan.done[job.name]["passed"] - len(without)
        if rows:
            files[name] = {"rows": rows} | _publish(out, job, name, without)
        else:
            out.remove(name)
    return files


def _passed(out: OutputFolder, plan: SynthesisPlan, job: ShardJob, without: set[int]) -> list[Mapping[str, Any]]:
    """The passed rows of a shard of notes."""
    if not plan.done[job.name]["passed"]:
        return []
    with out.staging() as staging:
        path = os.path.join(staging, "passed")
        with out.open(output_names(job)["passed"]) as file, open(path, "wb") as target:
            shutil.copyfileobj(file, target, 8 << 20)
        rows = list(columns.read_rows(path, columns.JSON_LINES))
    return [row for index, row in enumerate(rows) if index not in without]


def _publish(out: OutputFolder, job: ShardJob, name: str, without: set[int]) -> dict[str, Any]:
    kind = columns.suffix(job.path)
    with out.staging() as staging:
        path, kept = os.path.join(staging, "passed"), os.path.join(staging, "kept")
        with out.open(output_names(job)["passed"]) as file, open(path, "wb") as target:
            shutil.copyfileobj(file, target, 8 << 20)
        if not without:
            return out.publish(path, name)
        with columns.RowFile(kept, kind) as target:
            for index, row in enumerate(columns.read_rows(path, kind)):
                if index not in without:
                    target.add(row)
        return out.publish(kept, name)


def pairs(out: OutputFolder, plan: SynthesisPlan, duplicates: NearDuplicates) -> list[dict[str, Any]]:
    """Pairs of source and text for review: the published ones with the smallest hashes."""

    def kept() -> Iterator[tuple[int, str, dict[str, Any]]]:
        for job in plan.shards if plan.work.pairs else ():
            if plan.done[job.name]["passed"]:
                facts = read_facts(out, job)
                gone = {facts["rows"][index][0] for index in duplicates.of(job)}
                yield from ((rank, pair["id"], pair) for rank, pair in facts["pairs"] if pair["id"] not in gone)

    return [pair for _, _, pair in heapq.nsmallest(plan.work.pairs, kept(), key=lambda one: one[:2])]


def make_manifest(
    out: OutputFolder,
    plan: SynthesisPlan,
    model: str,
    funnel: Funnel,
    files: Mapping[str, Any],
    speed: Mapping[str, Any],
) -> dict[str, Any]:
    """Makes the manifest that completes the folder. Raises ValueError if counts don't agree."""
    records = [plan.done[job.name] for job in plan.shards]
    totals = {name: sum(record[name] for record in records) for name in _TOTALS}
    totals["documents"] = sum(num_documents(record) for record in records)
    totals["near_duplicates"] = funnel.near_duplicates
    is_of_notes = plan.work.notes is not None
    totals["published"] = sum(facts["notes" if is_of_notes else "rows"] for facts in files.values())
    totals["left_out"] = _sums(record["left_out"] for record in records)
    totals["spent"] = _sums(record["spent"] for record in records)
    agree = (
        totals["rows"] == totals["passed"] + totals["rejected"] == funnel.documents,
        totals["passed"] == totals["published"] + totals["near_duplicates"],
    )
    if not all(agree):
        raise ValueError(f"{out.root}: the records of the shards don't agree ({totals}): remove the folder, run again")
    return {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "settings": {name: value for name, value in plan.settings.items() if name != "input"},
        "input": list(plan.inputs),
        "folders_left_out": dict(plan.folders_left_out),
        "score_columns": _sums(record["score_columns"] for record in records),
        "model": model,
        "totals": totals,
        "funnel": funnel.to_json(),
        "files": {} if is_of_notes else dict(files),  # of documents
        **({"annotations": publishing.described(files)} if is_of_notes else {}),
        "shards": [job.summary(plan.done[job.name], _OF_SHARDS) for job in plan.shards],
        "speed": dict(speed),
    }


def num_documents(record: Mapping[str, Any]) -> int:
    """Source documents of a shard; it has a row a text, so with notes perhaps several of one document."""
    return record.get("documents", record["rows"])


def _sums(several: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for values in several:
        for name, amount in values.items():
            found[name] = found.get(name, 0) + amount
    return dict(sorted(found.items()))


def check_whole(out: OutputFolder, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError if a file of a finished run differs from the manifest."""
    listed = manifest["files"] | manifest.get("annotations", {}).get("files", {})
    folders = {os.path.dirname(name) for name in listed}
    sizes = {os.path.join(folder, file): size for folder in folders for file, size in out.sizes(folder).items()}
    for name, facts in listed.items():
        if sizes.get(name) != facts["bytes"]:
            raise ValueError(
                f"{out.path(name)}: {sizes.get(name, 'no')} bytes, {MANIFEST_NAME} says {facts['bytes']}: remove "
                "the folder and run again"
            )


def clean_up(out: OutputFolder, plan: SynthesisPlan) -> None:
    """Removes the files that only an unfinished run needs: journals, staged rows, records."""
    for job in plan.shards:
        journal.forget(out, job.name)
    cards.forget(out)
    for folder in (PASSED, PROGRESS, census.FOLDER, journal.FOLDER, RECORDS):
        out.remove_folder(folder)
