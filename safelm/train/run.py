r"""Trains a model: pretraining, instruction tuning, finetuning, as the config says.

    python -m safelm.train --config=configs/quickstart.py:safety --workdir=runs/safety [--config.a.b=value ...]

The workdir (local or gs://) gets `config.json`, `tokenizer/`, `metrics.jsonl`, `events.jsonl`, `tensorboard/` and
`checkpoints/`. To resume, run the same command again: it goes on from the newest checkpoint, bit for bit as if it had
never stopped. SIGTERM and Ctrl-C save and end it with code 143 and 130; bad input or a disk that is full end it with 2,
numbers that aren't finite with 3. SIGUSR1 makes a profile of the next steps.
`--dry_run` checks everything, prints parameters, memory, tokens, steps, time and the settings that are not defaults,
and trains nothing. It needs no --workdir. A tokenizer, data or devices that are not there yet are named, not checked.

A decay of its own from a checkpoint of a wsd run's stable phase, which goes on unharmed (`safelm.train.resume`):

    python -m safelm.train --config=... --workdir=runs/decayed --config.branch.workdir=runs/trunk \
        --config.branch.step=50000 --config.optimizer.decay_steps=5000
"""

import collections
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("EPATH_USE_TF", "false")  # otherwise etils imports TensorFlow for gs:// where it is installed

import jax
import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from safelm import documents
from safelm.checkpoints import checkpoint
from safelm.io import records, remote
from safelm.models import sharding
from safelm.models.loss import LossSums
from safelm.train import clock as train_clock
from safelm.train import config as train_config
from safelm.train import data as train_data
from safelm.train import dry_run as train_dry_run
from safelm.train import events as train_events
from safelm.train import faults as train_faults
from safelm.train import flags as train_flags
from safelm.train import host_memory, processes
from safelm.train import metrics as train_metrics
from safelm.train import plan as train_plan
from safelm.train import preemption as train_preemption
from safelm.train import profile as train_profile
from safelm.train import program as train_program
from safelm.train import restore as train_restore
from safelm.train import resume as train_resume
from safelm.train import step as train_step
from safelm.train.optimizer import Schedule, make_schedule

_CONFIG = config_flags.DEFINE_config_file("config", help_string="File of configs/, with an optional :variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One process of several, which JAX finds by itself on TPU pods.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "Where JAX doesn't: HOST:PORT that process 0 takes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address: how many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator_address: which this is, from 0.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything, print the run's size, train nothing.")


def train(config: ConfigDict, workdir: str, *, dry_run: bool = False) -> None:
    """Runs a config to its last step, from the newest checkpoint in `workdir` if there is one.

    Raises ValueError or OSError for input that can't be used (the message names the field or file), OSError when the
    disk is full, FloatingPointError where `config.faults` halts the run (a loss that isn't finite, say), Preempted
    after a signal, when all is saved.
    """
    _set_compilation_cache(config.compilation_cache_dir)
    train_faults.check_config(config.faults)
    if dry_run:
        train_dry_run.dry_run(config, workdir)
        return
    run = train_config.resolve(config, workdir)
    config = run.config
    data = train_data.TrainData(config, run.tokenizer)
    settings = json.loads(config.to_json_best_effort())
    processes.agree(
        {"config": settings, "workdir": workdir, "tokenizer": run.tokenizer.hash, "data": data.fingerprints()}
    )
    mesh = sharding.make_mesh(config.mesh.to_dict())
    program, attention = train_program.make_program(config, run.model, mesh)
    learning_rate = _learning_rate(config)
    is_main = jax.process_index() == 0
    if is_main:
        print(train_plan.summary(config, run.model, data, mesh, attention), flush=True)
    processes.check_shared(workdir)
    remote.check_writable(workdir)  # now, not after an hour

    progress = train_metrics.Progress(
        total_steps=config.total_steps,
        tokens_per_step=config.batch_size * config.seq_len,
        flops_per_token=train_metrics.flops_per_token(run.model, config.seq_len),
        peak_flops=train_metrics.device_peak_flops(config.log.peak_flops),
        enabled=is_main,
    )

    def tell(event: str, step: int | None = None, **values: Any) -> None:
        """Says it and keeps it in the run's history."""
        progress.note(f"{event.replace('_', ' ')}, step {step}: " + "; ".join(f"{k} {v}" for k, v in values.items()))
        events.write(event, step, **values)

    keep = {"keep_last": config.checkpoint.keep_last, "keep_every": config.checkpoint.keep_every}
    with (
        train_events.Events(workdir, enabled=is_main) as events,
        train_preemption.Preemption(grace_s=config.faults.grace_s, note=progress.note) as preemption,
        train_profile.Profile(workdir, config.log, note=progress.note) as profile,
        checkpoint.Checkpoints(workdir, **keep) as checkpoints,
        jax.set_mesh(mesh),
    ):
        source = train_restore.Source(checkpoints, program, run, data, tell)
        state, step, meta = source.restore()
        faults, window = train_faults.Faults(config.faults), train_metrics.LossWindow()
        clock = train_clock.Clock(events.first_launch)
        kept = {"faults": faults, "window": window, "clock": clock}  # parts whose state is in the checkpoints
        for name, part in kept.items():
            part.load(meta.get(name))
        with train_metrics.MetricsLog(workdir, start_step=step, enabled=is_main) as log:
            if is_main:
                _store_config(workdir, run, progress.note)
            events.write("resume", step)
            with clock.aside("compile"):
                update, evaluate = train_program.compile_ahead(program, config, has_evaluation=bool(data.eval_stores))
                processes.barrier("compiled")  # the first collective waits for others for seconds only
            leave = processes.AnyProcess()

            def is_due(every_steps: int) -> bool:
                return step == config.total_steps or step % every_steps == 0

            def finish(values: dict[str, float]) -> bool:
                """Evaluates if it is time and writes the step's line; False if the evaluation was broken off."""
                if data.eval_stores and is_due(config.eval.every_steps):
                    with clock.aside("eval"):
                        losses = _evaluate(evaluate, data, program.batch_sharding, state.params, step, should_stop)
                    if losses is None:
                        return False
                    progress.note(f"step {step}  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
                    values = values | losses
                if values:
                    log.write(step, values | clock.take())
                return True

            def should_stop() -> bool:
                return leave(preemption.requested)

            if "unfinished" in meta:  # the run left in the evaluation after this step
                finish(meta["unfinished"])
            progress.start(step)
            batches = data.batches(step, program.batch_sharding)
            unread = collections.deque()  # (step, StepMetrics): read while the next update runs
            progress.restart_clock(step)
            clock.run()
            while step < config.total_steps:
                step += 1
                with clock.data_wait():
                    batch = next(batches)
                limits = (np.float32(limit) for limit in faults.limits(step))
                controls = train_step.Controls(np.float32(learning_rate(step - 1)), *limits)
                with profile.step(step, asked=preemption.take_profile_request()):
                    state, step_metrics = update(state, batch, controls)
                unread.append((step, step_metrics))
                preemption.begin()

                log_now, save_now = is_due(config.log.every_steps), is_due(config.checkpoint.every_steps)
                leaving = should_stop()
                pause = log_now or save_now or leaving or (data.eval_stores and is_due(config.eval.every_steps))
                bad = faults.read(unread, 0 if pause else 1, window, clock, tell)
                if bad is not None:  # FloatingPointError has halted the run if it must not go on
                    state = None  # its memory is needed
                    state, meta = source.roll_back(bad)
                    faults.roll_back(bad, meta)
                    clock.load(meta.get("clock"))
                    if bad < step:  # the update under way is done again, from here
                        step, batches = bad, data.batches(bad, program.batch_sharding)
                        continue

                checkpoints.check()
                data.verification.check()
                values = {}
                if log_now:
                    values |= window.take() | progress.rates(step) | {"learning_rate": float(controls.learning_rate)}
                    values |= {f"tokens/{source}": tokens for source, tokens in data.tokens_given(step).items()}
                    values["steps_not_applied"] = faults.steps_not_applied
                    progress.show(step, values.get("loss"))
                finished = finish(values)
                leaving = leaving or not finished
                if save_now or leaving:
                    log.flush()
                    events.flush()
                    meta = train_resume.run_record(run, data.record(step), source.history)
                    meta |= {name: part.record() for name, part in kept.items()}
                    meta["saw_tag"] = data.gave_tags(step) or source.saw_tag
                    meta |= {} if finished else {"unfinished": values}
                    preemption.saving(leaving)
                    with clock.aside("checkpoint_stall"):
                        first = checkpoints.latest_step() is None and not leaving  # a stop's grace is short
                        if first or step == config.total_steps:
                            data.verification.wait()
                        checkpoints.save(step, meta, state.params, state.opt_state)
                if leaving and (step < config.total_steps or not finished):
                    with clock.aside("checkpoint_stall"):
                        checkpoints.wait()
                    events.write("stop", step)
                    raise train_preemption.Preempted(f"stopped after step {step}: saved", preemption.exit_code)
                if pause:
                    progress.restart_clock(step)
            with clock.aside("checkpoint_stall"):
                checkpoints.wait()
        progress.close()
        events.write("done", step, **clock.take())
        progress.note(f"tokens given, against the plan:\n{data.ledger_table(step)}")
        progress.note(f"done: step {config.total_steps}, checkpoints in {checkpoints.folder / 'checkpoints'}")


def _set_compilation_cache(folder: str) -> None:
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _learning_rate(config: ConfigDict) -> Schedule:
    fields = config.optimizer
    return make_schedule(
        fields.schedule,
        peak_lr=fields.peak_lr,
        min_lr=fields.min_lr,
        warmup_steps=fields.warmup_steps,
        decay_steps=fields.decay_steps,
        total_steps=config.total_steps,
    )


def _evaluate(
    evaluate: Callable[..., LossSums],
    data: train_data.TrainData,
    batch_sharding: jax.sharding.NamedSharding,
    params: Any,
    step: int,
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Nats per token on the held-out split of every source named; None if it was told to stop between two batches."""
    losses = {}
    for source in data.eval_stores:
        total = LossSums.zero()
        for batch in data.eval_batches(source, batch_sharding):
            if should_stop():
                return None
            total += evaluate(params, batch)
        losses[f"eval_loss/{source}"] = float(total.mean_cross_entropy())
        if not math.isfinite(losses[f"eval_loss/{source}"]):
            raise FloatingPointError(f"step {step}: evaluation loss on {source} is not finite")
    return losses


def _store_config(workdir: str, run: train_config.Resolved, note: Callable[[str], None]) -> None:
    """Keeps the resolved config and the tokenizer with the run; notes what has changed since it was last started."""
    path = epath.Path(workdir) / "config.json"
    new = json.loads(run.config.to_json_best_effort())
    if path.exists():
        try:
            lines = train_config.changed_fields(records.parse(path.read_bytes(), str(path), "written anew"), new)
        except ValueError as error:
            lines = [str(error)]
        for line in lines:
            note(f"changed since the last start: {line}")
    if "://" in workdir:
        path.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")  # an object appears only when it is whole
    else:
        records.write(path, new)
    documents.declare_no_documents(workdir, "safelm.train")
    checkpoint.save_tokenizer(workdir, run.tokenizer)


def _main(_: Sequence[str]) -> None:
    host_memory.keep_freed_memory()
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs whole tracebacks of what is raised here anyway
    try:
        if not _CONFIG.value:
            raise ValueError("--config is missing: give a file of configs/")
        if not _WORKDIR.value and not _DRY_RUN.value:
            raise ValueError("--workdir is missing: give the run's folder")
        if _DISTRIBUTED.value:
            timeout_s = _CONFIG.value.faults.barrier_timeout_s
            processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, timeout_s=timeout_s)
        elif _COORDINATOR.value or _NUM_PROCESSES.value or _PROCESS_ID.value is not None:
            raise ValueError("--coordinator_address, --num_processes and --process_id need --distributed")
        train(_CONFIG.value, _WORKDIR.value or "", dry_run=_DRY_RUN.value)
        processes.finish()
    except (ValueError, OSError) as error:
        by_jax = isinstance(error.__cause__, jax.errors.JaxRuntimeError)  # a save breaks off when a worker is gone, say
        if by_jax and (line := processes.lost(error)):
            _fail(line, processes.LOST_WORKER)
        _fail(str(error), 2)
    except FloatingPointError as error:
        _fail(str(error), 3)
    except train_preemption.Preempted as stop:
        _fail(str(stop), stop.exit_code)
    except jax.errors.JaxRuntimeError as error:
        if (line := processes.lost(error)) is None:
            raise
        _fail(line, processes.LOST_WORKER)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(line: str, code: int = 2) -> None:
    print("python -m safelm.train: " + " ".join(line.split()), file=sys.stderr, flush=True)
    processes.leave(code)


def command() -> None:
    """The command: parses its flags and runs."""
    app.run(_main, flags_parser=lambda arguments: train_flags.parse(arguments, _fail))
