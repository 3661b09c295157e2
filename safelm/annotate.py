"""Joins annotations of a corpus to its rows, or checks that they belong together.

Annotations are made by safelm.score --output_rows=annotations: a small Parquet file for each file of the corpus, joined
by row, never by id. data_tasks, safelm.report_card and safelm.synthesize read them on the fly (--annotations), so that
no text need be copied. This command writes the joined rows where another program wants them:

    --join    OUTPUT has each input file with the columns of every folder beside its own: Parquet as Parquet with every
              type as it was, JSON lines as .jsonl.gz with their bytes kept. A stopped run goes on when the same command
              is given again
    --check   writes nothing: every file has annotations made from it, with a row for each of its rows and no other

--annotations takes folders by comma. Two that have the same column are refused; NAME=FOLDER puts NAME_ before the
columns of one.
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
from safelm.safety.scoring import joining

_logger = logging.getLogger("safelm.annotate")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.annotate",
        __doc__ + "\n" + beam_runner.__doc__.split("\n\n", 2)[2],
        "python -m safelm.annotate --join --input='web/*.parquet' --annotations=runs/scores --output=runs/joined\n"
        "  python -m safelm.annotate --check --input='web/*.parquet' --annotations=runs/scores,judge=runs/judged",
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--join", action="store_true", help="write the corpus's rows with their annotations")
    what.add_argument("--check", action="store_true", help="write nothing, look whether they belong together")
    add("--input", nargs="+", required=True, action="extend", metavar="FILES", help="files, folders or patterns")
    add("--annotations", required=True, metavar="FOLDER,...", help="folders of annotations, perhaps NAME=FOLDER")
    add("--output", help="folder to write, local or gs:// (with --join)")
    beam_runner.add_flags(parser, default="local")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Joins or checks; ValueError or OSError with one clear line for bad input."""
    runner = beam_runner.from_flags(flags)
    if bool(flags.output) != flags.join:
        raise ValueError("--join needs --output" if flags.join else "--check writes nothing: leave out --output")
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


def check(files: list[documents.DocumentFile], folders: tuple[annotations.AnnotationFolder, ...]) -> int:
    """The number of rows of all files. Raises ValueError or OSError for the first that its annotations don't fit."""
    return sum(joining.join_file(file.path, folders, None) for file in Bar(files, unit="file", disable=None))


def join(files: list[documents.DocumentFile], work: joining.JoinWork, runner: beam_runner.Runner) -> dict[str, Any]:
    """Joins what is missing in `work.output`; the manifest."""
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
        _logger.info("%s: %d files joined in %.1f s", work.output, len(plan.jobs), time.monotonic() - started)
        return joining.finish(out, plan, work)


if __name__ == "__main__":
    cli.run(main, arguments())
