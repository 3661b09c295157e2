"""A training run: opens its files, restores its state, then updates, evaluates, logs and saves, step by step."""

import collections
import contextlib
import json
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from safelm.checkpoints import checkpoint
from safelm.data.batch import Batch
from safelm.io import remote
from safelm.io.progress import ProgressFile
from safelm.models import sharding
from safelm.train import config as train_config
from safelm.train import dry_run as dry_runs
from safelm.train import faults, metrics, plan, processes, program, restore, resume, trackers
from safelm.train.clock import Clock
from safelm.train.data import TrainData
from safelm.train.evaluators import Evaluator, HeldOutLoss, Stopped
from safelm.train.events import Events
from safelm.train.exports import HuggingFaceExport
from safelm.train.optimizer import Schedule, make_schedule
from safelm.train.preemption import Preempted, Preemption
from safelm.train.profile import Profile
from safelm.train.safety_watch import Drift, Pages, SafetyWatch, read_pages
from safelm.train.step import Controls, Program


def train(config: ConfigDict, workdir: str, *, dry_run: bool = False) -> None:
    """Runs a config to its last step, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: as `safelm.train.defaults.default_config` has it.
      workdir: the run's folder, local or gs://.
      dry_run: check everything, print the run's size, train nothing.

    Raises:
      ValueError, OSError: input that can't be used (the message names the field or file), or a full disk.
      FloatingPointError: `config.faults` halts the run (a loss that isn't finite, say).
      Preempted: after a signal, once all is saved.
    """
    _set_compilation_cache(config.compilation_cache_dir)
    faults.check_config(config.faults)
    trackers.check(config.log.trackers, workdir)
    if dry_run:
        dry_runs.dry_run(config, workdir)
        return
    resolved = train_config.resolve(config, workdir)
    config = resolved.config
    data, watched = TrainData(config, resolved.tokenizer), read_pages(config, resolved.tokenizer)
    settings = json.loads(config.to_json_best_effort())
    processes.agree(
        {"config": settings, "workdir": workdir, "tokenizer": resolved.tokenizer.hash, "data": data.fingerprints()}
    )
    mesh = sharding.make_mesh(config.mesh.to_dict())
    harm_tag_id = resolved.tokenizer.harm_tag_id if data.has_kinds else None
    compiled, attention = program.make_program(config, resolved.model, mesh, harm_tag_id)
    if jax.process_index() == 0:
        print(plan.summary(config, resolved.model, data, mesh, attention), flush=True)
    processes.check_shared(workdir)
    remote.check_writable(workdir)  # now, not after an hour
    with jax.set_mesh(mesh), Run(resolved, workdir, data, compiled, watched) as run:
        run.loop()


class Run:
    """A run under way. Enter it to open its files, restore its state and compile; then call `loop`.

    Attributes:
      step: updates done, or under way.
      state: parameters and optimizer state on the devices.
    """

    def __init__(
        self,
        resolved: train_config.Resolved,
        workdir: str,
        data: TrainData,
        compiled: Program,
        watched: Pages | None = None,
    ):
        """
        Args:
          compiled: the run's functions for the mesh that is set.
          watched: pages of the safety watch, if there is one.
        """
        self._resolved, self._config, self._workdir = resolved, resolved.config, workdir
        self._data, self._program, self._watched = data, compiled, watched
        self._is_main = jax.process_index() == 0
        self._learning_rate = _learning_rate(self._config)
        self._progress = metrics.Progress(
            total_steps=self._config.total_steps,
            tokens_per_step=self._config.batch_size * self._config.seq_len,
            flops_per_token=resolved.model.flops_per_token(self._config.seq_len),
            peak_flops=metrics.device_peak_flops(self._config.log.peak_flops),
            enabled=self._is_main,
        )
        self._faults, self._window = faults.Faults(self._config.faults), metrics.LossWindow()
        self._drift = Drift()
        self._unread = collections.deque()  # (step, StepMetrics): read while the next update runs
        self._any_process = processes.AnyProcess()

    def __enter__(self) -> "Run":
        config, note = self._config, self._progress.note
        keep = {"keep_last": config.checkpoint.keep_last, "keep_every": config.checkpoint.keep_every}
        keep |= {"is_only_writer": True}  # by the lock or lease of `Events`
        with contextlib.ExitStack() as stack:
            self._events = stack.enter_context(Events(self._workdir, enabled=self._is_main))
            self._preemption = stack.enter_context(Preemption(grace_s=config.faults.grace_s, note=note))
            self._profile = stack.enter_context(Profile(self._workdir, config.log, note=note))
            self._checkpoints = stack.enter_context(checkpoint.Checkpoints(self._workdir, **keep))
            self._restore()
            self._log = stack.enter_context(self._open_log())
            if self._is_main:
                path = f"{self._workdir.rstrip('/')}/progress.json"
                file = ProgressFile(path, "safelm.train", stage="training", unit="step", workdir=self._workdir)
                self._progress.write_into(stack.enter_context(file))
            self._compile()
            self._open_files = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open_files.__exit__(*error)

    def loop(self) -> None:
        """Trains from `step` to the run's last step; raises as `train` does."""
        self._begin()
        while self.step < self._config.total_steps:
            self.step += 1
            self._update(self._next_batch())
            leaving = self._should_stop()
            pause = leaving or any(map(self._is_due, self._pauses)) or any(map(self._wants, self._evaluators))
            if self._roll_back(pause):
                continue
            self._checkpoints.check()
            self._data.verification.check()
            numbers = self._numbers() if self._is_due(self._config.log.every_steps) else {}
            finished = self._evaluate(numbers)
            leaving = leaving or not finished
            if leaving or self._is_due(self._config.checkpoint.every_steps):
                self._save({} if finished else {"unfinished": numbers}, leaving)
            if leaving and (self.step < self._config.total_steps or not finished):
                self._leave()
            if pause:
                self._progress.restart_clock(self.step)
        self._end()

    # Before the loop and after it.

    def _open_log(self) -> metrics.MetricsLog:
        config, workdir, note = self._config, self._workdir, self._progress.note
        settings = json.loads(config.to_json_best_effort())
        names, project = config.log.trackers, config.log.project
        start = self.step - ("unfinished" in self._meta)  # `_begin` writes that step's line, perhaps not the first time

        def opened() -> list[trackers.Tracker]:
            return trackers.open_trackers(names, workdir, settings, project=project, start_step=start, note=note)

        return metrics.MetricsLog(workdir, start_step=start, trackers=opened, enabled=self._is_main)

    def _restore(self) -> None:
        self._source = restore.Source(self._checkpoints, self._program, self._resolved, self._data, self._tell)
        self.state, self.step, self._meta = self._source.restore()
        self._clock = Clock(self._events.first_launch)
        # Parts whose state is in the checkpoints.
        self._kept = {"faults": self._faults, "window": self._window, "clock": self._clock, "drift": self._drift}
        for name, part in self._kept.items():
            part.load(self._meta.get(name))

    def _compile(self) -> None:
        if self._is_main:
            train_config.store(self._workdir, self._resolved, self._progress.note)
        self._events.write("resume", self.step)
        with self._clock.aside("compile"):
            self._update_program, evaluate = program.compile_ahead(
                self._program, self._config, self._data.channels, has_evaluation=bool(self._data.eval_stores)
            )
            processes.barrier("compiled")  # the first collective waits for others for seconds only
        self._evaluators: list[Evaluator] = []
        if self._data.eval_stores:
            batch_sharding = self._program.batch_sharding
            every = self._config.eval.every_steps
            self._evaluators.append(HeldOutLoss(every, evaluate, self._data, batch_sharding, self._should_stop))
        config = self._config
        if self._watched is not None:
            seen = (self._resolved, self._watched, self._program)
            self._evaluators.append(SafetyWatch.of_run(*seen, self._drift, self._tell))
        if config.export.every_steps or config.export.at_steps:
            self._evaluators.append(self._make_export())
        self._pauses = [config.log.every_steps, config.checkpoint.every_steps]

    def _make_export(self) -> HuggingFaceExport:
        fields, run = self._config.export, self._resolved
        return HuggingFaceExport(
            fields.every_steps,
            fields.at_steps,
            self._workdir,
            run.model,
            run.tokenizer,
            dtype=fields.dtype,
            ablate=fields.ablate,
            saw_tag=self._saw_tag,
            should_stop=self._should_stop,
            note=self._progress.note,
        )

    def _begin(self) -> None:
        if "unfinished" in self._meta:  # the run left in the evaluation after this step
            self._evaluate(self._meta["unfinished"])
        self._progress.start(self.step)
        self._batches = self._data.batches(self.step, self._program.batch_sharding)
        self._progress.restart_clock(self.step)
        self._clock.run()

    def _end(self) -> None:
        with self._clock.aside("checkpoint_stall"):
            self._checkpoints.wait()
        self._log.flush()
        self._progress.close()
        self._events.write("done", self.step, **self._clock.take())
        self._progress.note(f"tokens given, against the plan:\n{self._data.ledger_table(self.step)}")
        self._progress.note(f"done: step {self.step}, checkpoints in {self._checkpoints.folder / 'checkpoints'}")

    # The parts of one step.

    def _next_batch(self) -> Batch:
        with self._clock.data_wait():
            return next(self._batches)

    def _update(self, batch: Batch) -> None:
        limits = (np.float32(limit) for limit in self._faults.limits(self.step))
        self._controls = Controls(np.float32(self._learning_rate(self.step - 1)), *limits)
        with self._profile.step(self.step, asked=self._preemption.take_profile_request()):
            self.state, step_metrics = self._update_program(self.state, batch, self._controls)
        self._unread.append((self.step, step_metrics))
        self._progress.count(self.step)
        self._preemption.begin()

    def _roll_back(self, pause: bool) -> bool:
        """Judges the updates so far and rolls back if one is bad; returns whether the current step must be repeated.

        Raises FloatingPointError if the policy says halt.
        """
        bad = self._faults.read(self._unread, 0 if pause else 1, self._window, self._clock, self._tell)
        if bad is None:
            return False
        self.state = None  # its memory is needed
        self.state, self._meta = self._source.roll_back(bad)
        self._faults.roll_back(bad, self._meta)
        self._clock.load(self._meta.get("clock"))
        self._drift.load(self._meta.get("drift"))
        if bad == self.step:
            return False
        self.step, self._batches = bad, self._data.batches(bad, self._program.batch_sharding)
        return True

    def _numbers(self) -> dict[str, float]:
        """The values of a step's line in the log, without evaluations."""
        numbers = self._window.take() | self._progress.rates(self.step)
        numbers |= {"learning_rate": float(self._controls.learning_rate)}
        numbers |= {f"tokens/{source}": tokens for source, tokens in self._data.tokens_given(self.step).items()}
        numbers |= {"steps_not_applied": self._faults.steps_not_applied}
        self._progress.show(self.step, numbers.get("loss"), metrics.loss_by_kind(numbers))
        return numbers

    def _evaluate(self, numbers: dict[str, float]) -> bool:
        """Runs the evaluators that are due and writes the step's line; returns False if one was stopped."""
        drift = self._drift.record()
        for evaluator in self._evaluators:
            if not self._wants(evaluator):
                continue
            try:
                with self._clock.aside("eval"):
                    found = evaluator(self.state.params, self.step)
            except Stopped:
                self._drift.load(drift)  # all evaluators run again when the run is resumed
                return False
            if found:
                shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
                self._progress.note(f"step {self.step}  {shown}")
            numbers = numbers | found
        if numbers:
            self._log.write(self.step, numbers | self._clock.take())
        return True

    def _saw_tag(self) -> bool | None:
        """Whether the model was trained on the harm tag up to this step; None if its source doesn't say."""
        return self._data.gave_tags(self.step) or self._source.saw_tag

    def _save(self, unfinished: dict[str, Any], leaving: bool) -> None:
        self._log.flush()
        self._events.flush()
        meta = resume.run_record(self._resolved, self._data.record(self.step), self._source.history)
        meta |= {name: part.record() for name, part in self._kept.items()} | unfinished
        meta["saw_tag"] = self._saw_tag()
        self._preemption.saving(leaving)
        with self._clock.aside("checkpoint_stall"):
            is_first = self._checkpoints.latest_step() is None and not leaving  # a stop's grace is short
            if is_first or self.step == self._config.total_steps:
                self._data.verification.wait()
            self._checkpoints.save(self.step, meta, self.state.params, self.state.opt_state)

    def _leave(self) -> None:
        with self._clock.aside("checkpoint_stall"):
            self._checkpoints.wait()
        self._events.write("stop", self.step)
        raise Preempted(f"stopped after step {self.step}: saved", self._preemption.exit_code)

    def _is_due(self, every_steps: int) -> bool:
        return self.step == self._config.total_steps or (every_steps > 0 and self.step % every_steps == 0)

    def _wants(self, evaluator: Evaluator) -> bool:
        return self.step in evaluator.at_steps or self._is_due(evaluator.every_steps)

    def _should_stop(self) -> bool:
        return self._any_process(self._preemption.requested)

    def _tell(self, event: str, step: int | None = None, **values: Any) -> None:
        """Prints an event and writes it to the run's history."""
        said = "; ".join(f"{name} {value}" for name, value in values.items())
        self._progress.note(f"{event.replace('_', ' ')}, step {step}: {said}")
        self._events.write(event, step, **values)


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
