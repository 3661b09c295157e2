"""Publishes the notes of a run as annotations: a small Parquet file beside each input file, with all of its rows."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from safelm import documents
from safelm.documents import annotations, notes
from safelm.io.progress import Bar
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis import columns
from safelm.safety.synthesis.kinds import Draft
from safelm.safety.synthesis.notes.constitution import cited
from safelm.safety.synthesis.notes.room import note_tokens
from safelm.text.tokenizer import Tokenizer

_GROUP_ROWS = 1 << 16


def note_row(draft: Draft, row: int) -> dict[str, Any]:
    """What a shard keeps of a note that passed, for the row with this number of its file."""
    voices, pause = draft.voices, draft.source.pause
    if voices is None or pause is None:
        raise ValueError(f"draft of {draft.source.id}: no note with a place")
    note = {
        "position": pause.position,
        "kind": draft.kind,
        "token_index": pause.token_index,
        "vocab_hash": pause.vocab_hash,
        "first_person": voices.first_person,
        "third_person": voices.third_person,
        "verdict": voices.verdict,
        "category": draft.category,
        "sections": cited(draft.text),
    }
    return {"id": columns.row_id(draft.source, draft.kind), "row": row, "note": note}


def publish(
    out: OutputFolder, plan: Any, passed: Callable[[ShardJob], Iterable[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Writes the annotations of every input file; rows, notes, their most tokens in a row, bytes and SHA-256 by name.

    Args:
      plan: a `SynthesisPlan`.
      passed: the rows of `note_row` of a shard that are published.

    Raises ValueError for an input that was changed since.
    """
    jobs: dict[str, list[ShardJob]] = {}
    for job in plan.shards:
        jobs.setdefault(job.path, []).append(job)
    files, tokenizer = {}, Tokenizer.from_pretrained(plan.work.notes.tokenizer)
    named = list(zip(jobs, annotations.names(list(jobs)), strict=True))
    for path, name in Bar(named, unit="file", desc="publishing", disable=None):
        found: dict[int, list[dict[str, Any]]] = {}
        for job in jobs[path]:
            for row in passed(job):
                found.setdefault(row["row"], []).append(row["note"])
        with out.staging() as staging:
            target = os.path.join(staging, "notes")
            rows = _write(path, plan.work.selection.text_column, found, target, plan.settings["notes"])
            facts = {"rows": rows, "notes": sum(map(len, found.values()))}
            facts["note_tokens"] = note_tokens([[_note(each) for each in some] for some in found.values()], tokenizer)
            files[name] = facts | out.publish(target, name)
    return files


def described(files: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of the annotations."""
    most = max((facts["note_tokens"] for facts in files.values()), default=0)
    return {"files": dict(files), "columns": [notes.COLUMN], "offsets": "characters", "note_tokens": most}


def _note(values: Mapping[str, Any]) -> notes.Note:
    return notes.Note(**values | {"sections": tuple(values["sections"])})


def _write(path: str, text_column: str, found: Mapping[int, Any], target: str, settings: Mapping[str, Any]) -> int:
    """Writes one file of annotations; the number of its rows. Every row of the input has one, perhaps without notes."""
    import pyarrow
    import pyarrow.parquet

    facts = annotations.input_facts(documents.file_at(path))
    told = json.dumps({"input": facts, "offsets": "characters", **settings}, sort_keys=True)
    fields = [(annotations.ROW, pyarrow.int64()), (notes.COLUMN, notes.arrow_type())]
    schema = pyarrow.schema(fields, metadata={annotations.METADATA: told})
    numbers: list[int] = []

    def malformed(row: documents.Malformed) -> None:
        numbers.append(row.row)

    for row in documents.iter_rows(path, malformed, text_column=text_column, columns=()):
        numbers.append(row.number)
    if missing := found.keys() - set(numbers):
        raise ValueError(
            f"{path}: row {min(missing)} has a note and is no longer there: run again with another --output"
        )
    with pyarrow.parquet.ParquetWriter(target, schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(numbers), _GROUP_ROWS):
            some = [{annotations.ROW: n, notes.COLUMN: found.get(n, [])} for n in numbers[start : start + _GROUP_ROWS]]
            writer.write_table(pyarrow.Table.from_pylist(some, schema))
    return len(numbers)
