"""A selection into an output folder: guarded settings, both passes, the manifest last.

    OUTPUT/_measured, _chosen      arrays of both passes, removed at the end
    OUTPUT/train-*, rows/          the chosen rows, or their list
    OUTPUT/data_card.md, .json     what was read, left out and chosen
    OUTPUT/manifest.json           written last

What the first pass depends on can't change in a folder. Budget, seed, mix and the like may, until the second pass has
begun: a budget that is too large costs no second measuring.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import documents
from safelm.documents import MANIFEST_NAME, SETTINGS_NAME, WRITTEN_BY, DocumentFile, annotations, harm
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.jobs.beam_jobs import Work, Worker
from safelm.jobs.file_shards import (
    RECORDS,
    ShardJob,
    check_settings,
    done_records,
    is_whole,
    run_speed,
    shard_name,
    side_by_side,
    split,
)
from safelm.jobs.output import OutputFolder
from safelm.jobs.progress import FolderProgress
from safelm.jobs.settings import check_same
from safelm.selection import choosing, contamination, copies, data_card, measuring, writing
from safelm.selection.contamination import PromptIndex, PromptSet
from safelm.selection.settings import SelectSettings

COMMAND, FORMAT = "safelm.select", 3
_CHOICE = "_choice.json"
_SMALL_BYTES = 32 << 20  # up to so much a local run starts no workers, unless it is told how many
_MEASURED = (  # the settings on which the first pass depends
    "token_column text_column score_column class_thresholds probabilities_column strata detect_language licence_column "
    "exact_duplicates near_duplicates min_prompt_words"
).split()

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Input:
    """The files of one input; `name` is its source in the strata, "" without one."""

    name: str
    files: Sequence[DocumentFile]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What to select from, and how.

    Attributes:
      tokenizer_hash: "" where a column has the numbers of tokens.
      part_bytes: files above that size are split into shards.
    """

    output: str
    inputs: Sequence[Input]
    settings: SelectSettings
    prompt_sets: Sequence[PromptSet]
    tokenizer_hash: str = ""
    part_bytes: int = 64 << 20

    @property
    def files(self) -> list[DocumentFile]:
        """All files in order."""
        return [file for one in self.inputs for file in one.files]


def select(selection: Selection, runner: beam_runner.Runner) -> dict[str, Any]:
    """Selects into the folder what is missing there; the manifest.

    Raises ValueError or OSError with one line for bad input.
    """
    out, settings = OutputFolder(selection.output), selection.settings
    with out.only_writer():
        facts = side_by_side(documents.describe, selection.files)
        measured, chosen = _settings(selection, facts)
        check_settings(out, measured, _flags(measured))
        if (former := _finished(out, chosen)) is not None:
            _logger.info("%s: nothing is left to do", out.root)
            return former
        out.clear_failures()
        out.write_json(SETTINGS_NAME, measured)
        jobs = _shards(selection)
        started = time.monotonic()
        index = _write_index_of_prompts(out, selection)
        records = _measure(selection, jobs, out, runner)
        _check_scores(selection, jobs, records)
        of_files = {fact["path"]: documents.without_place(fact) for fact in facts}
        choice = choosing.choose(choosing.Corpus(out, jobs, records, of_files, settings), settings, out)
        out.write_json(_CHOICE, chosen)
        written = _write(selection, jobs, out, runner)
        speed = run_speed(list(records.values()), time.monotonic() - started, runner.name, unit="tokens")
        card = data_card.build(choice, index, settings, _totals(records))
        card |= {"input": facts, "prompt_sets": measured["prompt_sets"], "tokenizer": selection.tokenizer_hash}
        _check_sums(out, card, written)
        data_card.write(out, card)
        manifest = {WRITTEN_BY: COMMAND, "format": FORMAT, "settings": measured | chosen, **card, "speed": speed}
        manifest["files"] = {} if settings.index_only else _files(written)
        manifest["index"] = _files(written) if settings.index_only else {}
        out.write_json(MANIFEST_NAME, manifest)
        _clear(out)
        return manifest


def _settings(selection: Selection, facts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the first pass, and those of the choice."""
    values, folders = selection.settings.to_json(), selection.settings.annotations
    named = [one.name for one in selection.inputs for _ in one.files]
    measured = {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "input": [documents.without_place(fact) | {"source": name} for fact, name in zip(facts, named, strict=True)],
        "prompt_sets": [{"suite": each.suite, "sha256": each.sha256()} for each in selection.prompt_sets],
        "part_bytes": selection.part_bytes,
        "tokenizer": selection.tokenizer_hash,
        "matching": contamination.VERSION,
        "near_duplicate_version": copies.VERSION,
        "annotations": side_by_side(lambda file: annotations.versions(file.path, folders), selection.files)
        if folders
        else None,
        **{name: values.pop(name) for name in _MEASURED},
    }
    return measured, values


def _flags(values: Mapping[str, Any]) -> dict[str, str]:
    own = {
        "prompt_sets": "--decontaminate",
        "part_bytes": "--part_mb, in bytes:",
        "class_thresholds": "--class_threshold",
    }
    return {name: own.get(name, f"--{name}") for name in values}


def _finished(out: OutputFolder, chosen: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder that is finished; None before. ValueError where rows were written by another choice."""
    former, manifest = out.read_json([_CHOICE, MANIFEST_NAME])
    if isinstance(former, dict) and out.sizes(writing.RECORDS):
        check_same(f"--output {out.root}", former, chosen, _flags(chosen))
    if isinstance(former, dict) and isinstance(manifest, dict) and former == chosen:
        sizes = out.sizes("") | {f"{writing.INDEX}/{name}": size for name, size in out.sizes(writing.INDEX).items()}
        if is_whole({"files": {**manifest["files"], **manifest["index"]}}, sizes):
            return manifest
    out.remove(MANIFEST_NAME)
    return None


def _shards(selection: Selection) -> list[ShardJob]:
    parts = side_by_side(lambda file: split(file, selection.part_bytes), selection.files)
    pieces = [(file.path, part) for file, some in zip(selection.files, parts, strict=True) for part in some]
    return [ShardJob(at, shard_name(at, path), path, part) for at, (path, part) in enumerate(pieces)]


def _write_index_of_prompts(out: OutputFolder, selection: Selection) -> PromptIndex | None:
    if not selection.prompt_sets:
        return None
    index = contamination.index_prompts(selection.prompt_sets, selection.settings.min_prompt_words)
    out.write_json(measuring.PROMPTS, index.to_json())
    return index


def _measure(
    selection: Selection, jobs: Sequence[ShardJob], out: OutputFolder, runner: beam_runner.Runner
) -> dict[str, Mapping[str, Any]]:
    """The records of the first pass, of all shards."""
    sources = {file.path: one.name for one in selection.inputs for file in one.files if one.name}
    work = measuring.MeasureWork(selection.output, selection.settings, sources, bool(selection.prompt_sets))
    done = done_records(out, jobs, [measuring.FOLDER])
    for job in jobs:
        if job.name not in done:
            out.remove(job.record)
    todo = [job for job in jobs if job.name not in done]
    _run("measured", jobs, todo, work, selection, out, runner, RECORDS)
    return done_records(out, jobs, [measuring.FOLDER])


def _write(
    selection: Selection, jobs: Sequence[ShardJob], out: OutputFolder, runner: beam_runner.Runner
) -> dict[str, Mapping[str, Any]]:
    """The records of the second pass, of all shards."""
    settings = selection.settings
    mark_column = settings.mark_column if settings.matched_safe and not settings.only_matched else ""
    work = writing.WriteWork(selection.output, mark_column, settings.index_only, settings.annotations)
    done = _written(out, jobs)
    for job in jobs:
        if job.name not in done:
            out.remove(writing.record_name(job))
    todo = [job for job in jobs if job.name not in done]
    _run("written", jobs, todo, work, selection, out, runner, writing.RECORDS)
    return _written(out, jobs)


def _written(out: OutputFolder, jobs: Sequence[ShardJob]) -> dict[str, Mapping[str, Any]]:
    sizes = out.sizes("") | {f"{writing.INDEX}/{name}": size for name, size in out.sizes(writing.INDEX).items()}
    records = zip(jobs, out.read_json([writing.record_name(job) for job in jobs]), strict=True)
    return {job.name: record for job, record in records if is_whole(record, sizes)}


def _run(
    what: str,
    jobs: Sequence[ShardJob],
    todo: Sequence[ShardJob],
    work: Work,
    selection: Selection,
    out: OutputFolder,
    runner: beam_runner.Runner,
    folder: str,
) -> None:
    """Runs the jobs that are left: small inputs in this process, since starting workers takes longer."""
    with Bar(total=len(jobs), initial=len(jobs) - len(todo), unit="shard", desc=what, disable=None) as bar:
        progress = FolderProgress(out, bar, lambda: bar.update(len(out.sizes(folder)) - bar.n))
        is_small = sum(file.bytes for file in selection.files) <= _SMALL_BYTES
        if is_small and runner.is_here and not runner.workers:
            worker = Worker(work)
            for job in todo:
                worker(job)
                progress()
        else:
            beam_runner.run_jobs(todo, work, runner, progress)
        progress.show()
    out.raise_failures()


def _check_scores(selection: Selection, jobs: Sequence[ShardJob], records: Mapping[str, Mapping[str, Any]]) -> None:
    missing = [job.name for job in jobs if job.name not in records]
    if missing:
        raise ValueError(
            f"{selection.output}: {len(missing)} shards have no record, the first is {missing[0]}: run again"
        )
    totals = _totals(records)
    selection.settings.limit.check_any_left((job.path for job in jobs), totals["malformed"], totals["rows"])
    if not selection.settings.needs_scores:
        return
    rows, rewrites = (sum(record[name] for record in records.values()) for name in ("rows", "unscored_rewrites"))
    where = f"{jobs[0].path}: " if len(selection.files) == 1 else f"{jobs[0].path} and others: "
    told = (
        f"{where}{rewrites} of {rows} rows are rewritten texts without a score of their own "
        f"({harm.TEXT_COLUMNS[0]}), and their sources' scores are not theirs"
    )
    if not any(record["score_columns"] for record in records.values()):
        names = selection.settings.score_column or ", ".join((*harm.NAMED_COLUMNS, harm.TEXT_COLUMNS[0]))
        none = f"{jobs[0].path}: no harm score found in {rows} rows of {len(selection.files)} files"
        raise ValueError(
            f"{told if rewrites else none} (looked for {names}): score them first (safelm.score), name the column "
            "(--score_column), or leave the score out of --strata"
        )
    if rewrites:
        _logger.warning("%s: they are left out; score them first (safelm.score)", told)


def _totals(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    columns: dict[str, int] = {}
    for record in records.values():
        for name, rows in record["score_columns"].items():
            columns[name] = columns.get(name, 0) + rows
    totals = {name: sum(record[name] for record in records.values()) for name in ("rows", "malformed")}
    return totals | {"score_columns": columns}


def _check_sums(out: OutputFolder, card: Mapping[str, Any], written: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError unless as many documents and tokens were written as the card says."""
    found = {"documents": 0, "tokens": 0}
    for record in written.values():
        found["documents"] += record["rows"]
        found["tokens"] += record["tokens"]
    if found != card["selected"]:
        raise ValueError(f"{out.root}: {found} were written, {card['selected']} chosen: the records don't agree")


def _files(written: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: facts for record in written.values() for name, facts in record["files"].items()}


def _clear(out: OutputFolder) -> None:
    """Removes what only a run that goes on needs."""
    out.remove(measuring.PROMPTS)
    for folder in (measuring.FOLDER, choosing.FOLDER, RECORDS):
        out.remove_folder(folder)
