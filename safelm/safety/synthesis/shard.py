"""Makes one shard of synthetic documents from scored ones, stored where the finishing pass finds it."""

import contextlib
import dataclasses
import heapq
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from safelm.documents import Malformed
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.scorer import load_scorer
from safelm.safety.scoring.shard import MALFORMED_SUFFIX
from safelm.safety.synthesis import census, columns, prompt_files
from safelm.safety.synthesis.attempts import Desk, Rules, Trial
from safelm.safety.synthesis.gates import GateSettings, load_similarity, make_gates
from safelm.safety.synthesis.gates.duplicates import signature
from safelm.safety.synthesis.gates.notes import NoteRules
from safelm.safety.synthesis.journal import Journal
from safelm.safety.synthesis.kinds import Source
from safelm.safety.synthesis.notes.places import NoteSettings, ReadingPauses
from safelm.safety.synthesis.notes.publishing import note_row
from safelm.safety.synthesis.prompt_files import Prompts, derived_seed, load_prompts
from safelm.safety.synthesis.report import Funnel
from safelm.safety.synthesis.report.cards import SourceCounter
from safelm.safety.synthesis.sources import Selection, ShardRows
from safelm.safety.synthesis.writers import load_writer

PASSED, REJECTED, QUARANTINE, PROGRESS = "_passed", "rejected", "quarantine", "_progress"
SIGNATURES_SUFFIX, FACTS_SUFFIX, REJECTED_SUFFIX = ".signatures.npy", ".facts.json", ".rejected"
BLOCK_ROWS, BLOCK_CHARACTERS = 2048, 16 << 20
_PROGRESS_SECONDS = {False: 1.0, True: 30.0}


@dataclasses.dataclass(frozen=True)
class SynthesisWork:
    """The work of making shards (see `safelm.jobs.beam_jobs.Work`).

    Attributes:
      writer, scorer, similarity: the strings that name them (`load_writer`, `load_scorer`, `load_similarity`).
      fingerprints: of the desk with which the run began; empty until it was made once.
      pairs: number of pairs of source and text to keep for review, chosen by hash.
      notes: of kinds of notes, what decides where they belong and how long they may be.
    """

    output: str
    selection: Selection
    writer: str
    scorer: str
    similarity: str | None = None
    gates: GateSettings = dataclasses.field(default_factory=GateSettings)
    prompt_version: int = prompt_files.VERSION
    seed: int = 0
    attempts: int = 3
    max_new_tokens: int = 1024
    max_without_text: float = 0.5
    keeps_rejected_text: bool = False
    pairs: int = 0
    fingerprints: tuple[str, ...] = ()
    notes: NoteSettings | None = None

    def load(self) -> Desk:
        """Loads writer and gates. Raises ValueError if one differs from where the run began."""
        if _kept and self.fingerprints == _kept[0].fingerprints:
            return _kept[0]
        desk = self.make_desk()
        for here, began in zip(desk.fingerprints, self.fingerprints, strict=True):
            if here != began:
                raise ValueError(f"a worker loaded {here}, the run began with {began}")
        return desk

    def make_desk(self) -> Desk:
        """The desk with these settings. Raises the errors of loading."""
        prompts = load_prompts(self.selection.kind, self.prompt_version)  # a constitution may be repeated
        pauses = self.notes and ReadingPauses(self.notes)
        gates = make_gates(
            self.selection.kind,
            scorer=load_scorer(self.scorer),
            settings=self.gates,
            similarity=load_similarity(self.similarity),
            prompt_texts=[prompts.system, prompts.user, *prompts.styles.values()],
            notes=pauses and NoteRules(pauses.tokenizer, pauses.settings),
        )
        writer = load_writer(self.writer)
        rules = Rules(self.prompts, self.seed, self.attempts, self.max_new_tokens, self.max_without_text)
        return Desk(writer, gates, rules, pauses)

    @property
    def prompts(self) -> Prompts:
        prompts = load_prompts(self.selection.kind, self.prompt_version)
        if self.notes is None:
            return prompts
        return prompts.with_constitution(self.notes.constitution.text, self.notes.constitution.sections)

    def run(self, job: ShardJob, desk: Desk) -> None:
        """Makes a shard; its completion record is written last."""
        out = OutputFolder(self.output)
        with out.at_work():
            out.write_json(job.record, make_shard(job, self, desk, out))

    def failed(self, job: ShardJob, message: str) -> None:
        """Stores the message where the calling process finds it."""
        OutputFolder(self.output).record_failure(job.name, message)


_kept: list[Desk] = []


def keep(desk: Desk) -> None:
    """Lets workers that are threads of this process reuse the loaded desk."""
    _kept[:] = [desk]


def forget() -> None:
    """Drops the desk that `keep` kept, before other processes load it."""
    _kept.clear()


def prompt_version(prompts: Prompts) -> str:
    """The value of the column of this name; begins with the kind."""
    return f"{prompts.kind}-v{prompts.version}-{prompts.hash[:12]}"


def make_shard(job: ShardJob, work: SynthesisWork, desk: Desk, out: OutputFolder) -> dict[str, Any]:
    """Makes one shard, publishes its files and returns its record (counts, funnel, cost).

    Raises the errors of reading and writing.
    """
    started = time.monotonic()
    with out.staging() as staging, Journal.open(out, job.name) as journal, contextlib.ExitStack() as files:
        results = _Results(job, work, desk.writer.name, staging, files)
        rows = ShardRows(job, work.selection, results.quarantine, census.copies(out, job))
        progress = _ShardProgress(out, job, work)
        sources = SourceCounter(job.path)
        for block in _blocks(_at_pauses(rows.sources(), desk.pauses, sources)):
            desk.work_through(block, journal, progress)
            for trial in block:
                results.add(trial)
            progress.done(sources.documents)
        files.close()
        journal.sync()
        record = results.publish(out)
        tokens = {
            name: sum(getattr(reply, name) for reply in journal.replies.values())
            for name in ("prompt_tokens", "completion_tokens")
        }
        return (
            record
            | tokens
            | {
                "replies": len(journal.replies),
                "spent": dict(journal.spent),
                "documents": sources.documents,
                "sources": sources.to_json(),
                "score_columns": rows.score_columns,
                "repeats": rows.repeats,
                "unscored": rows.unscored,
                "left_out": {str(score): count for score, count in sorted(rows.left_out.items())},
                "seconds": round(time.monotonic() - started, 3),
            }
        )


def _at_pauses(
    sources: Iterator[tuple[int, Source]], pauses: ReadingPauses | None, counter: SourceCounter
) -> Iterator[tuple[int, Source]]:
    """The sources or, of notes, what is before each of their places; whole sources are counted."""
    for row, source in sources:
        counter.add(row, source)
        yield from [(row, source)] if pauses is None else [(row, each) for each in pauses.sources(source)]


def _blocks(sources: Iterator[tuple[int, Any]]) -> Iterator[list[Trial]]:
    block: list[Trial] = []
    characters = 0
    for row, source in sources:
        if block and (len(block) == BLOCK_ROWS or characters + len(source.text) > BLOCK_CHARACTERS):
            yield block
            block, characters = [], 0
        block.append(Trial(row, source))
        characters += len(source.text)
    if block:
        yield block


class _ShardProgress:
    """Logs now and then how many documents are done and how many replies of the current block have come."""

    def __init__(self, out: OutputFolder, job: ShardJob, work: SynthesisWork):
        self._out, self._name, self._done, self._replies = out, f"{PROGRESS}/{job.name}.json", 0, 0
        self._next = 0.0

    def __call__(self) -> None:
        self._replies += 1
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PROGRESS_SECONDS[self._out.is_remote]
            self._out.write_json(self._name, {"documents": self._done, "replies": self._replies})

    def done(self, documents: int) -> None:
        """Tells how many documents of the shard are done by now."""
        self._done = documents
        self._replies = 0


class _Results:
    """The files of one shard, each created with its first row."""

    def __init__(self, job: ShardJob, work: SynthesisWork, model: str, staging: str, files: contextlib.ExitStack):
        self._job, self._work, self._model, self._staging, self._files = job, work, model, staging, files
        self._version = prompt_version(work.prompts)
        self._passed: columns.RowFile | None = None
        self._signatures_ND: list[np.ndarray] = []
        self._facts: list[tuple[str, str, int, str]] = []  # of passed rows what the finishing pass needs
        self._pairs: list[tuple[int, str, dict[str, Any]]] = []
        self._lines: dict[str, tuple[Any, int]] = {}
        self._funnel = Funnel(work.selection.kind)
        self._malformed = 0

    def add(self, trial: Trial) -> None:
        """Adds a source's outcome to the right file."""
        source, draft = trial.source, trial.drafts[-1]
        category = next((each.category for each in reversed(trial.drafts) if each and each.category), "")
        category = category or source.named("category")
        self._funnel.add(source, trial.attempts, category)
        if not trial.passed:
            self._write_line(REJECTED, self._rejection(trial))
            return
        last = trial.attempts[-1]
        is_note = draft.voices is not None
        if is_note:
            row = note_row(draft, trial.row)
        else:
            row = columns.make_row(draft, last.findings, self._model, self._version, category)
        if self._passed is None:
            path = os.path.join(self._staging, "passed")
            suffix = columns.JSON_LINES if is_note else columns.suffix(self._job.path)
            self._passed = self._files.enter_context(columns.RowFile(path, suffix))
        self._passed.add(row)
        self._signatures_ND.append(signature(draft.text))
        self._facts.append((row["id"], last.style, source.harm_score, category))
        self._keep_pair(row["id"], trial)

    def quarantine(self, malformed: Malformed) -> None:
        """Keeps a malformed row with its file, number and reason."""
        self._malformed += 1
        self._write_line(QUARANTINE, malformed.record(self._job.path))

    def _rejection(self, trial: Trial) -> dict[str, Any]:
        attempts = [
            {"style": attempt.style, "failure": attempt.failure}
            | ({"text": draft.text if draft else None} if self._work.keeps_rejected_text else {})
            for attempt, draft in zip(trial.attempts, trial.drafts, strict=True)
        ]
        return {
            "source_id": trial.source.id,
            "file": self._job.path,
            "row": trial.row,
            "harm_score": trial.source.harm_score,
            "attempts": attempts,
        }

    def _write_line(self, folder: str, values: Mapping[str, Any]) -> None:
        if folder not in self._lines:
            file = open(os.path.join(self._staging, folder), "w", encoding="utf-8")
            self._lines[folder] = (self._files.enter_context(file), 0)
        file, count = self._lines[folder]
        file.write(json.dumps(values) + "\n")
        self._lines[folder] = (file, count + 1)

    def _keep_pair(self, identity: str, trial: Trial) -> None:
        """Keeps the texts with the smallest hashes, a sample that doesn't depend on the order of shards."""
        if not self._work.pairs:
            return
        source, draft = trial.source, trial.drafts[-1]
        pair = {"id": identity, "source_id": source.id, "style": draft.style, "harm_score": source.harm_score}
        pair |= {"source": source.text, "text": draft.text}
        rank = -derived_seed(self._work.seed, "review", identity)
        heapq.heappush(self._pairs, (rank, identity, pair))
        if len(self._pairs) > self._work.pairs:
            heapq.heappop(self._pairs)

    def publish(self, out: OutputFolder) -> dict[str, Any]:
        """Names the finished files and removes those of an earlier attempt; returns the record of counts and files."""
        passed = self._passed.rows if self._passed else 0
        counts = {folder: count for folder, (_, count) in self._lines.items()}
        if self._signatures_ND:
            np.save(os.path.join(self._staging, "signatures"), np.stack(self._signatures_ND))
            pairs = [(-rank, pair) for rank, _, pair in sorted(self._pairs, reverse=True)]
            with open(os.path.join(self._staging, "facts"), "w", encoding="utf-8") as file:
                json.dump({"rows": self._facts, "pairs": pairs}, file)
        made = {"passed": passed, "signatures.npy": passed, "facts": passed} | counts
        files = {}
        for name, target in output_names(self._job).items():
            if made.get(name):
                files[target] = {"rows": made[name]} | out.publish(os.path.join(self._staging, name), target)
            elif not out.is_remote:
                out.remove(target)
        return {
            "rows": passed + counts.get(REJECTED, 0),
            "passed": passed,
            "rejected": counts.get(REJECTED, 0),
            "malformed": self._malformed,
            "files": files,
            "funnel": self._funnel.to_json(),
        }


def output_names(job: ShardJob) -> dict[str, str]:
    """A shard's files by content, relative to the output; no task takes these names for a corpus."""
    return {
        "passed": f"{PASSED}/{job.name}",
        "signatures.npy": f"{PASSED}/{job.name}{SIGNATURES_SUFFIX}",
        "facts": f"{PASSED}/{job.name}{FACTS_SUFFIX}",
        REJECTED: f"{REJECTED}/{job.name}{REJECTED_SUFFIX}",
        QUARANTINE: f"{QUARANTINE}/{job.name}{MALFORMED_SUFFIX}",
    }
