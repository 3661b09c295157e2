"""Restores a run from its newest readable checkpoint. Damaged ones are set aside, never used and never deleted."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from safelm.checkpoints.checkpoint import (
    CORRUPT_FOLDER,
    Checkpoints,
    CorruptCheckpointError,
    Meta,
    model_config_from_meta,
    open_checkpoint,
)
from safelm.formats import sources
from safelm.models import lora
from safelm.train import resume as train_resume
from safelm.train.config import Resolved
from safelm.train.data import TrainData
from safelm.train.step import Program, TrainState, abstract_params
from safelm.train.types import Params

Restored = tuple[TrainState, int, Meta]


class Source:
    """The state that a run starts from or rolls back to: its own checkpoint, another run's, or fresh parameters."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        program: Program,
        run: Resolved,
        data: TrainData,
        tell: Callable[..., None],
    ):
        """`tell` is called with an event, the step and its values."""
        self._checkpoints, self._program, self._run, self._data, self._tell = checkpoints, program, run, data, tell
        self.history: train_resume.History = []  # of the run up to what was restored last: for `run_record`
        self.saw_tag: bool | None = False  # whether what was restored last was trained on the tag; None: unknown

    def restore(self) -> Restored:
        """State, step and record of the newest usable checkpoint; the run's beginning and {} if it has none.

        Checkpoints that are newer but damaged are moved to `corrupt_checkpoints` once an older one was found good.
        Raises CorruptCheckpointError if all are damaged (a run never starts anew by itself), ValueError for a
        checkpoint of another run.
        """
        damaged: dict[int, CorruptCheckpointError] = {}
        for step in reversed(self._checkpoints.steps()):
            try:
                restored = self._read_together(step)
            except CorruptCheckpointError as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                moved_to = self._set_aside(bad, str(error))
                self._tell("corrupt_checkpoint", bad, reason=str(error), moved_to=str(moved_to), going_on_from=step)
            return restored
        self._refuse_to_start_anew(damaged)
        if self._run.config.branch.workdir:
            return self._read_branch()
        return self._program.start(self._initial_params()), 0, {}

    def roll_back(self, step: int) -> tuple[TrainState, Meta]:
        """The newest checkpoint's state and record, with `step` as its step: the updates since then are undone."""
        self._checkpoints.wait()
        state, to, meta = self.restore()
        self._tell("rolled_back", step, to=to, steps_undone=step - to)
        return state.replace(step=self._device_step(step)), meta

    def _read_together(self, step: int) -> Restored:
        """Reads a checkpoint; if one process can't, none has."""
        found: CorruptCheckpointError | None = None
        restored: Restored | None = None
        try:
            restored = self._read(step)
        except CorruptCheckpointError as error:
            found = error
        if jax.process_count() > 1 and not multihost_utils.process_allgather(np.bool_(found is None)).all():
            found = found or CorruptCheckpointError(f"checkpoint {step} could not be read by another process")
        if found is not None:
            raise found
        return restored

    def _read(self, step: int) -> Restored:
        where, target = self._checkpoints.name(step), self._program.abstract_state
        if step > self._run.config.total_steps:
            raise ValueError(f"{where} is past the run's end: total_steps is {self._run.config.total_steps}")
        meta = self._checkpoints.read_meta(step)
        self.history = train_resume.check_resumable(meta, self._run, self._data.record(step), where=where)
        if len(self.history) > len(meta.get("history", ())):
            self._tell("plan_changed", step, changed=self.history[-1]["changed"])
        try:
            params, opt_state = self._checkpoints.restore(step, target.params, target.opt_state)
        except ValueError as error:  # its record says it is this model, so the arrays' description is damaged
            raise CorruptCheckpointError(str(error)) from error
        self.saw_tag = meta.get("saw_tag")
        return TrainState(self._device_step(step), params, opt_state), step, meta

    def _read_branch(self) -> Restored:
        branch, target = self._run.config.branch, self._program.abstract_state
        checkpoints, step, meta = open_checkpoint(branch.workdir, step=branch.step, setting="branch.step")
        where = f"checkpoint {branch.workdir}/checkpoints/{step}"
        self.history = train_resume.check_branch(meta, self._run, self._data.record(step), where=where)
        params, opt_state = checkpoints.restore(step, target.params, target.opt_state)
        checkpoints.close()
        self._tell("branched", step, branched_from=branch.workdir, changed=self.history[-1]["changed"])
        self.saw_tag = meta.get("saw_tag")
        # Of the other run's record, what its clock says and what it had left to do are its own.
        meta = {name: value for name, value in meta.items() if name not in ("clock", "unfinished")}
        return TrainState(self._device_step(step), params, opt_state), step, meta

    def _set_aside(self, step: int, reason: str) -> epath.Path | str:
        moved_to = self._checkpoints.set_aside(step, reason) if jax.process_index() == 0 else "by process 0"
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} was set aside")
            self._checkpoints.reload()
        return moved_to

    def _refuse_to_start_anew(self, damaged: dict[int, CorruptCheckpointError]) -> None:
        folder = self._checkpoints.folder
        if damaged:
            reasons = "; ".join(str(error) for error in damaged.values())
            where = f"{folder}/checkpoints"
            raise CorruptCheckpointError(f"no checkpoint under {where} can be used, all were left there: {reasons}")
        aside = folder / CORRUPT_FOLDER
        if aside.is_dir() and any(aside.iterdir()):
            what = f"{folder} has no checkpoint but those set aside in {aside}"
            raise CorruptCheckpointError(f"{what}: put a good one back, or start in another workdir")

    def _initial_params(self) -> Params:
        config, key = self._run.config, jax.random.key(self._run.config.seed)
        if not config.init_checkpoint:
            return self._program.init_params(key)
        is_ours = sources.source_kind(config.init_checkpoint) == "safelm"
        model_params = (self._our_params if is_ours else self._imported_params)(config.init_checkpoint)
        if self._run.model.lora is None:
            return model_params
        return lora.joined(self._program.init_adapters(key), model_params)

    def _our_params(self, source: str) -> Params:
        """Those of a checkpoint of ours, its adapters merged into them."""
        checkpoints, step, meta = open_checkpoint(source)
        self.saw_tag = meta.get("saw_tag")
        adapters = model_config_from_meta(meta, where=checkpoints.name(step)).lora
        theirs = dataclasses.replace(self._run.model, lora=adapters)
        params, _ = checkpoints.restore(step, abstract_params(theirs, self._program.batch_sharding.mesh))
        checkpoints.close()
        if adapters is None:
            return params
        where = jax.tree.map(lambda leaf: leaf.sharding, self._abstract_model())
        return jax.jit(lambda params: lora.merged(theirs, params)[1], out_shardings=where)(params)

    def _abstract_model(self) -> Params:
        """Shapes and shardings of the parameters without adapters."""
        params = self._program.abstract_state.params
        return params if self._run.model.lora is None else lora.split(self._run.model, params)[1]

    def _imported_params(self, source: str) -> Params:
        """Those of another program's model, each device's share of them; every process reads all of it."""
        self.saw_tag = sources.saw_tag(source)
        _, params, _ = sources.read_model(source)

        def place(values: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
            values = np.asarray(values, target.dtype)
            return jax.make_array_from_callback(target.shape, target.sharding, lambda index: values[index])

        return jax.tree.map(place, params, self._abstract_model())

    def _device_step(self, step: int) -> jax.Array:
        return jax.device_put(np.int32(step), self._program.abstract_state.step.sharding)
