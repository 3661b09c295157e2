"""Reads the rows of a shard: as values, for the first pass, and as they stand in the file, for the second."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm import documents
from safelm.documents import OnMalformed, Part, harm
from safelm.documents.annotations import AnnotationFolder, FileAnnotations
from safelm.jobs.file_shards import ShardJob


def values(
    job: ShardJob,
    text_column: str | None,
    columns: Sequence[str],
    required: Mapping[str, Sequence[str]],
    on_malformed: OnMalformed,
    annotated: Sequence[AnnotationFolder] = (),
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(row number in the file, values) of a shard.

    Args:
      text_column: the column that must hold a text; None reads none.
      columns: those to read of Parquet, where it has them, beside those of `harm.text_harm_score`.
      required: name -> columns of which the file or its annotations must have one.
      annotated: folders of annotations, of which those of `columns` that they have are joined to each row.

    Raises ValueError or OSError naming the file where it is damaged or lacks a column, or annotations that don't fit.
    """
    if annotated:
        with contextlib.ExitStack() as files:
            joined = FileAnnotations(job.path, annotated, files, wanted=columns)
            for number, row in values(job, text_column, columns, joined.required(required), on_malformed):
                yield number, joined.join(number, row)
        return
    if not job.path.endswith(documents.PARQUET):
        number_in_file, report = _numbers(job.path, job.part, on_malformed)
        for row in documents.iter_json(
            job.path, report, text_column=text_column, part=job.part, required=dict(required)
        ):
            yield number_in_file(row.number), row.row
        return

    def choose(table: Any) -> list[str]:
        names = documents.field_names(table.schema_arrow)
        for name, any_of in required.items():
            if not any(column in names for column in any_of):
                raise documents.missing_column(job.path, name, names, any_of)
        wanted = [*([text_column] if text_column else []), *columns, *harm.text_score_columns(names)]
        return [name for name in dict.fromkeys(wanted) if name in names]

    for first, batch in documents.iter_parquet(job.path, choose, text_column=text_column, groups=job.part):
        yield from documents.batch_rows(first, batch, text_column, on_malformed)


def lines(job: ShardJob) -> Iterator[tuple[int, bytes]]:
    """(row number in the file, the bytes of its line) of a shard of JSON lines."""
    number_in_file, report = _numbers(job.path, job.part, _ignore)
    for row in documents.iter_json(job.path, report, text_column=None, part=job.part):
        yield number_in_file(row.number), row.raw


def batches(job: ShardJob) -> Iterator[tuple[int, Any]]:
    """(number of the first row, record batch) of a shard of Parquet, with all its columns."""
    return documents.iter_parquet(job.path, None, text_column=None, groups=job.part)


def _numbers(path: str, part: Part | None, on_malformed: OnMalformed) -> tuple[Any, OnMalformed]:
    """From numbers of lines in a part to those in the file, and `on_malformed` with these."""

    @functools.cache
    def before() -> int:
        return documents.lines_before(path, part.start) if part is not None and part.start else 0

    def report(malformed: documents.Malformed) -> None:
        on_malformed(dataclasses.replace(malformed, row=before() + malformed.row))

    return (lambda number: before() + number), report


def _ignore(malformed: documents.Malformed) -> None:
    """Rows that the first pass has counted."""
