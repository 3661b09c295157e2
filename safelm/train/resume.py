"""The record of a run in its checkpoints, and which runs may resume from it: the same one, a changed one, or a branch.

What a run has trained on is fixed: its model, tokenizer, seed, batch and rows, the stores' contents, the rows taken
from every source, and the optimizer, whose state is no other's. Later settings may change on resume, but only where
`accept_changes` names them:

- "optimizer" for a field of `optimizer` but its name, for `loss.z_loss` and `model.dtype`, or for the length of a run
  whose learning rate depends on it; "data" for the mixture's phases. New phases may begin only after the checkpoint
  (`safelm.data.schedule`).
- Under a wsd schedule, until the decay has begun, `total_steps`, `decay_steps` and `min_lr` have had no effect: a run
  may be made longer or shorter without asking.
- What was changed, at which step, is kept in every later checkpoint as `history`.

Everything else (`FREE_FIELDS`: mesh, accumulation, kernels, cadence of logs, evaluation and checkpoints) may differ
freely.

A branch (`branch.workdir`, `branch.step`) is a run of its own, in its own folder, that begins with the parameters, the
optimizer's state and the data position of another run's checkpoint, one of the stable phase of its wsd schedule; it
decays from there on and ends. The other run is only read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from safelm.checkpoints import checkpoint
from safelm.models.config import Lora
from safelm.train.config import Resolved
from safelm.train.config_fields import changed_fields, get_field
from safelm.train.defaults import CHANGES

# Fields that fix what has been trained on so far; a resumed run must have them as they were.
FIXED_FIELDS = ("seed", "batch_size", "seq_len", "data.packing")
# Which change neither what is trained on nor, but for rounding, what an update is; names of fields or of groups.
FREE_FIELDS = (
    "grad_accum_steps",
    "mesh",
    "compilation_cache_dir",
    "compiler_options",
    "loss.vocab_chunks",
    *(f"model.{name}" for name in ("max_seq_len", "init_std", "scan_layers", "remat", "attention", "products")),
    "data.num_workers",
    "eval",
    "watch",
    "export",
    "checkpoint",
    "log",
    "faults",  # what is to happen at a fault; events.jsonl has each
    "chat_template",  # of whoever asks the model; rows are cut before
    "init_checkpoint",  # where it began
    "branch.workdir",
    "accept_changes",
)
DECAY_FIELDS = ("total_steps", "optimizer.decay_steps", "optimizer.min_lr")

History = list[dict[str, Any]]


def run_record(resolved: Resolved, data: Mapping[str, Any], history: History) -> checkpoint.Meta:
    """The record of a run for its checkpoints; `data` is that of `safelm.train.data.TrainData.record`."""
    config = resolved.config
    return {
        **checkpoint.model_meta(resolved.model, resolved.tokenizer),
        "run": {name: get_field(config, name) for name in (*FIXED_FIELDS, "branch.step")},
        "plan": _plan(config),
        "data": dict(data),
        "history": history,
    }


def check_resumable(meta: checkpoint.Meta, resolved: Resolved, data: Mapping[str, Any], *, where: str) -> History:
    """The history of the run that goes on from its own checkpoint, with an entry more if its plan has changed.

    `data` is this run's record at the checkpoint's step. Raises ValueError naming the first field in which the past
    differs, or those of the future that do and that `accept_changes` doesn't cover.
    """
    _check_past(meta, resolved, data, where=where)
    there, here = meta["run"].get("branch.step", 0), resolved.config.branch.step
    if there != here:
        raise ValueError(f"{where} is of another run: branch.step is {there} there, {here} here")
    changes = _accepted_changes(meta, resolved, data, where=where)
    return [*meta.get("history", ()), *([{"step": meta["step"], "changed": changes}] if changes else ())]


def check_branch(meta: checkpoint.Meta, resolved: Resolved, data: Mapping[str, Any], *, where: str) -> History:
    """The history of a branch that begins with another run's checkpoint: as `check_resumable`.

    Raises ValueError also if that run's learning rate isn't in the stable phase of a wsd schedule there.
    """
    _check_past(meta, resolved, data, where=where)
    step, plan = meta["step"], meta.get("plan")
    if plan is None:
        raise ValueError(f"branch.workdir: {where} has no record of its learning rate's schedule")
    name, decay_start = plan["optimizer"]["schedule"], _decay_start(plan)
    if name != "wsd":
        raise ValueError(
            f"branch.workdir: {where} is of a run whose optimizer.schedule is {name}: only wsd has branches"
        )
    if step > decay_start:
        raise ValueError(
            f"branch.step {step}: the decay of {where} had begun after step {decay_start}; branch from a step up to it"
        )
    changes = _accepted_changes(meta, resolved, data, where=where)
    branched = {"step": step, "branched_from": resolved.config.branch.workdir, "changed": changes}
    return [*meta.get("history", ()), branched]


def _check_past(meta: checkpoint.Meta, resolved: Resolved, data: Mapping[str, Any], *, where: str) -> None:
    checkpoint.check_model(meta, resolved.model, where=where)
    checkpoint.check_vocabulary(meta, resolved.tokenizer, where=where)
    recorded = checkpoint.model_config_from_meta(meta, where=where)
    there, here = recorded.param_dtype, resolved.model.param_dtype
    if there != here:
        raise ValueError(f"{where} is of another run: model.param_dtype is {there!r} there, {here!r} here")
    _check_adapters(recorded.lora, resolved.model.lora, where)
    there, here = recorded.routed, resolved.model.routed
    if there != here:
        raise ValueError(f"{where} is of another run: routing is {there} there, {here} here")
    if "run" not in meta:
        raise ValueError(f"{where} holds parameters only: give its folder as init_checkpoint, and another workdir")
    for name in FIXED_FIELDS:
        there, here = meta["run"][name], get_field(resolved.config, name)
        if there != here:
            raise ValueError(f"{where} is of another run: {name} is {there!r} there, {here!r} here")
    for source, there in meta["data"]["stores"].items():
        if source in data["stores"] and there != (here := data["stores"][source]):
            raise ValueError(f"{where} is of another run: data.root's {source} is {there} there, {here} here")
    if (plan := meta.get("plan")) is not None:
        there, here = plan["optimizer"]["name"], resolved.config.optimizer.name
        if there != here:  # whatever is accepted: one's state is of no use to the other
            raise ValueError(f"{where} is of another run: optimizer.name is {there!r} there, {here!r} here")
    if (there := meta["data"]["rows_given"]) != (here := data["rows_given"]):
        raise ValueError(
            f"{where} is of another run: data.phases gave it {there} rows by step {meta['step']}, here they would have "
            f"given {here} (a phase's start is a fraction of total_steps; start_tokens doesn't move with it)"
        )


def _check_adapters(there: Lora | None, here: Lora | None, where: str) -> None:
    """Raises ValueError naming the first of their settings in which the adapters differ."""
    names = [field.name for field in dataclasses.fields(Lora)]
    for name in names if there != here else ():
        values = [getattr(each, name) if each else {"rank": 0}.get(name) for each in (there, here)]
        if values[0] != values[1]:
            raise ValueError(f"{where} is of another run: lora.{name} is {values[0]!r} there, {values[1]!r} here")


def _accepted_changes(meta: checkpoint.Meta, resolved: Resolved, data: Mapping[str, Any], *, where: str) -> list[str]:
    """The plan's changes since the checkpoint, a line each; ValueError names those missing in `accept_changes`."""
    if (there := meta.get("plan")) is None:  # written before plans were
        return []
    here, groups = _plan(resolved.config), {}
    # Of a record that has neither in its plan the loss is unknown, and the dtype is the model's.
    dtype = checkpoint.model_config_from_meta(meta, where=where).dtype
    there = {"loss": here["loss"], "model": {"dtype": dtype}, **there}
    groups["optimizer"] = changed_fields(there, here)
    groups["data"] = []
    if meta["data"]["schedule_hash"] != data["schedule_hash"]:
        groups["data"] = changed_fields({"data.phases": meta["data"]["phases"]}, {"data.phases": data["phases"]})
    if all(line.split(":")[0] in DECAY_FIELDS for line in groups["optimizer"]) and meta["step"] <= min(
        _decay_start(there), _decay_start(here)
    ):
        asked = ("data",)
    else:
        asked = CHANGES
    for group in asked:
        if groups[group] and group not in resolved.config.accept_changes:
            raise ValueError(
                f"{where} was planned otherwise: {'; '.join(groups[group])}. To go on from step {meta['step']} by the "
                f"new plan, give --config.accept_changes={group}"
            )
    return [line for lines in groups.values() for line in lines]


def _plan(config: ConfigDict) -> dict[str, Any]:
    """The settings that decide every step's learning rate, objective and update."""
    optimizer = config.optimizer.to_dict()
    del optimizer["decay_fraction"]  # settled as decay_steps
    if optimizer["schedule"] != "wsd":
        del optimizer["decay_steps"]
    numerics = {"loss": {"z_loss": config.loss.z_loss}, "model": {"dtype": config.model.dtype}}
    return {"total_steps": config.total_steps, "optimizer": optimizer, **numerics}


def _decay_start(plan: Mapping[str, Any]) -> int:
    """The last step before which no learning rate depends on the end of the run; -1 if all do."""
    optimizer = plan["optimizer"]
    return plan["total_steps"] - optimizer["decay_steps"] if optimizer["schedule"] == "wsd" else -1
