"""A corpus to its counts: files cut into pieces, counted by as many processes as there are cores, and added up.

What is counted of a piece is kept in a folder until the card is written, so an interrupted run goes on where it was.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from safelm import cli
from safelm.data import remote
from safelm.safety import document_files, documents
from safelm.safety.report_card import normal_form
from safelm.safety.report_card.counting import Piece, Settings, count_piece
from safelm.safety.report_card.tally import Count

PIECE_BYTES = 64 << 20
MALFORMED_ROWS = 100  # so many are let pass whatever their share
_ROWS_BEFORE_JUDGING = 10_000

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SliceInput:
    """Files of one named slice; `name` None: cut by harm score."""

    name: str | None
    patterns: tuple[str, ...]


@dataclasses.dataclass
class Counted:
    """One SliceInput's files, bytes of them and counts."""

    files: int = 0
    bytes: int = 0
    count: Count = dataclasses.field(default_factory=Count)


def count_corpus(
    inputs: Sequence[SliceInput],
    settings: Settings,
    *,
    workers: int,
    kept: pathlib.Path | None = None,
    max_malformed: float = 0.01,
) -> list[Counted]:
    """Counts of each input, in order.

    Args:
      workers: processes; 1 counts in this one.
      kept: folder for the counts of finished pieces, used again by the next run; removed by `forget`.
      max_malformed: share of malformed rows from which on the run stops, if there are more than MALFORMED_ROWS.

    Raises ValueError or OSError naming the file, and for an input without a document or with too many malformed rows.
    """
    results = [Counted() for _ in inputs]
    jobs = [(index, piece) for index, one in enumerate(inputs) for piece in _pieces(one, results[index])]
    files: dict[tuple[int, str], dict[int, tuple[Count, int] | None]] = {}
    for index, piece in jobs:
        files.setdefault((index, piece.path), {})[_start(piece)] = None
    total = sum(piece.bytes for _, piece in jobs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="counting", disable=None) as progress:
        for (index, piece), result in _run(jobs, settings, workers, kept):
            parts = files[index, piece.path]
            parts[_start(piece)] = result
            progress.update(piece.bytes)
            if None not in parts.values():
                _add_file(results[index].count, files.pop((index, piece.path)), settings.top)
                _check_malformed(inputs[index], results[index].count, max_malformed, last=False)
    for one, result in zip(inputs, results, strict=True):
        _check_malformed(one, result.count, max_malformed, last=True)
        if not any(tally.documents for tally in result.count.tallies.values()):
            raise cli.UserError(f"{_named(one)}: no document in {result.files} files")
    return results


def forget(kept: pathlib.Path) -> None:
    """Removes what `count_corpus` kept."""
    shutil.rmtree(kept, ignore_errors=True)


def _pieces(one: SliceInput, result: Counted) -> Iterator[Piece]:
    for file in documents.find(one.patterns):
        result.files, result.bytes = result.files + 1, result.bytes + file.bytes
        yield from _cut(one.name, file)


def _cut(name: str | None, file: documents.DocumentFile) -> Iterator[Piece]:
    """JSON lines by bytes, Parquet by row groups; compressed JSON lines can't be entered in the middle."""
    kind = documents.suffix(file.path)
    if file.bytes <= PIECE_BYTES or kind not in (".jsonl", ".parquet"):
        yield Piece(name, file.path, file.bytes)
        return
    last, step = file.bytes, PIECE_BYTES
    if kind == ".parquet":
        with documents.open_parquet(file.path) as table:
            last = table.num_row_groups
        step = max(1, last * PIECE_BYTES // file.bytes)
    for start in range(0, last, step):
        stop = min(start + step, last)
        yield Piece(name, file.path, file.bytes * (stop - start) // last, documents.Part(start, stop))


def _start(piece: Piece) -> int:
    return piece.part.start if piece.part else 0


def _run(
    jobs: Sequence[tuple[int, Piece]], settings: Settings, workers: int, kept: pathlib.Path | None
) -> Iterator[tuple[tuple[int, Piece], tuple[Count, int]]]:
    names = _names(jobs, settings) if kept else {}
    todo = []
    for job in jobs:
        before = _read(kept / names[job[1]]) if kept else None
        if before is None:
            todo.append(job)
        else:
            yield job, before
    if len(todo) < len(jobs):
        _logger.info("%d of %d pieces were counted by an earlier run", len(jobs) - len(todo), len(jobs))
    for job, result in _in_processes(todo, settings, min(workers, len(todo))):
        if kept:
            _write(kept / names[job[1]], result)
        yield job, result


def _in_processes(
    jobs: Sequence[tuple[int, Piece]], settings: Settings, workers: int
) -> Iterator[tuple[tuple[int, Piece], tuple[Count, int]]]:
    if workers <= 1:
        yield from ((job, count_piece(job[1], settings)) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        try:
            futures = {pool.submit(count_piece, job[1], settings): job for job in jobs}
            for future in concurrent.futures.as_completed(list(futures)):
                yield futures.pop(future), future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise OSError("a counting process died (out of memory?); fewer --workers need less") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _add_file(count: Count, parts: Mapping[int, Any], top: int) -> None:
    lines = 0
    for start in sorted(parts):
        part, read = parts[start]
        for tally in part.tallies.values():
            tally.top = [dataclasses.replace(one, row=one.row + lines) for one in tally.top]
        count.merge(part, top)
        lines += read


def _check_malformed(one: SliceInput, count: Count, share: float, *, last: bool) -> None:
    malformed = count.malformed.total()
    judged = last or count.rows >= _ROWS_BEFORE_JUDGING
    half = last and 2 * malformed > count.rows
    if judged and (half or malformed > max(MALFORMED_ROWS, share * count.rows)):
        reasons = ", ".join(f"{reason} ({times})" for reason, times in count.malformed.most_common(3))
        raise cli.UserError(
            f"{_named(one)}: {malformed} of {count.rows} rows are malformed, "
            f"more than --max_malformed={share} allows: {reasons}"
        )


def _named(one: SliceInput) -> str:
    return f"--slice={one.name}" if one.name else f"--input={','.join(one.patterns)}"


def _names(jobs: Sequence[tuple[int, Piece]], settings: Settings) -> dict[Piece, str]:
    """A file name for each piece's counts that says what they depend on."""
    facts = [dataclasses.asdict(settings), normal_form.RULES_VERSION]
    for path in (settings.queries, settings.tokenizer):
        facts.append(_version(path) if path else None)
    versions = {path: _version(path) for path in {piece.path for _, piece in jobs}}
    return {
        piece: _sha256([facts, versions[piece.path], dataclasses.asdict(piece)])[:32] + ".json" for _, piece in jobs
    }


def _version(path: str) -> Any:
    if remote.is_remote(path):
        return [document_files.describe(file) for file in documents.find(path)]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _local_files(pathlib.Path(path))]


def _local_files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read(path: pathlib.Path) -> tuple[Count, int] | None:
    try:
        lines, count = path.read_text().split("\n", 1)
        return Count.from_json(count), int(lines)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: pathlib.Path, result: tuple[Count, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(f"{result[1]}\n{result[0].to_json()}")
    os.replace(unfinished, path)
