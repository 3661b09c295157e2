"""Joins annotations of a corpus to its rows, checks that they belong together, or finds spans in its texts.

Annotations are made by safelm.score --output_rows=annotations: a small Parquet file for each file of the corpus, joined
by row, never by id. data_tasks, safelm.report_card and safelm.synthesize read them on the fly (--annotations), so that
no text need be copied. This command writes the joined rows where another program wants them:

    --join    OUTPUT has each input file with the columns of every folder beside its own: Parquet as Parquet with every
              type as it was, JSON lines as .jsonl.gz with their bytes kept. A stopped run goes on when the same command
              is given again
    --check   writes nothing: every file has annotations made from it, with a row for each of its rows and no other

--annotations takes folders by comma. Two that have the same column are refused; NAME=FOLDER puts NAME_ before the
columns of one.

Spans are annotations too, stretches of a text (start and end in characters, kind, label, score; safelm.documents.spans)
that interventions of the training tasks need (docs/interventions.md). OUTPUT gets a file of them for each input file:

    --unit=sentence    every sentence with its harm score as label, by --scorers (any of safelm.score's);
                       --unit=window:256 stretches of 256 words; with --min_score=3 those that reach it only
    --token_classifier=FOLDER    stretches of tokens that a token-level classifier (safelm.train_classifier
                       --unit=token) finds, with their first and last token beside the characters; FOLDER?threshold=0.7
                       and ?bridge=2 (runs with so few tokens between them are one) in place of the folder's
    --lexicon=FILE     a lexicon's terms: one a line, perhaps a tab and a label
    --spans=FILES      your own: a file for each of the input, of its name, with rows {"row": 1, "spans": [{"start": 0,
                       "end": 4, "kind": "x", "label": "y", "score": 0.5}]}, checked against the text. "text" in a span
                       quotes the stretch, is compared, and not kept
"""

import argparse
import logging
import time
from typing import Any

from safelm import cli, documents
from safelm.documents import annotations
from safelm.io import remote
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.jobs.file_shards import RECORDS
from safelm.jobs.output import OutputFolder
from safelm.jobs.progress import FolderProgress
from safelm.safety.monitors import annotator
from safelm.safety.scorer import BUNDLED
from safelm.safety.scoring import joining, scorers, span_files
from safelm.safety.scoring.units import parse_unit, read_lexicon
from safelm.tags import MAX_SCORE, MIN_SCORE

_logger = logging.getLogger("safelm.annotate")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.annotate",
        __doc__ + "\n" + beam_runner.__doc__.split("\n\n", 2)[2],
        "python -m safelm.annotate --join --input='web/*.parquet' --annotations=runs/scores --output=runs/joined\n"
        "  python -m safelm.annotate --check --input='web/*.parquet' --annotations=runs/scores,judge=runs/judged\n"
        "  python -m safelm.annotate --unit=sentence --input='web/*.parquet' --output=runs/spans --scorers=bundled",
        buckets=("output",),
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--join", action="store_true", help="write the corpus's rows with their annotations")
    what.add_argument("--check", action="store_true", help="write nothing, look whether they belong together")
    what.add_argument("--unit", metavar="UNIT", help="write spans: sentence, or window:N with N words")
    what.add_argument(
        "--token_classifier", metavar="FOLDER", help="write spans: what this token-level classifier finds"
    )
    what.add_argument("--lexicon", metavar="FILE", help="write spans: the terms of this file")
    what.add_argument("--spans", nargs="+", metavar="FILES", help="write spans: these files' own, checked")
    add("--input", nargs="+", required=True, action="extend", metavar="FILES", help="files, folders or patterns")
    add("--annotations", metavar="FOLDER,...", help="folders of annotations, perhaps NAME=FOLDER (join, check)")
    add("--output", help="folder to write, local or gs://")
    add("--scorers", metavar="KIND:PLACE,...", help=f"of --unit, as safelm.score has them (default {BUNDLED})")
    add("--min_score", type=int, help="of --unit: no span below this harm score (default 0)")
    add("--text_column", default="text", help="column in which spans are found (default %(default)s)")
    documents.add_limit_flags(parser)
    beam_runner.add_flags(parser, default="local")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Joins, checks or finds spans; ValueError or OSError with one clear line for bad input."""
    runner = beam_runner.from_flags(flags)
    if bool(flags.output) == flags.check:
        raise ValueError(
            "--check writes nothing: leave out --output" if flags.check else f"{_asked(flags)} needs --output"
        )
    for name in ("scorers", "min_score"):
        if getattr(flags, name) is not None and not flags.unit:
            raise ValueError(f"--{name} goes with --unit")
    if not (flags.join or flags.check):
        if flags.annotations:
            raise ValueError("--annotations goes with --join or --check")
        find_spans(flags, runner)
        return
    folders = annotations.parse(flags.annotations)
    if not folders:
        raise ValueError("--annotations names no folder")
    if flags.check:
        files = documents.find(flags.input)
        rows = check(files, folders)
        _logger.info("%d files, %d rows: every row has its annotations", len(files), rows)
        return
    remote.check_output(flags.output)
    documents.check_apart(flags.input, flags.output)
    work = joining.JoinWork(flags.output.rstrip("/"), folders)
    manifest = join(documents.find(flags.input), work, runner)
    _logger.info("%s: %d rows in %d files", work.output, manifest["totals"]["rows"], len(manifest["files"]))


def _asked(flags: argparse.Namespace) -> str:
    return next(
        f"--{name}" for name in ("join", "unit", "token_classifier", "lexicon", "spans") if getattr(flags, name)
    )


def find_spans(flags: argparse.Namespace, runner: beam_runner.Runner) -> None:
    """Writes the spans that the flags ask for."""
    remote.check_output(flags.output)
    documents.check_apart(flags.input, flags.output)
    files = documents.find(flags.input)
    asked: dict[str, Any] = {}
    if flags.unit:
        min_score = flags.min_score or MIN_SCORE
        if not MIN_SCORE <= min_score <= MAX_SCORE:
            raise ValueError(f"--min_score must be {MIN_SCORE} to {MAX_SCORE}, got {min_score}")
        specs = scorers.parse_specs(flags.scorers or BUNDLED)
        loaded = scorers.load_scorers(specs)
        asked = {"unit": parse_unit(flags.unit), "min_score": min_score, "scorers": scorers.describe(specs, loaded)}
        scorers.keep(asked["scorers"], loaded)
    elif flags.token_classifier:
        facts = annotator.load(flags.token_classifier).facts
        asked = {"token_classifier": flags.token_classifier, "token_facts": facts}
    elif flags.lexicon:
        asked = {"lexicon": read_lexicon(documents.read_text(flags.lexicon), flags.lexicon)}
    else:
        asked = {"own": span_files.own_files(files, documents.find(flags.spans))}
    limit = documents.limit_from_flags(flags)
    work = span_files.SpanWork(flags.output.rstrip("/"), flags.text_column, limit=limit, **asked)
    manifest = join(files, work, runner)
    totals, labels = manifest["totals"], manifest["labels"]
    shown = ", ".join(f"{name or 'none'} {count}" for name, count in labels.items())
    _logger.info(
        "%s: %d spans in %d rows (%d malformed, %d units unscored); labels: %s",
        *(work.output, totals["spans"], totals["rows"], totals["malformed"], totals["unscored"], shown),
    )


def check(files: list[documents.DocumentFile], folders: tuple[annotations.AnnotationFolder, ...]) -> int:
    """The number of rows of all files. Raises ValueError or OSError for the first that its annotations don't fit."""
    return sum(joining.join_file(file.path, folders, None) for file in Bar(files, unit="file", disable=None))


def join(
    files: list[documents.DocumentFile], work: joining.JoinWork | span_files.SpanWork, runner: beam_runner.Runner
) -> dict[str, Any]:
    """Does what is missing in `work.output`; the manifest."""
    out = OutputFolder(work.output)
    with out.only_writer():
        plan = joining.make_plan(out, work, files)
        started = time.monotonic()
        before = len(plan.shards) - len(plan.jobs)
        with Bar(total=len(plan.shards), initial=before, unit="file", disable=None) as bar:
            progress = FolderProgress(out, bar, lambda: bar.update(len(out.sizes(RECORDS)) - bar.n))
            beam_runner.run_jobs(plan.jobs, work, runner, progress)
            progress.show()
        out.raise_failures()
        _logger.info("%s: %d files in %.1f s", work.output, len(plan.jobs), time.monotonic() - started)
        return joining.finish(out, plan, work)


if __name__ == "__main__":
    cli.run(main, arguments())
