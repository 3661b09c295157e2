"""Annotates a shard: every row of it gets its scores in a small Parquet file, and no text is copied.

id             the row's own, as it is: repeated, null, never a key
row            its number in the file, from 1
harm_score     int8, 0 to 5: the largest of the scorers'; null where none gave a score
score_NAME     int8, of the scorer NAME
NAME_DETAIL    float32 or int32: what else the scorer says in numbers, such as its probabilities
flags          "" or, by comma: `empty` (0 by rule), `unscored` (no usable answer), `malformed` (no text), `cut` (scored
               by its beginning, see --max_chunks)

A text that comes again is not asked about again (`answers`).
"""

import contextlib
import dataclasses
import json
import os
import time
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from safelm import documents
from safelm.documents import Malformed, RowTally, annotations
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring import annotation_rows, shard
from safelm.safety.scoring.answers import FLAGS, Answers, numeric
from safelm.safety.scoring.shard import LoadedScorers, ScoreWork

MAX_CHUNKS = 512
PARTS = "_parts"  # the folder for parts of a file until there are all
_CUT = "cut"
_GROUP_ROWS = 1 << 18


@dataclasses.dataclass(frozen=True)
class AnnotateJob(ShardJob):
    """A shard, the file that annotates all of its input file, and what tells the input (`annotations.input_facts`)."""

    target: str = ""
    bytes: int = 0
    sha256: str = ""

    @property
    def output(self) -> str:
        """The file that the shard's rows go to, relative to the output."""
        return self.target if self.part is None else f"{PARTS}/{self.name}{documents.PARQUET}"


@dataclasses.dataclass(frozen=True)
class AnnotateWork(ScoreWork):
    """What workers need to annotate shards (see `safelm.jobs.beam_jobs.Work`)."""

    max_chunks: int = MAX_CHUNKS

    def run(self, job: AnnotateJob, loaded: LoadedScorers) -> None:
        """Annotates a shard; its done-record is written last, and waits for no other."""
        loaded.raise_if_unreachable()
        out = OutputFolder(self.output)
        with out.at_work():
            out.write_json(job.record, annotate_shard(job, self, loaded, out))


def annotate_shard(job: AnnotateJob, work: AnnotateWork, loaded: LoadedScorers, out: OutputFolder) -> dict[str, Any]:
    """Annotates one shard and publishes its file; its record. Raises as reading does."""
    started = time.monotonic()
    _check_unchanged(job)
    tally, reasons = RowTally(job.path, work.limit), dict[str, int]()

    def malformed(row: Malformed) -> None:
        tally.add(row)
        reasons[row.reason] = reasons.get(row.reason, 0) + 1

    with out.staging() as staging, contextlib.ExitStack() as files:
        path = os.path.join(staging, "annotations")
        sink = files.enter_context(_Sink(path, work, job))
        answers = Answers(work.columns, loaded, malformed)
        blocks = annotation_rows.read(job.path, job.part, work.text_column, work.id_column, work.max_chunks, malformed)
        for pending in answers.rows(blocks):
            sink.write(*pending)
            tally.rows = sink.rows
            _write_count(staging, sink.rows)
        tally.rows = sink.rows
        tally.finish()
        files.close()
        facts = {"rows": sink.rows} | out.publish(path, job.output)
    return {
        "files": {job.output: facts},
        "rows": sink.rows,
        "scores": sink.scores,
        "flags": sink.flags,
        "malformed": dict(sorted(reasons.items())),
        "asked": answers.asked,
        "bytes": answers.bytes,
        "agreement": answers.agreement.to_json(),
        "seconds": round(time.monotonic() - started, 3),
    }


def _check_unchanged(job: AnnotateJob) -> None:
    found = annotations.input_facts(documents.file_at(job.path))
    if found != {"bytes": job.bytes, "sha256": job.sha256}:
        raise ValueError(f"{job.path}: it has changed since the run was planned; give the command again")


def _write_count(staging: str, rows: int) -> None:
    with open(os.path.join(staging, shard.COUNT), "w") as file:
        file.write(str(rows))


class _Sink:
    """The file of one shard; the same rows give the same bytes.

    Attributes:
      rows: written so far. scores: how many have each, "null" for none. flags: how many have each.
    """

    def __init__(self, path: str, work: AnnotateWork, job: AnnotateJob):
        import pyarrow
        import pyarrow.parquet

        self._kinds = numeric(work.columns)
        self.rows, self.flags = 0, dict[str, int]()
        self.scores = dict.fromkeys((*map(str, range(6)), "null"), 0)
        fields = {annotations.ID: "string", annotations.ROW: "int64"} | self._kinds | {"flags": "string"}
        told = {
            "input": {"bytes": job.bytes, "sha256": job.sha256},
            "scorers": [{"name": each.name, "fingerprint": each.fingerprint} for each in work.scorers],
            "max_chunks": work.max_chunks,
        }
        self._schema = pyarrow.schema(
            [pyarrow.field(name, pyarrow.type_for_alias(kind)) for name, kind in fields.items()],
            metadata={annotations.METADATA: json.dumps(told, sort_keys=True)},
        )
        numbers = [name for name, kind in fields.items() if kind == "int64"]
        self._writer = pyarrow.parquet.ParquetWriter(
            path,
            self._schema,
            compression="zstd",
            use_dictionary=[name for name, kind in fields.items() if kind in ("int8", "int32") or name == "flags"],
            column_encoding=dict.fromkeys(numbers, "DELTA_BINARY_PACKED"),
            write_page_checksum=True,
        )
        self._pending: list[Any] = []
        self._pending_rows = 0
        shown = [name or _CUT * cut if not (name and cut) else f"{name},{_CUT}" for cut in (0, 1) for name in FLAGS]
        self._shown = pyarrow.array(shown, pyarrow.string())

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def write(self, block: annotation_rows.Block, value_NC: Float64[np.ndarray, "N C"]) -> None:
        """Adds rows with their values: which of FLAGS, then the columns."""
        import pyarrow

        flag_N = value_NC[:, 0].astype(np.int64) + len(FLAGS) * block.is_cut_N
        columns = [block.ids, pyarrow.array(block.row_N)]
        for index, kind in enumerate(self._kinds.values(), start=1):
            columns.append(_array(value_NC[:, index], kind))
        columns.append(self._shown.take(pyarrow.array(flag_N)))
        self._pending.append(pyarrow.RecordBatch.from_arrays(columns, schema=self._schema))
        self._pending_rows += len(flag_N)
        self.rows += len(flag_N)
        self._count(flag_N, value_NC[:, 1])
        if self._pending_rows >= _GROUP_ROWS:
            self._flush()

    def _count(self, flag_N: Int[np.ndarray, " N"], score_N: Float64[np.ndarray, " N"]) -> None:
        is_null_N = np.isnan(score_N)
        count_6 = np.bincount(score_N[~is_null_N].astype(np.int64), minlength=6)
        for name, count in zip(self.scores, [*count_6.tolist(), int(is_null_N.sum())], strict=True):
            self.scores[name] += count
        for flag, count in enumerate(np.bincount(flag_N).tolist()):
            for name in filter(None, self._shown[flag].as_py().split(",")) if count else ():
                self.flags[name] = self.flags.get(name, 0) + count

    def _flush(self) -> None:
        import pyarrow

        if self._pending:
            table = pyarrow.Table.from_batches(self._pending, self._schema)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._pending, self._pending_rows = [], 0


def _array(value_N: Float64[np.ndarray, " N"], kind: str) -> Any:
    import pyarrow

    is_null_N = np.isnan(value_N)
    whole_N = np.where(is_null_N, 0, value_N).astype(kind)
    return pyarrow.array(whole_N, pyarrow.type_for_alias(kind), mask=is_null_N)
