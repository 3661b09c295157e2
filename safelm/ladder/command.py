"""The ladder's command: its flags, its worker processes, its report."""

import json
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from safelm.io import cores, records, remote
from safelm.jobs.parent import end_with_parent
from safelm.ladder import data as ladder_data
from safelm.ladder import design as ladder_design
from safelm.ladder import jobs as ladder_jobs
from safelm.ladder import records as ladder_records
from safelm.ladder import report as ladder_report
from safelm.ladder import scaling
from safelm.ladder.plan import SCALING, Job, chosen_models, plan_jobs, study_of
from safelm.train import config_fields
from safelm.train import flags as train_flags

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the study.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Number of processes, each on a core of its own.")
_PLAN = flags.DEFINE_bool("plan", False, "Only print what a study could tell, from the pilot in --output.")
_PLANNED_SEEDS = flags.DEFINE_list("planned_seeds", ["3", "5", "8", "12"], "Numbers of seeds to plan with.")
_PLANNED_PROMPTS = flags.DEFINE_integer("planned_prompts", 0, "Harmful prompts to plan with; 0: as the pilot.")
_STUDY = flags.DEFINE_string("study", None, "A study of configs/ladder.py: short for --config=configs/ladder.py:NAME.")
_RECORDS = flags.DEFINE_string("records", None, "Folder of finished rungs' records: read first, added to.")
_PAUSE_FILE = flags.DEFINE_string("pause_file", "", "While this file exists no further job begins.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the report of what has been measured.")


def run(config: ConfigDict, output: str, *, workers: int, records_folder: str = "", pause_file: str = "") -> None:
    """Prepares the data, does all jobs and writes the report.

    Args:
      workers: number of processes.
      records_folder: of records of finished rungs, which are not done again; others are added.
      pause_file: while it exists, no further job begins.

    Raises ValueError or OSError naming what can't be used.
    """
    folder = pathlib.Path(output)
    models = chosen_models(config.models)
    ladder_data.check(config)
    _keep_config(config, folder)
    jobs = plan_jobs(models, config.seeds, config.methods, study_of(config))
    if records_folder:
        ladder_records.restore(config, folder, pathlib.Path(records_folder))
    ladder_jobs.reopen(folder, jobs)
    ended = ""
    if any(ladder_jobs.read_done(folder, job) is None for job in jobs):
        ladder_data.prepare(config, folder, models)
        if study_of(config) is SCALING:
            _predict(config, output, workers, records_folder, pause_file)
        ended = _work(config, output, workers, records_folder, pause_file)
    ladder_report.write(config, folder)
    _check_done(folder, jobs, ended)


def _check_done(folder: pathlib.Path, jobs: Sequence[Job], ended: str) -> None:
    """Raises OSError for jobs that aren't done.

    Args:
      ended: how workers ended that had not finished, in words.
    """
    if left := [job for job in jobs if ladder_jobs.read_done(folder, job) is None]:
        first = f"{len(left)} of {len(jobs)} jobs aren't done, the first is {left[0].name}"
        raise OSError(f"{first}{ended}: see {folder}/logs")


def _predict(config: ConfigDict, output: str, workers: int, records_folder: str, pause_file: str) -> None:
    """Does the sizes that a law is fitted to, and writes what it says of the size that is held out."""
    fitted = config.copy_and_resolve_references()
    fitted.models = tuple(model.name for model in chosen_models(config.models) if model.name in SCALING.first)
    ended = _work(fitted, output, workers, records_folder, pause_file)
    folder = pathlib.Path(output)
    _check_done(folder, plan_jobs(chosen_models(fitted.models), config.seeds, config.methods, SCALING), ended)
    scaling.predict(config, folder, ladder_report.collect(config, folder))


def _work(config: ConfigDict, output: str, workers: int, records_folder: str, pause_file: str) -> str:
    """Does the jobs that are left, in processes of their own; says which of these were ended by a signal."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=_worker, args=(config.to_json_best_effort(), output, number, workers, records_folder, pause_file)
        )
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return how_ended([process.exitcode or 0 for process in processes])


def how_ended(exit_codes: Sequence[int]) -> str:
    """Which workers were ended by a signal, in words that follow others; "" if none was."""
    by_signal = [(number, signal.Signals(-code)) for number, code in enumerate(exit_codes) if code < 0]
    hints = {signal.SIGKILL: " (out of memory?)"}
    return "".join(f"; worker {number} was ended by {by.name}{hints.get(by, '')}" for number, by in by_signal)


def _worker(settings: str, output: str, number: int, workers: int, records_folder: str, pause_file: str) -> None:
    """Starts one worker process, on a core of its own if there are several, with its log; it ends with its parent."""
    end_with_parent(signal.SIGTERM)  # a training saves and leaves
    folder = pathlib.Path(output)
    (folder / "logs").mkdir(exist_ok=True)
    log = (folder / "logs" / f"worker-{number}.txt").open("a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        own = cores.usable()
        os.sched_setaffinity(0, {own[number % len(own)]})
    absl_logging.set_verbosity(absl_logging.FATAL)
    from safelm.io import host_memory

    host_memory.keep_freed_memory()
    config = ConfigDict(json.loads(settings))
    jobs = plan_jobs(chosen_models(config.models), config.seeds, config.methods, study_of(config))

    def note(line: str) -> None:
        print(line, flush=True)
        if records_folder:
            ladder_records.save(config, folder, pathlib.Path(records_folder))
        ladder_report.write(config, folder)

    ladder_jobs.work(config, folder, jobs, note=note, pause=pause_file)


def _keep_config(config: ConfigDict, folder: pathlib.Path) -> None:
    """Stores the settings that decide the results.

    A setting that the folder's version of the package did not have is no other one, as for records.

    Raises ValueError if the folder holds a study with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / "config.json", json.loads(config.to_json_best_effort())
    free = ("seeds", "models", "methods")  # a study may be widened
    if path.exists():
        old = records.read(path, "choose another --output")
        same = [{name: value for name, value in each.items() if name not in free} for each in (old, new)]
        if name := ladder_records.changed(*same):
            line = next(line for line in config_fields.changed_fields(*same) if line.startswith(f"{name}:"))
            raise ValueError(f"--output={folder}: holds a study of other settings: {line}")
    records.write(path, new)


def _main(_: Sequence[str]) -> None:
    try:
        config = train_flags.CONFIG.value
        for flag, value, what in (("config", config, "a file of configs/"), ("output", _OUTPUT.value, "a folder")):
            if not value:
                raise ValueError(f"--{flag} is needed: {what}")
        remote.check_local_output(_OUTPUT.value)
        remote.check_local_output(_RECORDS.value or "", "--records")
        if _WORKERS.value < 1:
            raise ValueError(f"--workers={_WORKERS.value}: must be at least 1")
        if _PLAN.value:
            print(_planned(config))
            return
        if _REPORT.value:
            ladder_report.write(config, pathlib.Path(_OUTPUT.value))
        else:
            run(
                config,
                _OUTPUT.value,
                workers=_WORKERS.value,
                records_folder=_RECORDS.value or "",
                pause_file=_PAUSE_FILE.value,
            )
        results = pathlib.Path(_OUTPUT.value) / "results.md"
        if not results.exists():
            raise FileNotFoundError(f"--output={_OUTPUT.value}: nothing is measured yet")
        print(results.read_text())
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _planned(config: ConfigDict) -> str:
    if wrong := [text for text in _PLANNED_SEEDS.value if not text.isdigit()]:
        raise ValueError(f"--planned_seeds={wrong[0]}: want whole numbers, separated by commas")
    seeds = [int(text) for text in _PLANNED_SEEDS.value]
    return ladder_design.plan(config, pathlib.Path(_OUTPUT.value), seeds, _PLANNED_PROMPTS.value)


def _fail(line: str, code: int = 2) -> None:
    print("python -m safelm.ladder: " + " ".join(line.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def command() -> None:
    """Parses the command's flags and runs it; `--study=NAME` is `--config=configs/ladder.py:NAME`."""
    app.run(_main, flags_parser=lambda arguments: train_flags.parse(_with_config(arguments), _fail))


def _with_config(arguments: Sequence[str]) -> list[str]:
    study, file = "--study=", "--config=configs/ladder.py:"
    return [file + each.removeprefix(study) if each.startswith(study) else each for each in arguments]
