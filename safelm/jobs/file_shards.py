"""Splits files of documents into shards of work; lets an output folder be continued only with its first settings."""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from safelm import documents
from safelm.documents import SETTINGS_NAME, DocumentFile, Part
from safelm.jobs.output import OutputFolder
from safelm.jobs.settings import check_same

RECORDS = "_shards"  # the folder of what is recorded of each shard that is done
_AT_ONCE = 16
_FORMER_NAME = re.compile(r"^((train|validation)-(\d{6}-)?)+")  # of a step before, else names grow with each step

_T, _R = TypeVar("_T"), TypeVar("_R")


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """An input file or a part of one.

    Attributes:
      name: the first part of its output files' names.
    """

    index: int
    name: str
    path: str
    part: Part | None = None

    @property
    def record(self) -> str:
        """Path of its completion record, relative to the output folder."""
        return f"{RECORDS}/{self.name}.json"

    def summary(self, record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The manifest's entry for it, with the fields `names` of its completion record."""
        part = [self.part.start, self.part.stop] if self.part else None
        return {"name": self.name, "path": self.path, "part": part} | {name: record[name] for name in names}


def split(file: DocumentFile, part_bytes: int) -> list[Part | None]:
    """The parts of a file: byte ranges of uncompressed JSON lines, row groups of Parquet.

    None if it is a single shard.
    """
    if is_one_shard(file.path, file.bytes, part_bytes) or documents.is_compressed(file.path):
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


def is_one_shard(name: str, size: int, part_bytes: int) -> bool:
    """Whether a file of `size` bytes is never split."""
    return size <= part_bytes or not name.endswith((".jsonl", ".parquet"))


def shard_name(index: int, path: str) -> str:
    """The first part of a shard's output file names; it starts with the split, so SeqIO tasks can read the files."""
    stem = os.path.basename(path).removesuffix(documents.suffix(path))
    split = "validation" if stem.startswith("validation-") else "train"
    stem = _FORMER_NAME.sub("", stem) or split
    return f"{split}-{index:06d}-{re.sub(r'[^A-Za-z0-9._-]', '_', stem)[:80]}"


def side_by_side(function: Callable[[_T], _R], values: Iterable[_T]) -> list[_R]:
    """Applies a function that waits for the network to several files at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, values))


def check_settings(out: OutputFolder, wanted: Mapping[str, Any], flags: Mapping[str, str]) -> None:
    """Raises ValueError naming a setting's flag if the folder was begun with other settings or holds something else."""
    (former,) = out.read_json([SETTINGS_NAME])
    if not isinstance(former, dict) and SETTINGS_NAME in out.sizes(""):
        (former,) = out.read_json([SETTINGS_NAME])  # another slice of the run may just have begun the folder
    if not isinstance(former, dict):
        if SETTINGS_NAME in out.sizes(""):
            path = out.path(SETTINGS_NAME)
            raise ValueError(f"{path}: damaged, not JSON; choose another --output, or remove that folder")
        if not out.is_empty():
            raise ValueError(f"--output {out.root}: it holds other files; choose a new folder, or remove that one")
        return
    check_same(f"--output {out.root}", former, wanted, flags)


def done_records(out: OutputFolder, shards: Iterable[ShardJob], folders: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Completion records, by name, of the shards whose files all exist in these folders with the recorded sizes.

    "" is the output folder itself.
    """
    recorded = out.sizes(RECORDS)
    jobs = [job for job in shards if os.path.basename(job.record) in recorded]
    if not jobs:
        return {}
    sizes = file_sizes(out, folders)
    records = zip(jobs, out.read_json([job.record for job in jobs]), strict=True)
    return {job.name: record for job, record in records if is_whole(record, sizes)}


def file_sizes(out: OutputFolder, folders: Iterable[str]) -> dict[str, int]:
    """Sizes (bytes) of the files in these folders of the output, by their names relative to it."""
    return {os.path.join(folder, name): size for folder in folders for name, size in out.sizes(folder).items()}


def is_whole(record: Any, sizes: Mapping[str, int]) -> bool:
    """Whether the files that a shard's record names have the recorded sizes (bytes); False for a damaged record."""
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return False
    files = record["files"].items()
    return all(isinstance(facts, dict) and sizes.get(name) == facts.get("bytes", -1) for name, facts in files)


def run_speed(records: Collection[Mapping[str, Any]], seconds: float, runner: str, *, unit: str) -> dict[str, Any]:
    """A run's wall-clock seconds, and its documents and `unit` (a field of the records) per second."""
    rows, amount = (sum(record[key] for record in records) for key in ("rows", unit))
    return {
        "runner": runner,
        "shards": len(records),
        "seconds": round(seconds, 3),
        "documents_per_second": round(rows / max(seconds, 1e-9), 3),
        f"{unit.removeprefix('completion_')}_per_second": round(amount / max(seconds, 1e-9), 1),
    }
