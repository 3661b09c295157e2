"""Files of documents to shards of work, and an output folder that goes on only with what it was begun with."""

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
    """A file of the input or a part of one; `name` begins the names of its output files."""

    index: int
    name: str
    path: str
    part: Part | None = None

    @property
    def record(self) -> str:
        """Where its done-record is, relative to the output."""
        return f"{RECORDS}/{self.name}.json"

    def summary(self, record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """What a manifest says of it, with these fields of its done-record."""
        part = [self.part.start, self.part.stop] if self.part else None
        return {"name": self.name, "path": self.path, "part": part} | {name: record[name] for name in names}


def split(file: DocumentFile, part_bytes: int) -> list[Part | None]:
    """The parts of a file: bytes of plain JSON lines, row groups of Parquet; None for a file that is one shard."""
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
    """Whether a file of so many bytes is never cut."""
    return size <= part_bytes or not name.endswith((".jsonl", ".parquet"))


def shard_name(index: int, path: str) -> str:
    """What the output files of a shard are called; begins with its split, so that SeqIO tasks read them as they are."""
    stem = os.path.basename(path).removesuffix(documents.suffix(path))
    split = "validation" if stem.startswith("validation-") else "train"
    stem = _FORMER_NAME.sub("", stem) or split
    return f"{split}-{index:06d}-{re.sub(r'[^A-Za-z0-9._-]', '_', stem)[:80]}"


def side_by_side(function: Callable[[_T], _R], values: Iterable[_T]) -> list[_R]:
    """A function of files that waits for the network, several at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, values))


def check_settings(out: OutputFolder, wanted: Mapping[str, Any], flags: Mapping[str, str]) -> None:
    """Raises ValueError where the folder holds, or was begun with, something else, naming the flag of the setting."""
    (former,) = out.read_json([SETTINGS_NAME])
    if not isinstance(former, dict):
        if SETTINGS_NAME in out.sizes(""):
            path = out.path(SETTINGS_NAME)
            raise ValueError(f"{path}: damaged, not JSON; choose another --output, or remove that folder")
        if not out.is_empty():
            raise ValueError(f"--output {out.root}: it holds other files; choose a new folder, or remove that one")
        return
    check_same(f"--output {out.root}", former, wanted, flags)


def done_records(out: OutputFolder, shards: Iterable[ShardJob], folders: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """The records, by name, of the shards whose files are all there, in these folders, with the recorded sizes."""
    recorded = out.sizes(RECORDS)
    jobs = [job for job in shards if os.path.basename(job.record) in recorded]
    if not jobs:
        return {}
    sizes = {f"{folder}/{name}": size for folder in folders for name, size in out.sizes(folder).items()}
    records = zip(jobs, out.read_json([job.record for job in jobs]), strict=True)
    return {job.name: record for job, record in records if is_whole(record, sizes)}


def is_whole(record: Any, sizes: Mapping[str, int]) -> bool:
    """Whether a shard's record names files with the sizes (bytes) that they have; False for a damaged record."""
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return False
    files = record["files"].items()
    return all(isinstance(facts, dict) and sizes.get(name) == facts.get("bytes", -1) for name, facts in files)


def run_speed(records: Collection[Mapping[str, Any]], seconds: float, runner: str, *, unit: str) -> dict[str, Any]:
    """Of the shards that a run did: seconds on the clock, documents and `unit` (a field of their records) a second."""
    rows, amount = (sum(record[key] for record in records) for key in ("rows", unit))
    return {
        "runner": runner,
        "shards": len(records),
        "seconds": round(seconds, 3),
        "documents_per_second": round(rows / max(seconds, 1e-9), 3),
        f"{unit.removeprefix('completion_')}_per_second": round(amount / max(seconds, 1e-9), 1),
    }
