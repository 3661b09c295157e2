"""What a scoring run has to do: its settings against those of the output folder, its shards, those that are done."""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from safelm.safety import documents
from safelm.safety.documents import DocumentFile, Part
from safelm.safety.scoring.columns import FOLDERS, QUARANTINE, check_free
from safelm.safety.scoring.output import OutputFolder
from safelm.safety.scoring.shard import RECORDS, ScoreWork, ShardJob, output_name

FORMAT = 1
SETTINGS_NAME, MANIFEST_NAME = "_settings.json", "manifest.json"
_AT_ONCE = 16
_ARGUMENTS = {
    "input": "--input",
    "scorers": "--scorers",
    "text_column": "--text_column",
    "id_column": "--id_column",
    "part_bytes": "--part_mb",
}

_T, _R = TypeVar("_T"), TypeVar("_R")


@dataclasses.dataclass
class ScorePlan:
    """A run: every shard, the records of those that are done, and the jobs for the others, large ones first."""

    work: ScoreWork
    settings: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    shards: Sequence[ShardJob]
    done: dict[str, Mapping[str, Any]]
    jobs: Sequence[ShardJob]


def check_input(path: str, work: ScoreWork, *, needs_id: bool) -> None:
    """Raises ValueError where a file lacks the text column (or the id's) or already has a column to be added."""
    rows = documents.read_rows(path, on_malformed=lambda malformed: None, text_column=work.text_column)
    for _, row in itertools.islice(rows, 1):
        check_free(path, row, work.columns)
        if needs_id and work.id_column not in row:
            raise documents.missing_column(path, work.id_column, row)


def make_plan(out: OutputFolder, work: ScoreWork, files: Sequence[DocumentFile], part_bytes: int) -> ScorePlan:
    """Compares with what is in the output folder, clears what no done shard has there, and lists the jobs.

    Raises ValueError where the folder holds, or was begun with, something else, naming the difference.
    """
    inputs = _side_by_side(documents.describe, files)
    settings = {
        "format": FORMAT,
        "input": [{"name": os.path.basename(i["path"])} | {k: v for k, v in i.items() if k != "path"} for i in inputs],
        "scorers": [{"name": spec.name, "fingerprint": spec.fingerprint} for spec in work.scorers],
        "columns": dict(work.columns.types),
        "text_column": work.text_column,
        "id_column": work.id_column,
        "part_bytes": part_bytes,
    }
    _check_settings(out, settings)
    parts = _side_by_side(lambda file: split(file, part_bytes), files)
    pieces = [(file, part) for file, found in zip(files, parts, strict=True) for part in found]
    owners = [(file, found) for file, found in zip(files, parts, strict=True) for _ in found]
    shards = [_job(index, file.path, part) for index, (file, part) in enumerate(pieces)]
    done = _done(out, shards)
    _clear(out, shards, done)
    sizes = {job.name: file.bytes / len(found) for job, (file, found) in zip(shards, owners, strict=True)}
    jobs = sorted((job for job in shards if job.name not in done), key=lambda job: -sizes[job.name])
    out.write_json(SETTINGS_NAME, settings)
    return ScorePlan(work, settings, inputs, shards, done, jobs)


def split(file: DocumentFile, part_bytes: int) -> list[Part | None]:
    """The parts of a file: bytes of plain JSON lines, row groups of Parquet; None for a file that is one shard."""
    if file.bytes <= part_bytes or not file.path.endswith((".jsonl", ".parquet")):
        return [None]
    if file.path.endswith(".jsonl"):
        count = -(-file.bytes // part_bytes)
        return [Part(at * part_bytes, min((at + 1) * part_bytes, file.bytes)) for at in range(count)]
    parts, start, size = [], 0, 0
    with documents.open_parquet(file.path) as table:
        groups = table.num_row_groups
        for group in range(groups):
            facts = table.metadata.row_group(group)
            grown = size + sum(facts.column(column).total_compressed_size for column in range(facts.num_columns))
            if group > start and grown > part_bytes:
                parts.append(Part(start, group))
                start, grown = group, grown - size
            size = grown
    return [*parts, Part(start, groups)] if parts else [None]


def _job(index: int, path: str, part: Part | None) -> ShardJob:
    stem = os.path.basename(path).removesuffix(documents.suffix(path))
    split = "validation" if stem.startswith("validation-") else "train"  # so that SeqIO tasks read the output as it is
    return ShardJob(index, f"{split}-{index:06d}-{re.sub(r'[^A-Za-z0-9._-]', '_', stem)[:80]}", path, part)


def refresh(out: OutputFolder, plan: ScorePlan) -> None:
    """Looks again which shards are done."""
    plan.done = _done(out, plan.shards)


def _side_by_side(function: Callable[[_T], _R], values: Iterable[_T]) -> list[_R]:
    """A function of files that waits for the network, several at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, values))


def _check_settings(out: OutputFolder, wanted: Mapping[str, Any]) -> None:
    (former,) = out.read_json([SETTINGS_NAME])
    if not isinstance(former, dict):
        if not out.is_empty():
            raise ValueError(f"--output {out.root}: it holds other files; choose a new folder, or remove that one")
        return
    for key in sorted({*former, *wanted}, key=lambda key: (key == "columns", key)):
        if former.get(key) != wanted.get(key):
            was, now = _shown(former.get(key), wanted.get(key))
            raise ValueError(
                f"--output {out.root} was begun with {_ARGUMENTS.get(key, key)} {was}, now it is {now}: choose "
                "another --output, or remove that folder"
            )


def _shown(was: Any, now: Any) -> tuple[Any, Any]:
    """Two settings as they are, or of two lists the first entries that differ."""
    if not (isinstance(was, list) and isinstance(now, list)):
        return was, now
    pairs = itertools.zip_longest(was, now, fillvalue="nothing more")
    return next((old, new) for old, new in pairs if old != new)


def _done(out: OutputFolder, shards: Sequence[ShardJob]) -> dict[str, Mapping[str, Any]]:
    """The records of shards whose files are all there with the recorded sizes."""
    recorded = out.sizes(RECORDS)
    names = [job for job in shards if os.path.basename(job.record) in recorded]
    if not names:
        return {}
    sizes = {f"{folder}/{name}": size for folder in (*FOLDERS, QUARANTINE) for name, size in out.sizes(folder).items()}
    records = dict(zip((job.name for job in names), out.read_json([job.record for job in names]), strict=True))
    return {name: record for name, record in records.items() if _is_whole(record, sizes)}


def _is_whole(record: Any, sizes: Mapping[str, int]) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return False
    return all(sizes.get(name) == facts["bytes"] for name, facts in record["files"].items())


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
