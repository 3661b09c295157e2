"""Caches SeqIO tasks as token stores: runs each task as SeqIO does and stores the tokens for random access.

For every task and split this writes the folder OUTPUT/<source name>/<split>, a token store (see safelm.data.store): a
shard for each source file, and the manifest last, with the task, the vocabulary's hash, counts and checksums.
A killed run leaves no store without its shards; the same command again keeps the finished shards and does the rest.
Finished stores are only checked, which in a bucket takes no right to write.
A folder begun with other settings, another vocabulary or other input files is an error that names the difference.
Malformed rows are kept in OUTPUT/quarantine/<source name>/<split>/. With an OUTPUT on gs:// every finished shard is
uploaded and removed here (see safelm.caching.upload). Document texts are never logged.

Much input, --workers or --runner put the work on Apache Beam (see safelm.jobs.beam_runner), else it is done in this
process: the bytes are the same.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safelm import cli, documents
from safelm.caching.beam import write_on_beam
from safelm.caching.plan import StorePlan, find_tasks, plan_store
from safelm.caching.shards import UNMARKED, CacheJob, TaskModule, write_shard
from safelm.caching.upload import Bucket, NotHeldError, push_folder
from safelm.data.shard import ShardInfo
from safelm.io import cores, files, lease, remote
from safelm.io.cache import staging_folder
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.text import named_templates
from safelm.text.tokenizer import Tokenizer

_PROCESSES_FROM_BYTES = 256 << 20  # of source files: below that starting TensorFlow in several processes is slower

_logger = logging.getLogger("safelm.cache_tasks")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.cache_tasks",
        __doc__,
        "python -m safelm.cache_tasks --tasks=raw_web,safeweb --data_dir=corpus --tokenizer=tokenizer --output=tokens",
        buckets=("output",),
    )
    parser.add_argument(
        "--tasks", required=True, help="comma-separated names of sources, SeqIO tasks or mixtures (for all their tasks)"
    )
    parser.add_argument("--tokenizer", required=True, help="folder, hf:ORG/NAME, tokenizer.json or GGUF file")
    add_end = "token behind every document (default: <|endoftext|> or <|end_of_text|>, else the tokenizer's eos_token)"
    parser.add_argument("--document_end", default="", metavar="TOKEN", help=add_end)
    parser.add_argument("--chat_template", default="", metavar="NAME|FILE", help=named_templates.HELP)
    parser.add_argument("--output", required=True, help="folder of the token stores, local or gs://")
    parser.add_argument("--data_dir", help="folder or URL (gs://, hf://) that holds the corpus folders")
    parser.add_argument("--module", default="data_tasks.tasks", help="module that registers the tasks")
    parser.add_argument(
        "--corpus", action="append", default=[], metavar="NAME=PLACE", help="another place for one corpus folder"
    )
    parser.add_argument("--tfds_data_dir", help="folder of the corpora named tfds:NAME")
    parser.add_argument("--splits", default="train,validation", help="splits to cache; any but train may be missing")
    parser.add_argument("--tag_rate", type=float, help="probability of the harm tag at a word gap (0.05)")
    parser.add_argument("--min_harm_score", type=int, help="lowest harm score whose documents are tagged (4)")
    parser.add_argument("--seed", type=int, help="seed of tags and speaker names (0)")
    parser.add_argument(
        "--validation_fraction", type=float, help="share held out if there are no validation files (0.01)"
    )
    parser.add_argument("--text_column", help="text column of web documents (text)")
    parser.add_argument(
        "--id_column", help="id column of web documents (id; default for rows without: a hash of the text)"
    )
    parser.add_argument("--score_column", help="column with harm scores 0 to 5 (default: see safelm.documents.harm)")
    parser.add_argument("--annotations", metavar="FOLDER,...", help="annotations of raw_web by score or annotate")
    parser.add_argument(
        "--interventions", metavar="JSON", help="parameters of interventions that aren't the defaults, as a JSON object"
    )
    parser.add_argument(
        "--allow_unmarked",
        action="store_true",
        help="make a store also where nothing of what is beside the text (such as spans) is what its task marks",
    )
    documents.add_limit_flags(parser)
    beam_runner.add_flags(parser, default=None)
    return parser


def main(flags: argparse.Namespace) -> None:
    """Writes the stores that the flags ask for; ValueError or OSError with one clear line for bad input."""
    output = flags.output.rstrip("/")
    remote.check_output(output)
    if flags.workers < 0:
        raise ValueError(f"--workers must be 0 (by the machine and the input) or more, got {flags.workers}")
    runner = beam_runner.from_flags(flags)
    tokenizer = Tokenizer.from_pretrained(flags.tokenizer)
    tokenizer = tokenizer.with_document_end(flags.document_end).with_chat_template(flags.chat_template)
    if remote.is_remote(output) and not remote.exists(output):
        remote.check_writable(output)  # before much is read
    module = TaskModule(flags.module, _register_arguments(flags, tokenizer))
    registration = module.load()
    tasks = find_tasks(_names("--tasks", flags.tasks), registration)
    settings = dict(getattr(registration, "settings", {})) | {"module": flags.module}
    with contextlib.ExitStack() as locks:
        plans = []
        for source_name, task_name in tasks.items():
            for split in _names("--splits", flags.splits):
                directory = os.path.join(staging_folder(output), source_name, split)
                what = (source_name, task_name, split, directory, tokenizer, settings)
                plan_it = functools.partial(plan_store, *what, allows_unmarked=flags.allow_unmarked)
                locks.enter_context(_only_writer(directory))
                plan = _plan_in_bucket(plan_it, output, directory, locks) if remote.is_remote(output) else plan_it()
                plans += [plan] if plan else []
        if not plans:
            raise ValueError(f"--splits {flags.splits}: no task has one of these splits")
        try:
            _run(plans, module, flags.workers, output, runner)
        except OSError as error:
            raise _advise(error) from error
        if any(plan.bucket and plan.bucket.is_held for plan in plans):
            push_folder(_quarantine(output), f"{output}/quarantine")


def _plan_in_bucket(
    plan_it: Callable[..., StorePlan | None], output: str, directory: str, locks: contextlib.ExitStack
) -> StorePlan | None:
    """Plans a store in a bucket: under its lease, which `locks` then hold, unless it is whole."""
    url = f"{output}/{os.path.relpath(directory, staging_folder(output))}"
    with contextlib.suppress(NotHeldError):
        plan = plan_it(bucket=Bucket(url, directory, is_held=False))
        if plan is None or not plan.needs_writing:
            return plan
    remote.check_writable(output)
    locks.enter_context(lease.held(url))
    return plan_it(bucket=Bucket(url, directory))


def _register_arguments(flags: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `register` of a task module is called with: only what was asked for, so that its own defaults hold."""
    corpora = {}
    for entry in flags.corpus:
        name, separator, place = entry.partition("=")
        if not (name and separator and place):
            raise ValueError(f"--corpus must be NAME=PLACE, got {entry!r}")
        corpora[name] = place
    limit = documents.limit_from_flags(flags)
    wanted: dict[str, Any] = {
        "data_dir": flags.data_dir,
        "tokenizer": tokenizer,
        "tfds_data_dir": flags.tfds_data_dir,
        "corpora": corpora,
        "quarantine_dir": _quarantine(flags.output.rstrip("/")),
        "settings": _given(flags, "tag_rate", "seed", "min_harm_score", "validation_fraction"),
        "annotations": flags.annotations,
        "interventions": _parameters(flags.interventions),
        "columns": _given(flags, "text_column", "id_column", "score_column"),
        "limit": {} if limit == documents.MalformedLimit() else dataclasses.asdict(limit),
    }
    return {name: value for name, value in wanted.items() if name == "data_dir" or value not in (None, {})}


def _parameters(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"--interventions: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"--interventions: must be an object, got {text}")
    return found


def _quarantine(output: str) -> str:
    return os.path.join(staging_folder(output), "quarantine")


def _given(flags: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def _names(flag: str, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{flag} names nothing: {value!r}")
    return list(dict.fromkeys(names))


@contextlib.contextmanager
def _only_writer(directory: str) -> Iterator[None]:
    """Holds a lock on a store's folder; the system lets go of it when the process ends, however it ends."""
    os.makedirs(directory, exist_ok=True)
    busy = f"{directory}: another process is writing this token store"
    with files.locked(os.path.join(directory, ".lock"), busy):
        yield


def _run(
    plans: Sequence[StorePlan], module: TaskModule, workers: int, output: str, runner: beam_runner.Runner | None
) -> None:
    """Writes all missing shards, and every store's manifest as soon as it has them all."""
    jobs = [job for plan in plans for job in plan.jobs]
    started = time.monotonic()
    for plan in plans:
        for info in plan.done.values():
            if plan.bucket:
                plan.bucket.push_shard(info, plan.num_shards)
        if not plan.jobs:
            _complete(plan, started)
    workers = min(workers or _automatic_workers(plans), len(jobs))
    if runner is None and workers > 1:
        runner = beam_runner.Runner("local", workers)
    if runner is not None:
        write_on_beam(plans, module, output, runner)
        for plan in plans:
            if plan.jobs:
                _complete(plan, started)
        return
    by_store = {plan.directory: plan for plan in plans}
    with Bar(total=len(jobs), unit="shard", desc="caching", disable=None) as bar:
        for job, info in _write_here(jobs, bar):
            plan = by_store[job.directory]
            plan.done[job.index] = info
            if plan.bucket:
                plan.bucket.push_shard(info, plan.num_shards)
            bar.update()
            if len(plan.done) == plan.num_shards:
                _complete(plan, started)


def _automatic_workers(plans: Sequence[StorePlan]) -> int:
    if sum(plan.pending_bytes for plan in plans) < _PROCESSES_FROM_BYTES:
        return 1
    if importlib.util.find_spec("apache_beam") is None:
        _logger.info("one process does the work: for more, scripts/install.sh beam")
        return 1
    return len(cores.usable())


def _write_here(jobs: Sequence[CacheJob], bar: Bar) -> Iterator[tuple[CacheJob, ShardInfo]]:
    documents = 0

    def count(more: int) -> None:
        nonlocal documents
        documents += more
        bar.set_postfix_str(f"{documents} documents", refresh=False)
        bar.update(0)

    for job in jobs:
        yield job, write_shard(job, count)


def _complete(plan: StorePlan, started: float) -> None:
    manifest = plan.finish()
    seconds, place = time.monotonic() - started, plan.place
    if manifest is None:
        _logger.warning("%s: no document is in this split; no store written", place)
        return
    extra = manifest.extra
    if columns := extra["score_columns"]:
        shown = ", ".join(f"{name} ({rows} rows)" for name, rows in columns.items())
        _logger.info("%s: harm scores were read from %s", place, shown)
    unmarked = extra.get(UNMARKED, 0)
    if unmarked == manifest.num_documents:
        _logger.warning("%s: nothing is marked: no document has %s", place, plan.sought)
    _logger.info(
        "%s: %s, %d tokens, %d harm tags, %d literal tags removed, %d bytes lost, %d rows malformed; %.1f s",
        place,
        f"{manifest.num_documents} documents" + (f" ({unmarked} without {plan.sought})" if unmarked else ""),
        manifest.num_tokens,
        manifest.num_tag_tokens,
        extra.get("num_removed_tags", 0),
        manifest.num_lost_bytes,
        manifest.num_quarantined,
        seconds,
    )


def _advise(error: OSError) -> OSError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    advice = "free some space and run the same command again, finished shards are kept"
    return OSError(error.errno, f"{error.strerror}; {advice}", error.filename)


if __name__ == "__main__":
    cli.run(main, arguments())
