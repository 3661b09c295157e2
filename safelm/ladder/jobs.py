"""Does one job of the ladder, and runs processes that do all of them.

Any number of workers share a folder. The process that holds a job's lock owns the job; the system releases the lock
when the process ends. A job is done once its file under `done/` is complete. An interrupted training continues from its
last checkpoint; an interrupted measurement starts again.
"""

import contextlib
import gc
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from safelm.io import files, host_memory, records
from safelm.io.progress import Bar
from safelm.ladder.measure import measure
from safelm.ladder.plan import BEFORE, MODELS, Job, needed_by, trained
from safelm.ladder.processes import run_command
from safelm.train import run as train

_LOOK_AGAIN_S = 1.0
_JOBS_KEPT = 16


def tokens_folder(output: pathlib.Path, tag_rate: float) -> pathlib.Path:
    """The folder of the token stores tagged at a rate."""
    return output / f"tokens-rate-{round(100 * tag_rate)}"


def training_config(config: ConfigDict, output: pathlib.Path, job: Job) -> ConfigDict:
    """The `safelm.train` config of a training job: its stage's, with the job's data, seed and initial checkpoint."""
    stage = ConfigDict(config.stages[job.stage]).copy_and_resolve_references()
    model = MODELS[job.model]
    with stage.unlocked():
        stage.seed = job.seed
        stage.data.root = str(tokens_folder(output, model.tag_rate))
        before = needed_by(job)
        if before is None:
            stage.tokenizer = str(output / "tokenizer") if not config.init_checkpoint else ""
            stage.init_checkpoint = config.init_checkpoint
        else:
            stage.tokenizer, stage.init_checkpoint = "", str(model_folder(output, before))
        if model.is_routed and before is None:
            stage.routing = config.routing
        stage.data.phases = _phases(config, job)
        if model.size:
            stage.model.update(config.sizes[model.size - 1])
            stage.total_steps = config.budgets[model.budget - 1]
            stage.optimizer.warmup_steps = max(1, stage.total_steps // 20)
    return stage.lock()


def workdir(output: pathlib.Path, job: Job) -> pathlib.Path:
    """The folder of a training job's checkpoints."""
    return output / "models" / job.name


def model_folder(output: pathlib.Path, job: Job) -> pathlib.Path:
    """The folder of the model that a training job gives: of a routed pretraining without its designated units."""
    is_ablated = MODELS[job.model].is_routed and not BEFORE[job.stage]
    return workdir(output, job).with_name(f"{job.name}.ablated") if is_ablated else workdir(output, job)


def _phases(config: ConfigDict, job: Job) -> tuple[dict[str, Any], ...]:
    model = MODELS[job.model]
    if not BEFORE[job.stage]:
        raw, late = dict(config.rates.raw), {"start": model.start, "rates": dict(config.rates[model.rung])}
        phases = (late,) if not model.start else ({"start": 0.0, "rates": raw}, late)
        return phases if model.end == 1.0 else (*phases, {"start": model.end, "rates": raw})
    if job.stage != "instruction":
        return ({"start": 0.0, "rates": dict(config.rates[job.stage])},)
    chats = dict(config.rates[model.instruction_mixture])
    shares = {name: share * (1 - config.replay) for name, share in chats.items()}
    web = {name: share * config.replay for name, share in config.rates[model.rung].items() if config.replay}
    return ({"start": 0.0, "rates": shares | web},)


def done_file(output: pathlib.Path, job: Job) -> pathlib.Path:
    """The file that marks a job as done; of a measurement, it holds the result."""
    return output / "done" / f"{job.name}.json"


def read_done(output: pathlib.Path, job: Job) -> dict[str, Any] | None:
    """A job's result, or None until it is done."""
    path = done_file(output, job)
    return records.read(path, "remove it, and the job is done again") if path.exists() else None


def reopen(output: pathlib.Path, jobs: Sequence[Job]) -> None:
    """Has the trainings done again that an unfinished job goes on from and whose checkpoint isn't there.

    A record has no checkpoint, and models may share a pretraining.

    Args:
      jobs: what a job needs stands before it.
    """
    for job in reversed(jobs):
        before = needed_by(job)
        if before is not None and not done_file(output, job).exists() and not model_folder(output, before).exists():
            done_file(output, before).unlink(missing_ok=True)


def run_job(config: ConfigDict, output: pathlib.Path, job: Job) -> None:
    """Does a job and marks it as done."""
    started = time.monotonic()
    if job.method:
        result = measure(config, output, job, model_folder(output, trained(job.seed, job.model, job.stage)))
    else:
        stage = training_config(config, output, job)
        train.train(stage, str(workdir(output, job)))
        if (folder := model_folder(output, job)) != workdir(output, job) and not folder.exists():
            whole = f"--source={workdir(output, job)}"
            run_command("safelm.convert", whole, f"--target={folder}", "--to=safelm", "--ablate")
        result = {"tokens": stage.total_steps * stage.batch_size * stage.seq_len}
    done_file(output, job).parent.mkdir(exist_ok=True)
    records.write(done_file(output, job), result | {"seconds": round(time.monotonic() - started, 1)})


def work(
    config: ConfigDict, output: pathlib.Path, jobs: Sequence[Job], *, note: Callable[[str], None], pause: str = ""
) -> None:
    """Does jobs in order, skipping those that other workers hold, until all are done.

    While the file `pause` exists, no further job begins.
    """
    mine = 0
    with Bar(total=len(jobs), unit="job", disable=None) as progress:
        while left := [job for job in jobs if not done_file(output, job).exists()]:
            progress.update(len(jobs) - len(left) - progress.n)
            for job in () if pause and os.path.exists(pause) else left:
                before = needed_by(job)
                if before is not None and not done_file(output, before).exists():
                    continue
                with _claim(output, job) as is_mine:
                    if is_mine and not done_file(output, job).exists():
                        run_job(config, output, job)
                        note(f"{job.name}: {read_done(output, job)['seconds']} s")
                        mine += 1
                        if mine % _JOBS_KEPT == 0:  # each leaves compiled programs behind, some 35 MB
                            jax.clear_caches()
                        gc.collect()
                        host_memory.give_back()
                        break
            else:
                time.sleep(_LOOK_AGAIN_S)
        progress.update(len(jobs) - progress.n)


@contextlib.contextmanager
def _claim(output: pathlib.Path, job: Job) -> Iterator[bool]:
    """Context manager: whether this process holds the job's lock."""
    folder = output / "locks"
    folder.mkdir(exist_ok=True)
    with open(folder / job.name, "w") as file:
        if not files.try_lock(file):
            yield False
            return
        yield True
        os.unlink(file.name) if done_file(output, job).exists() else None
