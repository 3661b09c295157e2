"""Writes SafeWeb, RefuseWeb and Moral Education from scored documents (Maini et al. 2025), or notes on documents.

Reads documents with harm scores, as safelm.score writes them (.jsonl, .jsonl.gz, .jsonl.zst, .parquet; local, gs://,
hf://). A writer turns each into a text of the kind, gates check it, and a rejected text is written again in another
style. The texts that pass are a corpus for the tasks of data_tasks, in Parquet if the input is, else in .jsonl.gz:

    OUTPUT/train-*, validation-*   id, text, metadata, style, category, model, prompt_version, source_id, gates
    OUTPUT/rejected/               by id: every attempt's style and failed check; near-duplicates
    OUTPUT/quarantine/             malformed rows: file, row number, reason, the row
    OUTPUT/report/                 the funnel, scores and report card before and after, cost, as JSON and a page; with
                                   --review pairs of text for `python -m safelm.safety.synthesis.review`
    OUTPUT/manifest.json           written last: counts, checksums, cost; without it the folder is incomplete

safeweb takes harm scores 1 to 3, refuseweb and moral_education 4 and 5. In a whole scored folder the files of other
scores are skipped. Anywhere else a document with another score or without one, or two documents with one id, end the
run with file and row before anything is written; --scores=4,5 takes just these scores and skips the others.
moral_education can read RefuseWeb's output and is then made from the dialogues.

reflection and preflection write notes (docs/notes.md) by the user's --constitution, whose sections they cite, on
documents of any harm score: a reflection on what stands before its place, which is all that its writer sees; a
preflection before the document. OUTPUT is then annotations, a Parquet file beside each input file with the places in
characters and in tokens of --tokenizer; the text stays as it is.

A journal keeps every reply as it comes. A stopped or killed run continues when the same command is given again: no
reply in the journal is requested twice, and the files are the same as without the stop. A folder of another input or
other settings is refused. Documents are never logged.

writers: template: (no model), engine:SOURCE?..., endpoint:URL#MODEL?..., python:MODULE:FACTORY. An
endpoint's key is in SAFELM_ENDPOINT_KEY, or in the variable that key_env=NAME names (OPENAI_API_KEY goes to OpenAI's
host only); redirects are not followed. scorers: as for safelm.score. One process does the writing with engine and
endpoint unless --workers says otherwise.
"""

import argparse
import dataclasses
import functools
import json
import logging
import time
from typing import Any

from safelm import cli, documents
from safelm.documents import annotations
from safelm.io import hub, remote
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.jobs.file_shards import run_speed
from safelm.jobs.output import OutputFolder
from safelm.jobs.progress import FolderProgress
from safelm.safety.synthesis import census, finish, near_duplicates, plan, prompt_files, shard
from safelm.safety.synthesis.attempts import Desk
from safelm.safety.synthesis.gates import GateSettings
from safelm.safety.synthesis.kinds import KINDS, NOTE_KINDS
from safelm.safety.synthesis.notes.constitution import read_constitution
from safelm.safety.synthesis.notes.places import BEFORE, NoteSettings
from safelm.safety.synthesis.report import output as report
from safelm.safety.synthesis.shard import PROGRESS, SynthesisWork
from safelm.safety.synthesis.sources import Selection

_ALONE = ("engine:", "endpoint:")  # writers that use a machine, or a server's patience, by themselves

_logger = logging.getLogger("safelm.synthesize")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.synthesize",
        __doc__ + "\n" + beam_runner.__doc__.split("\n\n", 2)[2],
        "python -m safelm.synthesize --kind=safeweb --input=W/scored --output=W/corpus/safeweb --writer=template: "
        "--scorer=classifier:W/classifier",
        buckets=("output",),
    )
    add = parser.add_argument
    add("--kind", required=True, choices=(*KINDS, *NOTE_KINDS))
    add("--input", required=True, action="append", help="file, folder or pattern; repeatable")
    add("--output", required=True, help="folder, local or gs://")
    add("--writer", required=True, help="see above")
    add("--scorer", required=True, help="scorer of the written texts")
    add(
        "--similarity",
        help="backbone that compares source and text: minilm, smollm2 or a folder (default: compare words)",
    )
    add("--gate", action="append", default=[], metavar="NAME=VALUE", help="a limit of the gates; repeatable")
    add(
        "--scores",
        help="use documents with these harm scores and skip others (default: the kind's scores; others are refused)",
    )
    add(
        "--attempts",
        type=int,
        default=3,
        help="most attempts at a document, each in another style (default %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of styles and sampling (default %(default)s)")
    add("--prompt_version", type=int, default=prompt_files.VERSION, help="(default %(default)s)")
    add("--max_new_tokens", type=int, default=1024, help="most tokens of a reply (default %(default)s)")
    add("--max_without_text", type=float, default=0.5, help="share of replies without text to tolerate (default 0.5)")
    add("--text_column", default="text", help="(default %(default)s)")
    add("--id_column", default="id", help="(default %(default)s)")
    add(
        "--score_column",
        help="column with harm scores 0 to 5, e.g. metadata.harm_score (default: see safelm.documents.harm)",
    )
    add("--annotations", metavar="FOLDER,...", help="folders by safelm.score with harm scores beside --input's text")
    add("--dialogues", action="store_true", help="the input is RefuseWeb from elsewhere (for moral_education)")
    add("--keep_rejected_text", action="store_true", help="keep rejected texts too; they may be harmful")
    add("--review", type=int, default=0, metavar="N", help="keep N random pairs of source and text for human review")
    add("--constitution", metavar="FILE", help="of notes: a text with numbered sections (## 2.1 Care for people)")
    add("--tokenizer", metavar="FOLDER", help="of notes: vocabulary in which places and lengths are counted")
    add("--note_place", help="of reflections: pause, every:N (tokens) or end (default pause)")
    add("--note_tokens", type=int, help=f"of notes: most tokens of one note (default {NoteSettings.note_tokens})")
    add(
        "--document_tokens",
        type=int,
        help=f"of notes: they are for so many tokens of a document (default {NoteSettings.document_tokens})",
    )
    add("--part_mb", type=int, default=32, help="size above which files are split into shards (default %(default)s)")
    documents.add_limit_flags(parser)
    beam_runner.add_flags(parser, default="local")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Writes what the flags name; ValueError or OSError with one clear line for bad input."""
    runner = beam_runner.from_flags(flags)
    _check_flags(flags)
    scores, leaves_out = plan.source_scores(flags.kind, flags.scores)
    columns = {name: getattr(flags, name) for name in ("text_column", "id_column", "score_column")}
    limit = documents.limit_from_flags(flags)
    columns |= {"annotations": annotations.parse(flags.annotations)}
    selection = Selection(flags.kind, scores, leaves_out, are_dialogues=flags.dialogues, limit=limit, **columns)
    documents.check_apart(flags.input, flags.output)
    files, left_out = plan.find_files(flags.input, selection)
    for name in ("writer", "scorer", "similarity"):
        setattr(flags, name, getattr(flags, name) and hub.pinned_in(getattr(flags, name)))
    same = ("writer", "scorer", "similarity", "prompt_version", "seed", "attempts", "max_new_tokens")
    work = SynthesisWork(
        output=flags.output.rstrip("/"),
        selection=selection,
        gates=gate_settings(flags.gate),
        max_without_text=flags.max_without_text,
        keeps_rejected_text=flags.keep_rejected_text,
        pairs=flags.review,
        notes=note_settings(flags),
        **{name: getattr(flags, name) for name in same},
    )
    prompt_files.load_prompts(flags.kind, flags.prompt_version)
    desk = work.make_desk()
    work = dataclasses.replace(work, fingerprints=desk.fingerprints)
    if not runner.workers and runner.is_here and flags.writer.startswith(_ALONE):
        runner = dataclasses.replace(runner, workers=1)
    out = OutputFolder(work.output)
    with out.only_writer():
        todo = plan.make_plan(out, work, desk, files, left_out, flags.part_mb << 20)
        _report(work.output, synthesize(out, todo, desk, runner))


def _check_flags(flags: argparse.Namespace) -> None:
    for name, least in (("part_mb", 1), ("attempts", 1), ("max_new_tokens", 1), ("review", 0)):
        if getattr(flags, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(flags, name)}")
    if not 0 <= flags.max_without_text <= 1:
        raise ValueError(f"--max_without_text must be from 0 to 1, got {flags.max_without_text}")
    if flags.dialogues and flags.kind != "moral_education":
        raise ValueError(f"--dialogues: {flags.kind} is made from web documents")
    remote.check_output(flags.output)


def note_settings(flags: argparse.Namespace) -> NoteSettings | None:
    """What decides places and lengths of notes; None for other kinds. Raises ValueError for flags that don't fit."""
    names = ("constitution", "tokenizer", "note_place", "note_tokens", "document_tokens")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if flags.kind not in NOTE_KINDS:
        if given:
            raise ValueError(f"--{min(given)} goes with --kind={' or '.join(NOTE_KINDS)}")
        return None
    for name in names[:2]:
        if name not in given:
            raise ValueError(f"--kind={flags.kind} needs --{name}")
    if flags.kind == "preflection":
        if "note_place" in given:
            raise ValueError("--note_place: a preflection stands before the document")
        given["note_place"] = BEFORE
    constitution, place = read_constitution(given.pop("constitution")), given.pop("note_place", NoteSettings.place)
    if flags.kind == "reflection" and place == BEFORE:
        raise ValueError("--note_place=before: --kind=preflection writes notes that stand before documents")
    return NoteSettings(constitution=constitution, place=place, seed=flags.seed, **given)


def gate_settings(given: list[str]) -> GateSettings:
    """Settings of NAME=VALUE strings; a value with commas is a list. Raises ValueError that names the flag."""
    values: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        try:
            numbers = [float(piece) if "." in piece else int(piece) for piece in value.split(",")]
        except ValueError:
            raise ValueError(f"--gate={text}: expected NAME=NUMBER") from None
        values[name] = numbers if "," in value else numbers[0]
        if not separator:
            raise ValueError(f"--gate={text}: expected NAME=NUMBER")
    return GateSettings.from_mapping(values)


def synthesize(out: OutputFolder, todo: plan.SynthesisPlan, desk: Desk, runner: beam_runner.Runner) -> dict[str, Any]:
    """Writes what is missing of a plan; the manifest."""
    former = next(out.read_json([documents.MANIFEST_NAME]))
    if former is not None:
        finish.check_whole(out, former)
        finish.clean_up(out, todo)
        return former
    plan.clear(out, todo)
    counts = _census(out, todo, runner)
    started, names = time.monotonic(), {job.name for job in todo.jobs}
    _run(out, todo, desk, runner, counts)
    plan.refresh(out, todo)
    if todo.jobs:
        raise ValueError(f"{out.root}: {len(todo.jobs)} shards have no record, such as {todo.jobs[0].name}: run again")
    done = [record | {"rows": finish.num_documents(record)} for record in (todo.done[name] for name in names)]
    speed = run_speed(done, time.monotonic() - started, runner.name, unit="completion_tokens")
    funnel = finish.check_writes(out, todo, desk.writer.name)
    duplicates = near_duplicates.remove(out, todo, funnel)
    files = finish.publish(out, todo, duplicates)
    manifest = finish.make_manifest(out, todo, desk.writer.name, funnel, files, speed)
    counted = [todo.done[job.name]["sources"] for job in todo.shards]
    report.write(out, manifest, counted, runner, finish.pairs(out, todo, duplicates))
    out.write_json(documents.MANIFEST_NAME, manifest)
    finish.clean_up(out, todo)
    return manifest


def _census(out: OutputFolder, todo: plan.SynthesisPlan, runner: beam_runner.Runner) -> list[int]:
    """Documents in each shard; where the input can't be used the folder is as if there had been no run."""
    try:
        counts = census.take(out, todo.shards, todo.work.selection, runner, todo.input_bytes)
        if not sum(counts):
            wanted = ", ".join(map(str, todo.work.selection.scores))
            raise ValueError(f"{todo.inputs[0]['path']} ...: no document with harm score {wanted} in the input")
    except ValueError:
        plan.forget(out, todo)
        raise
    return counts


def _run(
    out: OutputFolder, todo: plan.SynthesisPlan, desk: Desk, runner: beam_runner.Runner, counts: list[int]
) -> None:
    sizes = {job.name: count for job, count in zip(todo.shards, counts, strict=True)}
    jobs = sorted(todo.jobs, key=lambda job: -sizes[job.name])
    if runner.may_stay_here(len(jobs)):
        shard.keep(desk)
    before = sum(sizes[name] for name in todo.done)
    try:
        with Bar(total=sum(counts), initial=before, unit="document", disable=None) as bar:
            names = {job.name for job in jobs}
            show = functools.partial(_show_progress, out, bar, before, names)
            progress = FolderProgress(out, bar, show, seconds=1.0, remote_seconds=15.0)
            beam_runner.run_jobs(jobs, todo.work, runner, progress)
    finally:
        shard.forget()
    out.raise_failures()


def _show_progress(out: OutputFolder, bar: Any, before: int, jobs: set[str]) -> None:
    """Moves the bar to the number of documents that workers say are done."""
    names = [name for name in out.sizes(PROGRESS) if name.removesuffix(".json") in jobs]
    found = [said or {} for said in out.read_json([f"{PROGRESS}/{name}" for name in names])]
    done = before + sum(said.get("documents", 0) for said in found)
    bar.set_postfix(replies=sum(said.get("replies", 0) for said in found), refresh=False)
    bar.update(max(0, done - bar.n))


def _report(output: str, manifest: dict[str, Any]) -> None:
    totals, speed = manifest["totals"], manifest["speed"]
    is_of_notes = "notes" in manifest["settings"]
    _logger.info(
        "%s: %d of %d %s published, %d rejected, %d near-duplicates, %d malformed; %.1f s, %.2f documents/s",
        *(output, totals["published"], totals["rows"]),
        f"notes on {totals.get('documents', totals['rows'])} documents" if is_of_notes else "documents",
        *(totals["rejected"], totals["near_duplicates"]),
        *(totals["malformed"], speed["seconds"], speed["documents_per_second"]),
    )
    if room := manifest.get("annotations", {}).get("note_tokens"):
        needed = {"document_tokens": manifest["settings"]["notes"]["document_tokens"], "note_tokens": room}
        _logger.info("%s: cache_tasks has room for the notes with --interventions='%s'", output, json.dumps(needed))
    columns = ", ".join(f"{name} ({count} rows)" for name, count in manifest["score_columns"].items())
    _logger.info("%s: harm scores were read from %s", output, columns)
    if left_out := totals["left_out"]:
        shown = ", ".join(f"{count} with score {score}" for score, count in left_out.items())
        _logger.warning("%s: documents of other scores were left out: %s", output, shown)
    if totals["repeats"]:
        _logger.warning("%s: %d copies of documents without an id were left out", output, totals["repeats"])
    if totals["malformed"]:
        _logger.warning("%s/quarantine: %d rows are malformed", output, totals["malformed"])
    if not totals["published"]:
        what = "note" if is_of_notes else "document"
        _logger.warning("%s: no %s passed the gates, see %s/report", output, what, output)


if __name__ == "__main__":
    cli.run(main, arguments(), decodes=True)
