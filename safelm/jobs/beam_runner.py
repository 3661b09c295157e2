"""Runs independent jobs on Apache Beam, on the runner that the flags choose.

A job is a small value that names its input (a file or a part of one) and holds no document, so Beam can't log a text.
Each worker process loads the resources of the jobs (a model) once.

Runners, chosen by --runner:

    local      Beam's own runner on this machine, FnApiRunner, a process for each core (the default)
    portable   any job service: `-- --job_endpoint=HOST:PORT`; without one, a job service inside this process
    flink      `-- --flink_master=HOST:PORT`, or a Flink job service by --job_endpoint
    spark      `-- --spark_master_url=spark://HOST:PORT`, or a Spark job service by --job_endpoint
    dataflow   `-- --project=P --region=R --temp_location=gs://...` (needs `pip install 'apache-beam[gcp]'`)

Flags after `--` are Beam's. The machines of flink, spark and dataflow need SafeLM: name an image that has it by
`--environment_type=DOCKER --environment_config=IMAGE` or `--sdk_container_image=IMAGE`.
"""

import argparse
import contextlib
import dataclasses
import importlib
import logging
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safelm.io import cores, files
from safelm.jobs.beam_jobs import Work, Worker, kind_and_place
from safelm.jobs.parent import LIVENESS_VARIABLE

RUNNERS = {
    "local": ("apache_beam.runners.portability.fn_api_runner", "FnApiRunner"),
    "portable": ("apache_beam.runners.portability.portable_runner", "PortableRunner"),
    "flink": ("apache_beam.runners.portability.flink_runner", "FlinkRunner"),
    "spark": ("apache_beam.runners.portability.spark_runner", "SparkRunner"),
    "dataflow": ("apache_beam.runners.dataflow.dataflow_runner", "DataflowRunner"),
}
_REFUSED = {
    "dask": "Beam's DaskRunner loses records (512 of 1,003 came out in a trial)",
    "direct": "Beam's DirectRunner tries to download another program; `local` runs on this machine without",
    "prism": "Beam's PrismRunner downloads its program; `local` runs on this machine without",
}
_WORKER_THREADS = ("PJRT_NPROC", "OMP_NUM_THREADS", "RAYON_NUM_THREADS")
_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 10.0
_REASON_CHARACTERS = 400
_END_SECONDS = 3.0  # for threads of a pipeline that is given up

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Runner:
    """A Beam runner.

    Attributes:
      name: one of RUNNERS.
      workers: number of worker processes; 0 lets the runner decide (here: one per core).
      beam_flags: flags passed to Beam.
    """

    name: str = "local"
    workers: int = 0
    beam_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        short = self.name.lower().removesuffix("runner")
        if short in _REFUSED:
            raise ValueError(f"--runner={self.name}: {_REFUSED[short]}; choose one of {', '.join(RUNNERS)}")
        if self.name not in RUNNERS:
            raise ValueError(f"--runner={self.name}: choose one of {', '.join(RUNNERS)}")
        if self.workers < 0:
            raise ValueError(f"--workers must be 0 (as many as there are cores) or more, got {self.workers}")
        if self.name == "spark" and self.workers:
            raise ValueError("--workers: Spark decides how many there are, by its own settings")

    @property
    def is_here(self) -> bool:
        """Whether all workers are processes on this machine."""
        return self.name == "local"

    def may_stay_here(self, jobs: int) -> bool:
        """Whether the workers of `jobs` jobs may be threads of this process."""
        return self.name == "portable" or (self.is_here and local_workers(self, jobs) == 1)


def add_flags(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Adds --runner, --workers and Beam's own flags after `--`.

    Args:
      default: the runner without --runner; None if the command decides by its input.
    """
    shown = f"Apache Beam runner: {', '.join(RUNNERS)} (default: {default or 'by the input'})"
    parser.add_argument("--runner", default=default, help=shown)
    parser.add_argument(
        "--workers", type=int, default=0, help="number of worker processes (default: depends on the machine)"
    )
    parser.add_argument("beam_flags", nargs="*", metavar="-- --BEAM_FLAG", help="Beam's own flags, after --")


def from_flags(flags: argparse.Namespace) -> Runner | None:
    """The runner chosen by parsed flags, if any. Raises ValueError naming the flag that is wrong or missing."""
    stray = [flag for flag in flags.beam_flags if not flag.startswith("--")]
    if stray and flags.beam_flags[0] == stray[0]:
        raise ValueError(f"unexpected argument {stray[0]!r}: Beam's own flags begin with -- and come after a bare --")
    if flags.runner is None:
        if flags.beam_flags:
            raise ValueError(f"{flags.beam_flags[0]}: flags after -- are Beam's and need a --runner")
        return None
    return Runner(flags.runner, flags.workers, tuple(flags.beam_flags))


def pipeline_options(runner: Runner, jobs: int) -> Any:
    """Beam's PipelineOptions for a runner and a number of jobs. Raises ValueError naming a missing flag."""
    from apache_beam.options.pipeline_options import PipelineOptions

    own = ["--default_sdk_harness_log_level=WARNING", *runner.beam_flags]  # below that workers may log elements
    given = PipelineOptions(own).get_all_options(drop_default=True)
    endpoint = given.get("job_endpoint")
    foreign = PipelineOptions(own).get_all_options(drop_default=True, retain_unknown_options=True).keys() - given.keys()
    if foreign and (runner.is_here or (runner.name == "portable" and not endpoint)):
        raise ValueError(f"--{min(foreign)}: Beam has no such flag")
    if foreign:
        _logger.warning("Beam knows no flag --%s here; it is left to the runner", ", --".join(sorted(foreign)))
    if runner.name == "local":
        own += [f"--direct_num_workers={local_workers(runner, jobs)}"]
    elif runner.name == "portable":
        own += [] if endpoint else ["--job_endpoint=embed"]
        own += [] if given.get("environment_type") else ["--environment_type=LOOPBACK"]
        own += [f"--sdk_worker_parallelism={runner.workers}"] if runner.workers else []
    elif runner.name == "flink":
        _require(runner, given, ("flink_master", "job_endpoint"))
        own += [f"--parallelism={runner.workers}"] if runner.workers else []
    elif runner.name == "spark":
        _require(runner, given, ("spark_master_url", "job_endpoint"))
    else:
        for name in ("project", "region", "temp_location"):
            _require(runner, given, (name,))
        own += [f"--num_workers={runner.workers}", f"--max_num_workers={runner.workers}"] if runner.workers else []
    return PipelineOptions(own)


def _require(runner: Runner, given: dict[str, Any], names: Sequence[str]) -> None:
    if not any(given.get(name) for name in names):
        flags = " or ".join(f"--{name}=..." for name in names)
        raise ValueError(f"--runner={runner.name} needs {flags} behind --")


def local_workers(runner: Runner, jobs: int) -> int:
    """The number of processes of the local runner: the requested number or one per core, but no more than jobs."""
    return max(1, min(runner.workers or len(cores.usable()), jobs))


def run_jobs(jobs: Sequence[Any], work: Work, runner: Runner, on_tick: Callable[[], object] = lambda: None) -> None:
    """Runs every job at least once (a cluster may repeat one).

    Jobs are dealt out in turn, so put large ones first. Failed jobs are reported by `work.failed` while the others go
    on. An interrupt ends the local workers.

    Args:
      on_tick: called every now and then while jobs run.

    Raises OSError if a worker process dies or the pipeline itself fails.
    """
    if not jobs:
        return
    beam = import_beam()
    options = pipeline_options(runner, len(jobs))
    module, name = RUNNERS[runner.name]
    try:
        kind = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"--runner={runner.name}: Beam lacks a part of it here ({error})") from error
    here = runner.is_here and local_workers(runner, len(jobs)) > 1
    arguments = {"default_environment": _worker_processes()} if here else {}
    pipeline = beam.Pipeline(runner=kind(**arguments), options=options)
    _ = (
        pipeline
        | "jobs" >> beam.Create(list(jobs), reshuffle=False)
        | "deal out" >> beam.Reshuffle()
        | "work" >> beam.Map(Worker(work))
    )
    if runner.is_here:
        _run_here(pipeline, local_workers(runner, len(jobs)), on_tick)
    else:
        _run_elsewhere(pipeline, on_tick)


def _worker_processes() -> Any:
    from apache_beam.transforms import environments

    command = f"exec {shlex.quote(sys.executable)} -m safelm.jobs.beam_worker"
    return environments.SubprocessSDKEnvironment.from_command_string(command)


def import_beam() -> Any:
    """Imports Beam and limits its log to errors. Raises ValueError if it is not installed."""
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    logging.getLogger("apache_beam.runners.worker.data_plane").setLevel(logging.CRITICAL)  # a peer that is gone
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of parts of it that are not installed
    try:
        import apache_beam
        import apache_beam.runners.portability.fn_api_runner
    except ModuleNotFoundError as error:
        raise ValueError(f"Apache Beam is not installed ({error}): scripts/install.sh scoring") from error
    finally:
        logging.disable(disabled)
    return apache_beam


def _run_here(pipeline: Any, workers: int, on_tick: Callable[[], object]) -> None:
    """Runs the pipeline in another thread, so that an interrupt or a dead worker stops it at once."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            pipeline.run().wait_until_finish()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="beam", daemon=True)
    with _watch_threads() as dead_workers:
        try:
            with _liveness(workers):
                thread.start()
                while thread.is_alive():
                    thread.join(_POLL_SECONDS)
                    on_tick()
                    if dead_workers:
                        raise OSError(
                            "a worker process died (killed, or out of memory): run the same command again, with fewer "
                            "--workers; finished shards are kept"
                        )
        finally:
            thread.join(_END_SECONDS)
    if failures:
        raise OSError(f"the Beam pipeline failed: {kind_and_place(failures[0])}") from None


def _run_elsewhere(pipeline: Any, on_tick: Callable[[], object]) -> None:
    from apache_beam.runners.runner import PipelineState

    _check_answers(pipeline.options.get_all_options().get("job_endpoint"))
    try:
        result = pipeline.run()
    except Exception as error:  # the runner's own clients raise what they like; nothing has read a document yet
        said = (str(error).strip() or "no reason given").splitlines()[0][:_REASON_CHARACTERS]
        raise OSError(f"the Beam pipeline could not be started: {type(error).__name__}: {said}") from error
    try:
        while not PipelineState.is_terminal(result.state):
            time.sleep(_POLL_SECONDS)
            on_tick()
    except (RuntimeError, OSError) as error:
        raise OSError(f"the Beam pipeline failed: {kind_and_place(error)}") from error
    if result.state != PipelineState.DONE:
        raise OSError(f"the Beam pipeline ended as {result.state}: see the runner's own log")


def _check_answers(endpoint: str | None) -> None:
    """Raises OSError if nothing listens at a job service's address, since Beam would wait for minutes."""
    host, _, port = (endpoint or "embed").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"--job_endpoint={endpoint}: no job service answers there ({error})") from error


@contextlib.contextmanager
def _watch_threads() -> Iterator[list[str]]:
    """A list to which Beam's watching thread adds the death of a worker process."""
    dead: list[str] = []
    former = threading.excepthook

    def hook(arguments: Any) -> None:
        if arguments.thread is not None and arguments.thread.name == "run_worker":
            dead.append(str(arguments.exc_value))
        elif "RpcError" not in [kind.__name__ for kind in arguments.exc_type.__mro__]:  # what follows from it
            former(arguments)

    threading.excepthook = hook
    try:
        yield dead
    finally:
        threading.excepthook = former


@contextlib.contextmanager
def _liveness(workers: int) -> Iterator[None]:
    """Context manager while which worker processes live and share the cores.

    Workers wait for the lock of a file that this process holds. However this process ends, the lock is released and the
    workers end too.
    """
    if workers == 1:
        yield
        return
    threads = str(max(1, len(cores.usable()) // workers))
    with tempfile.NamedTemporaryFile(prefix="safelm-beam-") as file:
        files.wait_for_lock(file)
        wanted = dict.fromkeys(_WORKER_THREADS, threads) | {LIVENESS_VARIABLE: file.name}
        former = {name: os.environ.get(name) for name in wanted}
        os.environ.update({name: value for name, value in wanted.items() if former[name] is None})
        try:
            yield
        finally:
            for name, value in former.items():
                if value is None:
                    os.environ.pop(name, None)
