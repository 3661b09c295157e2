"""Joins annotations to a corpus by row: its rows as they were, with the columns of every folder of annotations.

Parquet stays in Arrow and stays Parquet: large_string, string_view, dictionary, null and nested columns come out as
they went in. JSON lines keep their bytes, with the new fields before the closing brace, as .jsonl.gz; a line that is no
object is kept (bytes that aren't UTF-8 as `\\xNN`). Files keep their names.
"""

import contextlib
import dataclasses
import gzip
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from safelm import documents
from safelm.documents import MANIFEST_NAME, SETTINGS_NAME, WRITTEN_BY, DocumentFile, Malformed, annotations
from safelm.documents.annotations import AnnotationFolder, FileAnnotations
from safelm.jobs.file_shards import ShardJob, check_settings, done_records, shard_name, side_by_side
from safelm.jobs.output import OutputFolder

COMMAND = "safelm.annotate"
FORMAT = 1
_GROUP_BYTES = 32 << 20
_CHECKED_ROWS = 1 << 16
_JSON = ".jsonl.gz"
_FLAGS = {
    "input": "--input",
    "annotations": "--annotations",
    "unit": "--unit",
    "min_score": "--min_score",
    "scorers": "--scorers",
    "token_classifier": "--token_classifier",
    "lexicon": "--lexicon",
    "own": "--spans",
    "text_column": "--text_column",
}


@dataclasses.dataclass(frozen=True)
class JoinJob(ShardJob):
    """An input file and the name of the joined one."""

    target: str = ""


@dataclasses.dataclass(frozen=True)
class JoinWork:
    """What workers need to join files (see `safelm.jobs.beam_jobs.Work`); without an output they only check."""

    output: str
    folders: tuple[AnnotationFolder, ...]

    def load(self) -> None:
        """Loads nothing."""

    def run(self, job: JoinJob, loaded: None) -> None:
        """Joins one file; its done-record is written last."""
        out = OutputFolder(self.output)
        with out.at_work(), out.staging() as staging:
            path = os.path.join(staging, "joined")
            rows = join_file(job.path, self.folders, path)
            out.write_json(
                job.record, {"rows": rows, "files": {job.target: {"rows": rows} | out.publish(path, job.target)}}
            )

    def failed(self, job: JoinJob, message: str) -> None:
        """Leaves the message where the calling process finds it."""
        OutputFolder(self.output).record_failure(job.name, message)

    def settings(self, files: Sequence[DocumentFile]) -> dict[str, Any]:
        """What a folder that was begun can't change: the annotations."""
        return {"annotations": side_by_side(lambda file: annotations.versions(file.path, self.folders), files)}

    def target(self, name: str, path: str) -> str:
        """The file for an input, from the name of its annotations."""
        end = documents.PARQUET if path.endswith(documents.PARQUET) else _JSON
        return name.removesuffix(documents.PARQUET) + end

    def manifest(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the manifest says of the whole, from the records of its files."""
        return {
            "annotations": [dataclasses.asdict(folder) for folder in self.folders],
            "totals": {"rows": sum(record["rows"] for record in records)},
            "files": {name: facts for record in records for name, facts in record["files"].items()},
        }


@runtime_checkable
class FileWork(Protocol):
    """Work by whole files into a folder: what `make_plan` and `finish` ask of it."""

    def settings(self, files: Sequence[DocumentFile]) -> dict[str, Any]: ...

    def target(self, name: str, path: str) -> str: ...

    def manifest(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]: ...


@dataclasses.dataclass
class JoinPlan:
    """Every file, and those that are left to join."""

    shards: Sequence[JoinJob]
    jobs: Sequence[JoinJob]


def make_plan(out: OutputFolder, work: FileWork, files: Sequence[DocumentFile]) -> JoinPlan:
    """Compares with what is in the folder and lists what is left.

    Raises ValueError where the folder was begun with another input or other settings.
    """
    settings = {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "input": side_by_side(lambda file: documents.without_place(documents.describe(file)), files),
        **work.settings(files),
    }
    check_settings(out, settings, _FLAGS)
    shards = []
    for index, (file, name) in enumerate(zip(files, annotations.names([file.path for file in files]), strict=True)):
        shards.append(JoinJob(index, shard_name(index, file.path), file.path, None, work.target(name, file.path)))
    out.write_json(SETTINGS_NAME, settings)
    out.clear_failures()
    done = done_shards(out, shards)
    jobs = sorted((job for job in shards if job.name not in done), key=lambda job: -files[job.index].bytes)
    if jobs:
        out.remove(MANIFEST_NAME)
    return JoinPlan(shards, jobs)


def done_shards(out: OutputFolder, shards: Sequence[JoinJob]) -> dict[str, Mapping[str, Any]]:
    """Records of the files that are joined."""
    return done_records(out, shards, {os.path.dirname(job.target) for job in shards})


def finish(out: OutputFolder, plan: JoinPlan, work: FileWork) -> dict[str, Any]:
    """Writes the manifest. Raises ValueError where a file is not done."""
    done = done_shards(out, plan.shards)
    if missing := [job.path for job in plan.shards if job.name not in done]:
        raise ValueError(f"{out.root}: {len(missing)} files are not done, the first is {missing[0]}: run again")
    records = [done[job.name] for job in plan.shards]
    manifest = {WRITTEN_BY: COMMAND, "format": FORMAT, **work.manifest(records)}
    out.write_json(MANIFEST_NAME, manifest)
    return manifest


def join_file(path: str, folders: Sequence[AnnotationFolder], target: str | None) -> int:
    """Writes the rows of a file with their annotations to the local file `target`; the number of rows.

    With None nothing is written: it is only checked that every row has its annotations and no other is there.

    Raises ValueError naming file and row where an annotation is missing or too many, and as reading does.
    """
    with contextlib.ExitStack() as files:
        joined = FileAnnotations(path, folders, files)
        join = _join_parquet if path.endswith(documents.PARQUET) else _join_json
        rows = join(path, joined, target, files)
        joined.check_rows(rows)
    return rows


def _join_parquet(path: str, joined: FileAnnotations, target: str | None, files: contextlib.ExitStack) -> int:
    import pyarrow
    import pyarrow.parquet

    with documents.open_parquet(path) as table:
        schema, facts, is_empty = table.schema_arrow, table.metadata, documents.has_no_columns(table)
        codec = facts.row_group(0).column(0).compression.lower() if facts.num_row_groups and not is_empty else "snappy"
    joined.check_free(documents.field_names(schema))
    if target is None:
        for start in range(1, facts.num_rows + 1, _CHECKED_ROWS):
            joined.batches(range(start, min(start + _CHECKED_ROWS, facts.num_rows + 1)))
        return facts.num_rows
    if is_empty:  # and stays a file that every reader takes for one without rows
        open(target, "wb").close()
        return 0
    for name, kind in joined.types():
        schema = schema.append(pyarrow.field(name, kind))
    codec = {"uncompressed": "none", "lz4_raw": "lz4"}.get(codec, codec)
    writer = files.enter_context(pyarrow.parquet.ParquetWriter(target, schema, compression=codec))
    pending: list[Any] = []
    rows = held = 0
    for first, batch in documents.iter_parquet(path, None, text_column=None):
        added = joined.batches(range(first, first + batch.num_rows))
        pending.append(pyarrow.RecordBatch.from_arrays([*batch.columns, *(array for _, array in added)], schema=schema))
        rows, held = rows + batch.num_rows, held + batch.nbytes
        if held >= _GROUP_BYTES:
            _write(writer, pending, schema)
            pending, held = [], 0
    _write(writer, pending, schema)
    return rows


def _write(writer: Any, batches: Sequence[Any], schema: Any) -> None:
    import pyarrow

    if batches:
        table = pyarrow.Table.from_batches(batches, schema)
        writer.write_table(table, row_group_size=max(1, table.num_rows))


def _join_json(path: str, joined: FileAnnotations, target: str | None, files: contextlib.ExitStack) -> int:
    rows = 0
    sink: Any = None
    if target is not None:
        sink = files.enter_context(gzip.GzipFile("", "wb", 6, files.enter_context(open(target, "wb")), mtime=0))

    def keep(malformed: Malformed) -> None:
        nonlocal rows
        rows += 1
        if sink is not None:
            if malformed.reason.startswith("longer"):
                raise ValueError(f"{path}: row {malformed.row} can't be kept, {malformed.reason}")
            sink.write(malformed.raw.encode() + b"\n")

    for row in documents.iter_json(path, keep, text_column=None):
        added = joined.join(row.number, row.row)
        rows += 1
        if sink is not None:
            fields = {name: added[name] for name in joined.names}
            separator = b", " if row.row else b""
            sink.write(row.raw[:-1].rstrip() + separator + json.dumps(fields).encode()[1:] + b"\n")
    return rows
