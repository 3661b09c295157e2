"""Counts a corpus: cuts files into pieces, counts them on Beam's workers, and adds the counts up.

Workers store the counts of a piece as a small file in a folder until the card is written, so a stopped run continues.
Small inputs are counted in this process, since starting a runner would take longer.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from safelm import cli, documents
from safelm.documents import annotations, harm
from safelm.documents.annotations import AnnotationFolder
from safelm.io import remote
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.jobs.file_shards import split
from safelm.jobs.output import OutputFolder, failures_in_a_line
from safelm.jobs.progress import FolderProgress
from safelm.safety.report_card import queries as query_sets
from safelm.safety.report_card.counting import CountSettings, Piece, count_piece, token_definition
from safelm.safety.report_card.tally import Count

PIECE_BYTES = 64 << 20
SMALL_BYTES = 32 << 20  # up to so much a local run starts no workers, unless it is told how many
QUARANTINE = "quarantine"  # safelm.score's folder of rows that are no documents

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SliceInput:
    """Files of one named slice; with `name` None, documents are sliced by harm score."""

    name: str | None
    patterns: tuple[str, ...]


@dataclasses.dataclass
class Counted:
    """The number, size and counts of one SliceInput's files."""

    files: int = 0
    bytes: int = 0
    count: Count = dataclasses.field(default_factory=Count)


@dataclasses.dataclass(frozen=True)
class CountJob:
    """A piece and the name of its counts in the folder."""

    name: str
    piece: Piece


@dataclasses.dataclass(frozen=True)
class CountWork:
    """The work of counting pieces (see `safelm.jobs.beam_jobs.Work`)."""

    folder: str
    settings: CountSettings

    def load(self) -> None:
        """Loads nothing; queries and tokenizer are loaded with the first piece."""

    def run(self, job: CountJob, loaded: None) -> None:
        """Counts a piece and stores the result in the folder."""
        count, lines = count_piece(job.piece, self.settings)
        OutputFolder(self.folder).write_json(f"{job.name}.json", {"lines": lines, "count": count.to_json()})

    def failed(self, job: CountJob, message: str) -> None:
        """Stores the message where the calling process finds it."""
        OutputFolder(self.folder).write_json(f"{job.name}.failed", {"message": message})


def count_corpus(
    inputs: Sequence[SliceInput],
    settings: CountSettings,
    folder: str,
    runner: beam_runner.Runner | None = None,
    limit: documents.MalformedLimit | None = None,
) -> list[Counted]:
    """Counts each input; returns the counts in order.

    Args:
      folder: a local or gs:// folder for the counts of pieces; those of an earlier run are reused. `forget` empties it.
      runner: the Beam runner for a large corpus; None for processes of this machine.
      limit: how many malformed rows an input may have; None for the default limit.

    Raises ValueError or OSError naming the file, also for an input without documents or with too many malformed rows.
    """
    results = [Counted() for _ in inputs]
    pieces = [list(_pieces(one, result, settings.annotations)) for one, result in zip(inputs, results, strict=True)]
    names = _names([piece for some in pieces for piece in some], settings)
    folder = folder if remote.is_remote(folder) else os.path.abspath(folder)
    work, out = CountWork(folder, settings), OutputFolder(folder)
    _count_missing([CountJob(name, piece) for piece, name in names.items()], work, out, runner or beam_runner.Runner())
    for one, result, some in zip(inputs, results, pieces, strict=True):
        for _, parts in itertools.groupby(some, key=lambda piece: piece.path):
            _add_file(result.count, _read(out, [names[piece] for piece in parts]), settings.top)
        _check_malformed(one, result.count, limit or documents.MalformedLimit())
        if not any(tally.documents for tally in result.count.tallies.values()):
            raise cli.UserError(f"{_named(one)}: no document in {result.files} files")
    if settings.score_column and not any(result.count.score_columns for result in results):
        raise cli.UserError(f"--score_column={settings.score_column}: no document has it")
    return results


def tell_scores(one: SliceInput, count: Count) -> None:
    """Logs which columns an input's harm scores came from, and which columns could be mistaken for them."""
    place = one.name or ",".join(one.patterns)
    if count.score_columns:
        columns = ", ".join(f"{name} ({rows} rows)" for name, rows in count.score_columns.most_common())
        _logger.info("%s: harm scores were read from %s", place, columns)
    if count.passed_over:
        rows = max(count.passed_over.values())
        _logger.warning("%s: %d rows have no harm score: %s", place, rows, harm.advice(count.passed_over))


def forget(folder: str) -> None:
    """Removes the counts that `count_corpus` stored."""
    OutputFolder(folder).remove_folder("")


def _count_missing(jobs: list[CountJob], work: CountWork, out: OutputFolder, runner: beam_runner.Runner) -> None:
    there = out.sizes("")
    for name in there:
        if name.endswith(".failed"):
            out.remove(name)
    todo = [job for job in jobs if f"{job.name}.json" not in there]
    if len(todo) < len(jobs):
        _logger.info("%d of %d pieces were counted by an earlier run", len(jobs) - len(todo), len(jobs))
    sizes = {f"{job.name}.json": job.piece.bytes for job in todo}
    few = not runner.workers and sum(sizes.values()) <= SMALL_BYTES
    with Bar(total=sum(sizes.values()), unit="B", unit_scale=True, desc="counting", disable=None) as bar:
        if runner.is_here and (few or beam_runner.local_workers(runner, len(todo)) == 1):
            for job in todo:
                work.run(job, None)
                bar.update(job.piece.bytes)
            return
        todo.sort(key=lambda job: -job.piece.bytes)

        def update() -> None:  # to the bytes of pieces whose counts are there
            bar.update(sum(sizes.get(name, 0) for name in out.sizes("")) - bar.n)

        beam_runner.run_jobs(todo, work, runner, FolderProgress(out, bar, update))
    failed = sorted(name for name in out.sizes("") if name.endswith(".failed"))
    if failed:
        raise cli.UserError(failures_in_a_line([found["message"] for found in out.read_json(failed) if found]))


def _pieces(one: SliceInput, result: Counted, folders: Sequence[AnnotationFolder]) -> Iterator[Piece]:
    files = documents.find(one.patterns)
    if not any(QUARANTINE in pattern for pattern in one.patterns):
        files = [file for file in files if QUARANTINE not in pathlib.PurePosixPath(file.path).parts]
    for file in files:
        result.files, result.bytes = result.files + 1, result.bytes + file.bytes
        yield from _cut(one, file, folders if one.name is None else ())


def _version(file: documents.DocumentFile) -> str:
    """An identifier that changes when the file's content does."""
    local = file.path.removeprefix("file://")
    if not remote.is_remote(local):
        return str(os.stat(local).st_mtime_ns)
    return file.version or documents.describe(file)["sample_sha256"]


def _cut(one: SliceInput, file: documents.DocumentFile, folders: Sequence[AnnotationFolder]) -> Iterator[Piece]:
    """The pieces of a file: byte ranges of JSON lines, row groups of Parquet; compressed JSON lines stay whole."""
    version, parts = _version(file), split(file, PIECE_BYTES)
    if folders:
        version += json.dumps(annotations.versions(file.path, folders))
    for part in parts:
        size = file.bytes if part is None else file.bytes * (part.stop - part.start) // parts[-1].stop
        yield Piece(one.name, file.path, size, part, version)


def _add_file(count: Count, parts: Iterable[tuple[Count, int]], top: int) -> None:
    """Adds a file's parts in order, with row numbers counted from the file's first row."""
    before = 0
    for part, lines in parts:
        for tally in part.tallies.values():
            tally.top = [dataclasses.replace(one, row=one.row + before) for one in tally.top]
        count.merge(part, top)
        before += lines


def _read(out: OutputFolder, names: Sequence[str]) -> Iterator[tuple[Count, int]]:
    for name, value in zip(names, out.read_json([f"{name}.json" for name in names]), strict=True):
        try:
            yield Count.from_json(value["count"]), value["lines"]
        except (ValueError, KeyError, TypeError):
            raise OSError(f"{out.path(name)}.json: damaged counts; remove the folder and run again") from None


def _check_malformed(one: SliceInput, count: Count, limit: documents.MalformedLimit) -> None:
    reasons = ", ".join(f"{reason} ({times})" for reason, times in count.malformed.most_common(3))
    limit.check(_named(one), count.malformed.total(), count.rows, more=reasons)


def _named(one: SliceInput) -> str:
    return f"--slice={one.name}" if one.name else f"--input={','.join(one.patterns)}"


def _names(pieces: Sequence[Piece], settings: CountSettings) -> dict[Piece, str]:
    """A name for each piece's counts that depends on everything that decides them."""
    definition = [query_sets.load_queries(settings.queries).sha256, token_definition(settings)]
    facts = [dataclasses.asdict(settings), definition]

    def name(piece: Piece) -> str:
        return hashlib.sha256(json.dumps([facts, dataclasses.asdict(piece)]).encode()).hexdigest()[:32]

    return {piece: name(piece) for piece in pieces}
