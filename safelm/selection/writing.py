"""The second pass: copies the chosen rows of a shard as they stand in the file, or lists them.

Parquet gives Parquet with all its columns and their types, JSON lines give JSON lines (gzip) with the same bytes.
Annotations are written with their rows, which have other numbers now. With `index_only` a shard's rows are listed:
file, row number, tokens, mark; no text is read.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from safelm import documents
from safelm.documents.annotations import AnnotationFolder, FileAnnotations
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring import json_rows, parquet_rows
from safelm.safety.scoring.columns import Columns
from safelm.selection import choosing, reading

RECORDS, INDEX = "_written", "rows"
_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class WriteWork:
    """What workers need to write shards (see `safelm.jobs.beam_jobs.Work`).

    Attributes:
      mark_column: the column that says which rows are marked; "" adds none.
      annotations: folders whose columns are added.
    """

    output: str
    mark_column: str
    index_only: bool
    annotations: tuple[AnnotationFolder, ...] = ()

    def load(self) -> None:
        """Writing needs nothing."""

    def run(self, job: ShardJob, loaded: None) -> None:
        """Writes a shard; its record is written last."""
        out = OutputFolder(self.output)
        with out.at_work():
            out.write_json(record_name(job), write_shard(job, self, out))

    def failed(self, job: ShardJob, message: str) -> None:
        """Leaves the message, which names the file, where the calling process finds it."""
        named = message if job.path in message else f"{job.path}: {message}"
        OutputFolder(self.output).record_failure(job.name, named)


def record_name(job: ShardJob) -> str:
    """The record of a shard that is written, relative to the output."""
    return f"{RECORDS}/{job.name}.json"


def output_name(job: ShardJob, index_only: bool) -> str:
    """A shard's file of chosen rows, relative to the output."""
    if index_only:
        return f"{INDEX}/{job.name}{documents.PARQUET}"
    return job.name + (documents.PARQUET if job.path.endswith(documents.PARQUET) else json_rows.SUFFIX)


def write_shard(job: ShardJob, work: WriteWork, out: OutputFolder) -> dict[str, Any]:
    """Writes one shard; its record. Raises ValueError where the file lacks rows that the first pass saw."""
    started = time.monotonic()
    with out.open(f"{choosing.FOLDER}/{job.name}.npz") as file, np.load(file) as arrays:
        chosen = {name: arrays[name] for name in arrays.files}
    rows, name = len(chosen["row"]), output_name(job, work.index_only)
    files = {}
    if rows:
        with out.staging() as staging:
            path = os.path.join(staging, "rows")
            if work.index_only:
                _write_index(job, path, chosen)
            else:
                written = _copy(job, work, path, chosen)
                if written != rows:
                    raise ValueError(f"{job.path}: {written} of {rows} chosen rows are there: it has changed")
            files[name] = {"rows": rows} | out.publish(path, name)
    tokens = int(chosen["tokens"].sum())
    return {"files": files, "rows": rows, "tokens": tokens, "seconds": round(time.monotonic() - started, 3)}


def _copy(job: ShardJob, work: WriteWork, path: str, chosen: Mapping[str, np.ndarray]) -> int:
    """Copies the chosen rows into a new file; how many were found."""
    added = {work.mark_column: "bool"} if work.mark_column else {}
    marks = [{work.mark_column: mark} if added else {} for mark in chosen["is_marked"].tolist()]
    with contextlib.ExitStack() as files:
        joined = FileAnnotations(job.path, work.annotations, files)
        _check_free("--annotations", joined.names, added)
        if job.path.endswith(documents.PARQUET):
            with documents.open_parquet(job.path) as table:
                schema, codec = table.schema_arrow, documents.codec_of(job.path)
            _check_free(job.path, schema.names, added)
            joined.check_free(documents.field_names(schema))
            schema = parquet_rows.with_columns(schema, dict(joined.types()))
            sink: Any = parquet_rows.Sink(path, parquet_rows.with_columns(schema, added), codec, Columns(added, {}))
            payloads = _parquet_payloads(job, chosen["row"], joined)
        else:
            sink, payloads = json_rows.Sink(path), _json_payloads(job, chosen["row"], added, joined)
        try:
            for some, values in payloads:
                own = marks[sink.rows : sink.rows + len(some)]
                sink.write(some, [mark | more for mark, more in zip(own, values, strict=True)])
        finally:
            sink.close()
    return sink.rows


def _parquet_payloads(
    job: ShardJob, row_M: np.ndarray, joined: FileAnnotations
) -> Iterator[tuple[list[parquet_rows.Payload], list[dict[str, Any]]]]:
    import pyarrow

    for first, batch in reading.batches(job):
        start, stop = np.searchsorted(row_M, [first, first + batch.num_rows]).tolist()
        if start < stop:
            offsets = (row_M[start:stop] - first).tolist()
            if joined.names:
                more = joined.batches(range(first, first + batch.num_rows))
                batch = pyarrow.RecordBatch.from_arrays(
                    [*batch.columns, *(array for _, array in more)], names=[*batch.schema.names, *joined.names]
                )
            yield [(batch, offset) for offset in offsets], [{} for _ in offsets]


def _json_payloads(
    job: ShardJob, row_M: np.ndarray, added: Mapping[str, str], joined: FileAnnotations
) -> Iterator[tuple[list[bytes], list[dict[str, Any]]]]:
    wanted = set(row_M.tolist())
    waiting: list[bytes] = []
    values: list[dict[str, Any]] = []
    for number, line in reading.lines(job):
        if number in wanted:
            row = documents.parse_object(line) if added or joined.names else {}
            _check_free(f"{job.path}: row {number}", row, added)
            both = joined.join(number, row) if joined.names else {}
            waiting.append(line)
            values.append({name: both[name] for name in joined.names})
        if len(waiting) == _AT_ONCE:
            yield waiting, values
            waiting, values = [], []
    if waiting:
        yield waiting, values


def _check_free(place: str, names: Any, added: Mapping[str, str]) -> None:
    for name in added:
        if name in names:
            raise ValueError(f"{place}: it already has a column {name!r}: choose another --mark_column")


def _write_index(job: ShardJob, path: str, chosen: Mapping[str, np.ndarray]) -> None:
    import pyarrow.parquet

    files = pyarrow.array([job.path] * len(chosen["row"])).dictionary_encode()
    columns = {"file": files, "row": chosen["row"], "tokens": chosen["tokens"], "is_marked": chosen["is_marked"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
