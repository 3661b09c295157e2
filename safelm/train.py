"""Trains a model: pretraining, instruction tuning, finetuning, as the config says.

    python -m safelm.train --config=configs/quickstart.py:safety --workdir=runs/safety [--config.a.b=value ...]

The workdir (local or gs://) gets `config.json`, `tokenizer/`, `metrics.jsonl`, `tensorboard/` and `checkpoints/`. To
resume, run the same command again: it goes on from the newest checkpoint, bit for bit as if it had never stopped.
`--dry_run` checks everything, prints parameters, tokens and steps, and trains nothing.
"""

import collections
import json
import math
import os
import sys
from collections.abc import Callable, Sequence

os.environ.setdefault("EPATH_USE_TF", "false")  # otherwise etils imports TensorFlow for gs:// where it is installed

import jax
import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from safelm import checkpoint, sharding, train_config, train_data, train_metrics, train_program, train_step
from safelm.data import remote
from safelm.data.shard import write_json
from safelm.loss import LossSums
from safelm.optimizer import Schedule, make_schedule

_CONFIG = config_flags.DEFINE_config_file("config", help_string="File of configs/, with an optional :variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One process of several: call jax.distributed.initialize().")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything, print the run's size, train nothing.")


def train(config: ConfigDict, workdir: str, *, dry_run: bool = False) -> None:
    """Runs a config to its last step, from the newest checkpoint in `workdir` if there is one.

    Raises ValueError or OSError for input that can't be used (the message names the field or file), OSError when the
    disk is full, FloatingPointError when the loss or the gradients stop being finite.
    """
    _set_compilation_cache(config.compilation_cache_dir)
    run = train_config.resolve(config)
    config = run.config
    data = train_data.TrainData(config, run.tokenizer)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    program, attention = train_program.make_program(config, run.model, mesh)
    learning_rate = _learning_rate(config)
    is_main = jax.process_index() == 0
    if is_main:
        print(f"{config}\n{_summary(run, data, mesh)}\nattention:  {attention.kernel} ({attention.reason})", flush=True)
    if dry_run:
        return
    remote.check_writable(workdir)  # now, not after an hour

    progress = train_metrics.Progress(
        total_steps=config.total_steps,
        tokens_per_step=config.batch_size * config.seq_len,
        flops_per_token=train_metrics.flops_per_token(run.model, config.seq_len),
        peak_flops=train_metrics.device_peak_flops(config.log.peak_flops),
        enabled=is_main,
    )
    keep = {"keep_last": config.checkpoint.keep_last, "keep_every": config.checkpoint.keep_every}
    with checkpoint.Checkpoints(workdir, **keep) as checkpoints:
        state, start_step = _restore_or_init(checkpoints, program, run, data, workdir)
        with jax.set_mesh(mesh), train_metrics.MetricsLog(workdir, start_step=start_step, enabled=is_main) as log:
            if is_main:
                _store_config(workdir, run, progress.note)
            progress.start(start_step)
            batches = data.batches(start_step, program.batch_sharding)
            unread = collections.deque()  # (step, StepMetrics): read while the next update runs
            window = train_metrics.LossWindow()
            for step in range(start_step + 1, config.total_steps + 1):
                controls = train_step.Controls(np.float32(learning_rate(step - 1)))
                state, step_metrics = program.step(state, next(batches), controls)
                unread.append((step, step_metrics))

                is_last = step == config.total_steps
                log_now = is_last or step % config.log.every_steps == 0
                eval_now = data.eval_stores and (is_last or step % config.eval.every_steps == 0)
                save_now = is_last or step % config.checkpoint.every_steps == 0
                pause = log_now or eval_now or save_now or step == start_step + 1
                while len(unread) > (0 if pause else 1):
                    window.add(*unread.popleft())  # FloatingPointError halts the run, before anything bad is saved

                values = {}
                if log_now:
                    values |= window.take() | progress.rates(step) | {"learning_rate": float(controls.learning_rate)}
                    values |= {f"tokens/{source}": tokens for source, tokens in data.tokens_given(step).items()}
                    progress.show(step, values["loss"])
                    checkpoints.check()
                if eval_now:
                    values |= (losses := _evaluate(program, data, state, step))
                    progress.note(f"step {step}  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
                if values:
                    log.write(step, values)
                if save_now:
                    log.flush()
                    meta = train_config.run_record(run, data.record(step))
                    checkpoints.save(step, meta, state.params, state.opt_state)
                if pause:
                    progress.restart_clock(step)
            checkpoints.wait()
        progress.close()
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


def _restore_or_init(
    checkpoints: checkpoint.Checkpoints,
    program: train_step.Program,
    run: train_config.Resolved,
    data: train_data.TrainData,
    workdir: str,
) -> tuple[train_step.TrainState, int]:
    """The state to go on from, and its step: the newest checkpoint's, else `init_checkpoint`'s or fresh parameters."""
    target = program.abstract_state
    if (step := checkpoints.latest_step()) is not None:
        where = f"checkpoint {workdir}/checkpoints/{step}"
        if step > run.config.total_steps:
            raise ValueError(f"{where} is past the run's end: total_steps is {run.config.total_steps}")
        train_config.check_resumable(checkpoints.read_meta(step), run, data.record(step), where=where)
        params, opt_state = checkpoints.restore(step, target.params, target.opt_state)
        return train_step.TrainState(jax.device_put(np.int32(step), target.step.sharding), params, opt_state), step
    if run.config.init_checkpoint:
        source, step, _ = checkpoint.open_checkpoint(run.config.init_checkpoint)
        params, _ = source.restore(step, target.params)
        source.close()
    else:
        params = program.init_params(jax.random.key(run.config.seed))
    return program.start(params), 0


def _evaluate(
    program: train_step.Program, data: train_data.TrainData, state: train_step.TrainState, step: int
) -> dict[str, float]:
    """Nats per token on the held-out split of every source named."""
    losses = {}
    for source in data.eval_stores:
        total = LossSums.zero()
        for batch in data.eval_batches(source, program.batch_sharding):
            total += program.evaluate(state.params, batch)
        losses[f"eval_loss/{source}"] = float(total.mean_cross_entropy())
        if not math.isfinite(losses[f"eval_loss/{source}"]):
            raise FloatingPointError(f"step {step}: evaluation loss on {source} is not finite")
    return losses


def _summary(run: train_config.Resolved, data: train_data.TrainData, mesh: jax.sharding.Mesh) -> str:
    """Parameters, tokens and steps of a run, and what each source will have given."""
    config, steps = run.config, run.config.total_steps
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"parameters: {run.model.num_params:,}",
        f"tokens:     {steps * config.batch_size * config.seq_len:,} ({config.batch_size} x {config.seq_len} a step)",
        f"steps:      {steps:,}",
        f"devices:    {mesh.size} {jax.devices()[0].device_kind} ({axes})",
    ]
    for source, tokens in data.tokens_given(steps).items():
        epochs = tokens / data.stores[source].num_tokens
        lines.append(f"source:     {source}: {tokens:,} tokens, {epochs:.2f} epochs")
    return "\n".join(lines)


def _store_config(workdir: str, run: train_config.Resolved, note: Callable[[str], None]) -> None:
    """Keeps the resolved config and the tokenizer with the run; notes what has changed since it was last started."""
    path = epath.Path(workdir) / "config.json"
    new = json.loads(run.config.to_json_best_effort())
    if path.exists():
        try:
            lines = train_config.changed_fields(json.loads(path.read_text()), new)
        except ValueError:
            lines = [f"{path} was not JSON: written anew"]
        for line in lines:
            note(f"changed since the last start: {line}")
    if "://" in workdir:
        path.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")  # an object appears only when it is whole
    else:
        write_json(str(path), new)
    checkpoint.save_tokenizer(workdir, run.tokenizer)


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parses the flags; a config field that doesn't exist ends the process with one line, `--help` with code 0."""
    try:
        rest = app.parse_flags_with_usage(arguments)
    except SystemExit:
        if any(argument.lstrip("-") in ("help", "helpshort", "helpfull", "?") for argument in arguments):
            sys.exit(0)  # absl would end with 1
        raise
    except (AttributeError, KeyError, TypeError) as error:
        # The flag has no value yet, so the file it names is read again to say which field it lacks.
        paths = [argument.split("=", 1)[1] for argument in arguments if argument.lstrip("-").startswith("config=")]
        config = flags.FLAGS["config"].parser.parse(paths[-1]) if paths else ConfigDict()
        _fail(train_config.unknown_field(config, arguments) or str(error), 2)
    if rest[1:]:
        _fail(f"unexpected argument: {rest[1]}", 2)
    return rest


def _main(_: Sequence[str]) -> None:
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs whole tracebacks of what is raised here anyway
    try:
        if not _CONFIG.value:
            raise ValueError("--config is missing: give a file of configs/")
        if not _WORKDIR.value:
            raise ValueError("--workdir is missing: give the run's folder")
        if _DISTRIBUTED.value:
            jax.distributed.initialize()
        train(_CONFIG.value, _WORKDIR.value, dry_run=_DRY_RUN.value)
    except (ValueError, OSError) as error:
        _fail(str(error), 2)
    except FloatingPointError as error:
        _fail(str(error), 3)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(line: str, code: int) -> None:
    print("python -m safelm.train: " + " ".join(line.split()), file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse_flags)
