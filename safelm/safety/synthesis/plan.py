"""Plans a run: its input files and shards, and its settings checked against those of the output folder."""

import dataclasses
import hashlib
import itertools
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import documents
from safelm.documents import SETTINGS_NAME, WRITTEN_BY, DocumentFile, annotations
from safelm.io import hub
from safelm.jobs.file_shards import (
    RECORDS,
    ShardJob,
    check_settings,
    done_records,
    shard_name,
    side_by_side,
    split,
)
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring.columns import UNSCORED
from safelm.safety.synthesis import census, journal
from safelm.safety.synthesis.attempts import Desk
from safelm.safety.synthesis.gates import limits_of
from safelm.safety.synthesis.kinds import NOTE_KINDS, SOURCE_SCORES, Kind
from safelm.safety.synthesis.notes.places import ReadingPauses
from safelm.safety.synthesis.shard import PASSED, QUARANTINE, REJECTED, SynthesisWork, output_names, prompt_version
from safelm.safety.synthesis.sources import Selection, wrong_score

FORMAT = 1
COMMAND = "safelm.synthesize"
_FLAGS = {
    "kind": "--kind",
    "scores": "--scores",
    "input": "--input",
    "writer": "--writer",
    "gates": "--scorer, --similarity, --gate or --prompt_version",
    "prompts": "--prompt_version",
    "part_bytes": "--part_mb",
    "pairs": "--review",
    "notes": "--tokenizer, --constitution, --note_place, --document_tokens or --note_tokens",
}
_FLAGS |= {
    name: f"--{name}"
    for name in (
        *("seed", "attempts", "max_new_tokens", "text_column", "id_column", "score_column", "dialogues", "annotations"),
        "keep_rejected_text",
    )
}
_SCORE_FOLDER = re.compile(r"[/\\]score=(\d)[/\\]")


@dataclasses.dataclass
class SynthesisPlan:
    """All shards of a run in input order, and the records of finished ones.

    Attributes:
      inputs: facts that identify each input file.
      folders_left_out: number of files with other scores in a scored input, by folder.
    """

    work: SynthesisWork
    settings: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    input_bytes: int
    shards: Sequence[ShardJob]
    done: dict[str, Mapping[str, Any]]
    folders_left_out: Mapping[str, int]

    @property
    def jobs(self) -> list[ShardJob]:
        """The unfinished shards."""
        return [job for job in self.shards if job.name not in self.done]


def find_files(patterns: Sequence[str], selection: Selection) -> tuple[list[DocumentFile], dict[str, int]]:
    """The input's files, and the number of files left out by folder because they hold other scores.

    Raises ValueError if an input has only documents of other scores, and the errors of `documents.find`.
    """
    taken: dict[str, DocumentFile] = {}
    left_out: dict[str, int] = {}
    for pattern in patterns:
        found = documents.find([pattern])
        folders = {file.path: _scored_folder(file.path) for file in found}
        is_scored = any(folder.startswith("score=") for folder in folders.values())
        wanted = {"", *(f"score={score}" for score in selection.scores), *(() if is_scored else (UNSCORED,))}
        chosen = [file for file in found if folders[file.path] in wanted]
        if not chosen:
            score = int(folders[found[0].path].removeprefix("score="))
            raise ValueError(f"{found[0].path}: {wrong_score(selection, score)}")
        taken |= {file.path: file for file in chosen}
        for file in found:
            if folders[file.path] not in wanted:
                left_out[folders[file.path]] = left_out.get(folders[file.path], 0) + 1
    return [taken[path] for path in sorted(taken)], left_out


def _scored_folder(path: str) -> str:
    """The folder of `safelm.score` that a file is in: "score=3", "unscored" or ""."""
    if found := _SCORE_FOLDER.search(path):
        return f"score={found[1]}"
    return UNSCORED if UNSCORED in path.split("/")[:-1] else ""


def source_scores(kind: Kind, asked: str | None) -> tuple[tuple[int, ...], bool]:
    """The harm scores to use, and whether rows with others are left out (if scores were asked for) or refused.

    Raises ValueError for something that is no harm score.
    """
    if asked is None:
        return SOURCE_SCORES[kind], False
    scores = sorted({piece.strip() for piece in asked.split(",")})
    if not all(re.fullmatch("[0-5]" if kind in NOTE_KINDS else "[1-5]", score) for score in scores):
        least = 0 if kind in NOTE_KINDS else 1
        raise ValueError(f"--scores={asked}: expected comma-separated harm scores from {least} to 5")
    return tuple(map(int, scores)), True


def make_plan(
    out: OutputFolder,
    work: SynthesisWork,
    desk: Desk,
    files: Sequence[DocumentFile],
    folders_left_out: Mapping[str, int],
    part_bytes: int,
) -> SynthesisPlan:
    """Compares the settings with the output folder's, clears files of unfinished shards, and lists the shards.

    Raises ValueError naming the difference if the folder holds something else or was begun with other settings.
    """
    inputs = side_by_side(documents.describe, files)
    settings = _settings(work, desk, inputs) | {"part_bytes": part_bytes}
    if folders := work.selection.annotations:
        settings["annotations"] = side_by_side(lambda file: annotations.versions(file.path, folders), files)
    of_notes = {} if desk.pauses is None else {"gates": f"{_FLAGS['gates']}, {_FLAGS['notes']}"}
    check_settings(out, settings, _FLAGS | of_notes)
    parts = side_by_side(lambda file: split(file, part_bytes), files)
    pieces = [(file.path, part) for file, found in zip(files, parts, strict=True) for part in found]
    shards = [ShardJob(index, shard_name(index, path), path, part) for index, (path, part) in enumerate(pieces)]
    out.write_json(SETTINGS_NAME, settings)
    plan = SynthesisPlan(work, settings, inputs, sum(file.bytes for file in files), shards, {}, folders_left_out)
    refresh(out, plan)
    return plan


def _settings(work: SynthesisWork, desk: Desk, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    selection = work.selection
    return {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "kind": selection.kind,
        **({} if desk.pauses is None else {"notes": _note_settings(desk.pauses)}),
        "scores": list(selection.scores) + (["others left out"] if selection.leaves_out else []),
        "input": list(map(documents.without_place, inputs)),
        "writer": {"name": desk.writer.name, "fingerprint": desk.writer.fingerprint} | _commit(work.writer),
        "gates": [{"name": gate.name, "fingerprint": gate.fingerprint} for gate in desk.gates],
        "limits": limits_of(desk.gates, selection.kind),
        "prompts": prompt_version(work.prompts),
        "seed": work.seed,
        "attempts": work.attempts,
        "max_new_tokens": work.max_new_tokens,
        "text_column": selection.text_column,
        "id_column": selection.id_column,
        "score_column": selection.score_column,
        "dialogues": selection.are_dialogues,
        "keep_rejected_text": work.keeps_rejected_text,
        "pairs": work.pairs,
    }


def _note_settings(pauses: ReadingPauses) -> dict[str, Any]:
    settings = pauses.settings
    constitution = hashlib.sha256(settings.constitution.text.encode()).hexdigest()
    limits = {"document_tokens": settings.document_tokens, "note_tokens": settings.note_tokens}
    return {"vocab_hash": pauses.tokenizer.hash, "constitution": constitution, "place": settings.place} | limits


def _commit(spec: str) -> dict[str, str]:
    """What names a model of a hub, with its commit."""
    return {"spec": spec} if hub.PREFIX in spec else {}


def refresh(out: OutputFolder, plan: SynthesisPlan) -> None:
    """Checks again which shards are finished: those with a record and all files that it names."""
    plan.done = done_records(out, plan.shards, (PASSED, REJECTED, QUARANTINE))


def forget(out: OutputFolder, plan: SynthesisPlan) -> None:
    """Gives up a folder in which nothing was written yet, so that a run with other settings may use it."""
    if not plan.done and not out.sizes(journal.FOLDER):
        for name in (SETTINGS_NAME, *(f"{census.FOLDER}/{name}" for name in out.sizes(census.FOLDER))):
            out.remove(name)
        out.clear_failures()
        if not out.is_remote:
            shutil.rmtree(out.path(census.FOLDER), ignore_errors=True)


def clear(out: OutputFolder, plan: SynthesisPlan) -> None:
    """Removes files of unfinished shards that a killed run left; journals stay."""
    out.clear_failures()
    there = {folder: out.sizes(folder) for folder in (PASSED, REJECTED, QUARANTINE, RECORDS)}
    for job in plan.jobs:
        for name in itertools.chain(output_names(job).values(), [job.record]):
            folder, _, file = name.partition("/")
            if file in there[folder]:
                out.remove(name)
