"""Annotates a shard: every row of it gets its scores in a small Parquet file, and no text is copied.

id             the row's own, as it is: repeated, null, never a key
row            its number in the file, from 1
harm_score     int8, 0 to 5: the largest of the scorers'; null where none gave a score
score_NAME     int8, of the scorer NAME
NAME_DETAIL    float32 or int32: what else the scorer says in numbers, such as its probabilities
flags          "" or, by comma: `empty` (0 by rule), `unscored` (no usable answer), `malformed` (no text), `cut` (scored
               by its beginning, see --max_chunks)

A text that comes again is not asked for again, as long as no more than REMEMBERED other texts stand between.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from safelm import documents
from safelm.documents import Malformed, RowTally, annotations
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.ensemble import Agreement, Ensemble
from safelm.safety.scorer import Verdict
from safelm.safety.scoring import annotation_rows, shard
from safelm.safety.scoring.columns import EMPTY, Columns
from safelm.safety.scoring.shard import LoadedScorers, ScoreWork

MAX_CHUNKS = 512
REMEMBERED = 1 << 19  # texts of a shard
PARTS = "_parts"  # the folder for parts of a file until there are all
FLAGS = ("", "empty", "unscored", "malformed")
_CUT = "cut"
_FLUSH_ROWS = 1 << 16  # pending rows, of which many may be repetitions
_GROUP_ROWS = 1 << 18
_DIGEST_BYTES = 16


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
        answers = _Answers(work.columns, loaded, malformed)
        blocks = annotation_rows.read(job.path, job.part, work.text_column, work.id_column, work.max_chunks, malformed)
        for pending in answers.answered(blocks):
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


class _Answers:
    """What the scorers say of the rows of a shard, as a matrix; of repeated texts what they said before.

    Attributes:
      asked: texts that scorers were asked about. bytes: of all texts, as far as they are scored.
    """

    def __init__(self, columns: Columns, loaded: LoadedScorers, on_malformed: annotation_rows.OnMalformed):
        self.asked = self.bytes = 0
        self._on_malformed = on_malformed
        self.agreement = Agreement(loaded.ensemble.names)
        self._columns, self._loaded = columns, loaded
        self._names = numeric(columns)
        self._slots: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._next = 0
        self._value_SC = np.full((1024, 1 + len(self._names)), np.nan)
        self._pending: list[tuple[annotation_rows.Block, list[int]]] = []
        self._texts: list[tuple[str, int]] = []  # of the pending rows, those to be asked about, and their slots
        self._pending_rows = self._pending_characters = 0

    def answered(
        self, blocks: Iterator[annotation_rows.Block]
    ) -> Iterator[tuple[annotation_rows.Block, Float64[np.ndarray, "N C"]]]:
        """Each block with a row of values for every row of it: which of FLAGS, then the columns; NaN for null."""
        for block in blocks:
            self._take(block)
            if (
                len(self._texts) >= shard.BATCH_ROWS
                or self._pending_characters >= shard.BATCH_CHARACTERS
                or self._pending_rows >= _FLUSH_ROWS
            ):
                yield from self._flush()
        yield from self._flush()

    def _take(self, block: annotation_rows.Block) -> None:
        slots, known = [], self._slots
        blake2b = hashlib.blake2b
        for offset, text in enumerate(block.texts):
            key = b"" if text is None else blake2b(text, digest_size=_DIGEST_BYTES).digest()
            slot = known.get(key)
            if slot is None:
                slot = self._new_slot(key)
                self._first_seen(text, slot)
            if text is not None and self._value_SC[slot, 0] == _MALFORMED:
                self._on_malformed(Malformed(int(block.row_N[offset]), "not UTF-8", ""))
            slots.append(slot)
        self.bytes += sum(map(len, filter(None, block.texts)))
        self._pending.append((block, slots))
        self._pending_rows += len(slots)

    def _first_seen(self, text: bytes | None, slot: int) -> None:
        self._value_SC[slot] = np.nan
        if text is None:
            self._value_SC[slot, 0] = _MALFORMED
            return
        try:
            decoded = text.decode()
        except UnicodeDecodeError:
            self._value_SC[slot, 0] = _MALFORMED
            return
        if not decoded.strip():
            self._value_SC[slot] = [_EMPTY, *self._row(EMPTY, {})]
            return
        self._texts.append((decoded, slot))
        self._pending_characters += len(decoded)

    def _new_slot(self, key: bytes) -> int:
        """A place for the values of a text; beyond REMEMBERED that of the one that came first."""
        slot = self._next % REMEMBERED
        if self._next >= REMEMBERED:
            self._slots.pop(self._keys[slot], None)
            self._keys[slot] = key
        else:
            self._keys.append(key)
            if slot == len(self._value_SC):
                grown = np.full((min(REMEMBERED, 2 * slot), self._value_SC.shape[1]), np.nan)
                grown[:slot] = self._value_SC
                self._value_SC = grown
        self._slots[key] = slot
        self._next += 1
        return slot

    def _flush(self) -> Iterator[tuple[annotation_rows.Block, Float64[np.ndarray, "N C"]]]:
        for batch in shard.batches(iter(self._texts)):
            self._ask([text for text, _ in batch], [slot for _, slot in batch])
        for block, slots in self._pending:
            yield block, self._value_SC[np.array(slots, np.int64)]
        self._pending, self._texts, self._pending_rows, self._pending_characters = [], [], 0, 0

    def _ask(self, texts: Sequence[str], slots: Sequence[int]) -> None:
        ensemble: Ensemble = self._loaded.ensemble
        rows = []
        for verdicts in self._loaded.ask(texts):
            given = list(verdicts.values())
            self.agreement.add(given)
            decision = ensemble.combine(given)
            rows.append([_UNSCORED if decision.score is None else 0, *self._row(decision, verdicts)])
        self._value_SC[np.array(slots, np.int64)] = np.array(rows, np.float64)
        self.asked += len(texts)

    def _row(self, decision: Verdict, verdicts: Mapping[str, Verdict]) -> list[float | int]:
        values = self._columns.values(decision, verdicts)
        return [np.nan if values[name] is None else values[name] for name in self._names]


_EMPTY, _UNSCORED, _MALFORMED = (FLAGS.index(name) for name in ("empty", "unscored", "malformed"))


def numeric(columns: Columns) -> dict[str, str]:
    """The columns of annotations by name, with their Arrow types: of a scorer's columns those that are numbers."""
    kinds = {name: kind for name, kind in columns.types.items() if kind in ("int64", "float64")}
    scores = {"harm_score", *(f"score_{name}" for name in columns.details)}
    return {
        name: "int8" if name in scores else {"int64": "int32", "float64": "float32"}[kind]
        for name, kind in kinds.items()
    }


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
