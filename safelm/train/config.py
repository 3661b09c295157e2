"""The config of a training run: its fields and defaults, and the checks that need no data and no devices.

`safelm.train.resume` says which fields may change when a run is resumed.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict, config_dict

from safelm.checkpoints import checkpoint
from safelm.checkpoints.integrity import CorruptCheckpointError
from safelm.data.schedule import Phase
from safelm.formats import sources
from safelm.io import hub
from safelm.models.config import PROJECTIONS, ModelConfig
from safelm.text.tokenizer import Tokenizer
from safelm.train import compiler

CHANGES = ("optimizer", "data")  # what `accept_changes` may name
# Of a model, not in `config.model`: what `config.lora` and `config.routing` have, and what decoding leaves out.
_NOT_TRAINED = ("lora", "routed", "banned_ids")


def default_config() -> ConfigDict:
    """Every field with its default, unlocked; `configs/` start from it.

    A model field left unset is taken from `init_checkpoint`; `model.vocab_size` otherwise from the tokenizer.
    """
    unset = config_dict.placeholder
    sizes = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim")
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    model = {name: default for name, default in fields.items() if name not in (*sizes, *_NOT_TRAINED)}
    taken = [name for name in (*checkpoint.ARCHITECTURE_FIELDS, "max_seq_len") if model.get(name) is not None]
    model |= {name: unset(type(model[name])) for name in taken} | {name: unset(int) for name in sizes}
    return ConfigDict(
        {
            "seed": 0,  # of the parameters and of the data's order
            "total_steps": 0,  # one of the two, the other 0
            "total_tokens": 0,
            "batch_size": 8,  # sequences in an update, over all devices and all accumulation steps
            "seq_len": 256,  # tokens in a row
            "grad_accum_steps": 1,
            "tokenizer": "",  # folder, hf:ORG/NAME, tokenizer.json or .gguf; empty: that of init_checkpoint
            "document_end": "",  # token behind every document; empty: the tokenizer's own, see `safelm.text.tokenizer`
            "chat_template": "",  # kept with the run: a name or file, in place of the tokenizer's own
            # Its parameters to begin with: another run's workdir, a folder of `safelm.convert` or of Hugging Face,
            # hf:ORG/NAME[@REVISION] or a GGUF file.
            "init_checkpoint": "",
            # A branch: begins as another run's checkpoint in the stable phase of its wsd schedule and decays from there
            # over optimizer.decay_steps. total_steps is the other run's; the branch ends where its decay does.
            "branch": {"workdir": "", "step": 0},
            "accept_changes": (),  # when resuming, whose plan may be another one: optimizer, data
            "compilation_cache_dir": "",  # folder that keeps compiled programs, so that a restart need not compile
            "compiler_options": (),  # of the update, "xla_FLAG=VALUE" each: see safelm.train.compiler
            "model": model,
            # Rank above 0: adapters beside these projections, scaled by alpha / rank, and nothing else is trained.
            "lora": {"rank": 0, "alpha": 16.0, "targets": PROJECTIONS},
            # Sources that only the last `heads` and `mlp_units` of every layer learn, and sources that all learn: see
            # safelm.models.routing. Nothing is designated without labelled sources.
            "routing": {"labelled": (), "mixed": (), "heads": 0, "mlp_units": 0},
            "data": {
                "root": "",  # folder of token stores: <root>/<source>/<split>
                "split": "train",
                # Ranges of the run's tokens, each up to the next one's start: `start` is a fraction of the run,
                # `start_tokens` a number of tokens. Rates are shares of a range's tokens and add up to 1.
                "phases": ({"start": 0.0, "rates": {}},),
                "packing": "concat",  # or fit: whole documents in a row; window: stores of windows, as they were cut
                "num_workers": 0,
            },
            "eval": {"every_steps": 0, "sources": (), "split": "validation", "batches": 8},  # every_steps 0: never
            # What the model makes of harmful and safe pages: see safelm.train.safety_watch. every_steps 0: nothing.
            "watch": {
                **{"every_steps": 0, "documents": "", "texts": 32, "min_harm_score": 4},
                # The sample of what it writes: pages' beginnings, their tokens, new ones, and who tells harm.
                **{"prompts": 8, "prompt_tokens": 16, "new_tokens": 24, "scorer": ""},
            },
            # Hugging Face folders, <workdir>/exports/<step>: every so many steps, at these steps, and at the end.
            # With `ablate` without the designated units of `routing`.
            "export": {"every_steps": 0, "at_steps": (), "dtype": "bfloat16", "ablate": False},
            "optimizer": {
                "name": "adamw",  # adamw or muon; decay is decoupled, of matrices and embeddings
                "peak_lr": 3e-3,
                "min_lr": 0.0,  # at the end
                "schedule": "wsd",  # after the warmup: wsd (constant, then linear decay), or at once cosine or linear
                "warmup_steps": 0,
                "decay_steps": 0,  # of wsd; 0: decay_fraction of the run (of a branch: up to its end)
                "decay_fraction": 0.2,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "momentum": 0.95,  # of muon
                "weight_decay": 0.01,
                "clip_norm": 1.0,  # 0: no clipping
            },
            "loss": {
                "z_loss": 0.0,
                "vocab_chunks": 0,  # parts of the vocabulary whose logits are in memory at a time; 0: as size asks
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # devices along each axis; -1: those left
            "checkpoint": {"every_steps": 1000, "keep_last": 2, "keep_every": 0},
            "log": {
                "every_steps": 10,
                "trackers": ("tensorboard",),  # also wandb, mlflow: see safelm.train.trackers
                "project": "safelm",  # of W&B; experiment of MLflow
                "peak_flops": 0.0,  # FLOP/s of one device for MFU; 0: from a table of chips
                "assumed_mfu": 0.4,  # for the time that `--dry_run` names
                "profile_start_step": 0,  # a profile of `profile_steps` steps from here on; 0: none but by SIGUSR1
                "profile_steps": 5,
            },
            "faults": {  # see safelm.train.faults
                "on_nonfinite": "halt",  # halt, skip or rollback, when the loss or the gradients aren't finite
                "on_spike": "ignore",  # ignore, skip or rollback, at a spike of the loss or the gradients' norm
                "spike_loss_ratio": 2.0,  # a spike is so many times the median over the window; 0: no limit
                "spike_grad_norm_ratio": 10.0,
                "spike_window": 128,  # updates
                "max_skips": 10,  # in spike_window steps; one more halts the run
                "max_rollbacks": 5,  # in the whole run; one more halts it
                "barrier_timeout_s": 300.0,  # for how long processes wait for each other
                "grace_s": 25.0,  # seconds from SIGTERM to the end of the step; then the process ends without a save
            },
        }
    )


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config without open fields, with the model and tokenizer that it names."""

    config: ConfigDict
    model: ModelConfig
    tokenizer: Tokenizer


def resolve(config: ConfigDict, workdir: str = "") -> Resolved:
    """Fills in a config's open fields (steps, tokenizer, model) and loads what it names.

    Open fields are taken from the workdir's own checkpoint, else the branch's, else `init_checkpoint`: the first that
    exists is the only one that is opened. Raises ValueError or OSError naming the field and its value.
    """
    config = _settle_run(config)
    origin = _origin(config, workdir)
    tokenizer = _load_tokenizer(config, origin)
    tokenizer = tokenizer.beginning_with([tokenizer.eos_id])  # as `safelm.data.rows` begins every document
    return Resolved(*_settle_model(config, _resolve_model(config, tokenizer, origin)), tokenizer)


def resolve_sizes(config: ConfigDict) -> tuple[ConfigDict, ModelConfig]:
    """`resolve` for what needs shapes only: loads the tokenizer only if `model.vocab_size` is not set."""
    config = _settle_run(config)
    origin = _origin(config, "")
    tokenizer = None if config.model.vocab_size else _load_tokenizer(config, origin)
    return _settle_model(config, _resolve_model(config, tokenizer, origin))


def _settle_run(config: ConfigDict) -> ConfigDict:
    """An unlocked copy with its steps settled."""
    config = config.copy_and_resolve_references().unlock()
    _check_numbers(config)
    config.total_steps = _total_steps(config)
    if config.branch.workdir:
        _plan_branch(config)
    config.total_tokens = config.total_steps * config.batch_size * config.seq_len
    if config.optimizer.schedule == "wsd" and not config.optimizer.decay_steps:
        config.optimizer.decay_steps = round(config.optimizer.decay_fraction * config.total_steps)
    return config


def _settle_model(config: ConfigDict, model: ModelConfig) -> tuple[ConfigDict, ModelConfig]:
    if config.seq_len > model.max_seq_len:
        raise ValueError(f"seq_len is {config.seq_len}, longer than model.max_seq_len {model.max_seq_len}")
    fields = dataclasses.asdict(model)
    config.model = ConfigDict({name: value for name, value in fields.items() if name not in _NOT_TRAINED})
    return config.lock(), model


def not_default(config: ConfigDict) -> list[str]:
    """ "field=value" for what a config sets, without the phases of its data."""
    defaults = json.loads(default_config().to_json_best_effort())
    lines = changed_fields(defaults, json.loads(config.to_json_best_effort()))
    fields = [line.partition(":")[0] for line in lines]
    return [f"{field}={get_field(config, field)}" for field in fields if field != "data.phases"]


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "field: old -> new" for the leaves in which two nested dicts differ."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        there, here = old.get(name), new.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += changed_fields(there, here, f"{prefix}{name}.")
        elif there != here:
            lines.append(f"{prefix}{name}: {there} -> {here}")
    return lines


def unknown_field(config: ConfigDict, arguments: Iterable[str]) -> str | None:
    """A line about the first `--config.a.b` of a command line that the config doesn't have, or None."""
    for argument in arguments:
        if not (match := re.match(r"--?config\.([^=]+)", argument)):
            continue
        node, known = config, "config"
        for part in match[1].split("."):
            if not isinstance(node, ConfigDict) or part not in node:
                has = ", ".join(node) if isinstance(node, ConfigDict) else "no fields, it is a value"
                return f"unknown config field {argument}: {known} has {has}"
            node, known = node.get(part), f"{known}.{part}"
    return None


def get_field(config: ConfigDict, dotted: str) -> Any:
    """The value of a field named as on the command line, such as "optimizer.peak_lr"."""
    for part in dotted.split("."):
        config = config[part]
    return config


_RANGES = {
    "optimizer.peak_lr": (0, 1e3),
    "optimizer.min_lr": (0, 1e3),
    "optimizer.warmup_steps": (0, 1e9),
    "optimizer.decay_steps": (0, 1e9),
    "optimizer.decay_fraction": (0, 1),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.9999999),
    "optimizer.eps": (1e-30, 1),
    "optimizer.momentum": (0, 0.999999),
    "optimizer.weight_decay": (0, 1e3),
    "optimizer.clip_norm": (0, 1e9),
    "branch.step": (0, 1e9),
    "log.assumed_mfu": (0.001, 1),
    "watch.texts": (8, 1e6),
    "watch.min_harm_score": (1, 5),
    "watch.prompts": (0, 1e6),
    "watch.prompt_tokens": (1, 1e6),
    "watch.new_tokens": (1, 1e6),
}


def _check_numbers(config: ConfigDict) -> None:
    positive = ("batch_size", "seq_len", "grad_accum_steps", "checkpoint.every_steps", "checkpoint.keep_last")
    for name in (*positive, "log.every_steps", "eval.batches"):
        if get_field(config, name) < 1:
            raise ValueError(f"{name} is {get_field(config, name)}: it must be at least 1")
    cadences = ("eval.every_steps", "watch.every_steps", "export.every_steps", "checkpoint.keep_every")
    for name in ("total_steps", "total_tokens", *cadences, "loss.z_loss", "loss.vocab_chunks", "lora.rank"):
        if get_field(config, name) < 0:
            raise ValueError(f"{name} is {get_field(config, name)}: it can't be negative")
    for name, (low, high) in _RANGES.items():
        if not low <= get_field(config, name) <= high:
            raise ValueError(f"{name} is {get_field(config, name)}: it must be in {low:g} .. {high:g}")
    if config.optimizer.min_lr > config.optimizer.peak_lr:
        raise ValueError(f"optimizer.min_lr is {config.optimizer.min_lr}, above peak_lr {config.optimizer.peak_lr}")
    if config.watch.every_steps and not config.watch.documents:
        raise ValueError(f"watch.every_steps is {config.watch.every_steps}: watch.documents must name pages to watch")
    routing = config.routing
    for what, is_asked in (("export.ablate is True", config.export.ablate), ("routing.mixed is set", routing.mixed)):
        if is_asked and not routing.labelled:
            raise ValueError(f"{what}: routing.labelled must name the sources of the designated units")
    if config.export.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"export.dtype is {config.export.dtype!r}: it must be float32 or bfloat16")
    if wrong := [step for step in config.export.at_steps if step < 1]:
        raise ValueError(f"export.at_steps has {wrong[0]}: steps count from 1")
    if unknown := [name for name in config.accept_changes if name not in CHANGES]:
        raise ValueError(f"accept_changes names {unknown[0]!r}: known are {', '.join(CHANGES)}")
    compiler.parse_options(config.compiler_options)
    if (rank := config.lora.rank) and not (config.init_checkpoint or config.branch.workdir):
        raise ValueError(f"lora.rank is {rank}: adapters need the model of an init_checkpoint beside them")
    if config.batch_size % config.grad_accum_steps:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of grad_accum_steps {config.grad_accum_steps}"
        )


def _total_steps(config: ConfigDict) -> int:
    if bool(config.total_steps) == bool(config.total_tokens):
        both = f"total_steps is {config.total_steps} and total_tokens is {config.total_tokens}"
        raise ValueError(f"{both}: give one of them, the other 0")
    return config.total_steps or -(-config.total_tokens // (config.batch_size * config.seq_len))


def _plan_branch(config: ConfigDict) -> None:
    """Settles a branch's length, and the phases' starts, which are fractions of the other run."""
    step, optimizer = config.branch.step, config.optimizer
    if step < 1:
        raise ValueError(f"branch.step is {step}: give the step of a checkpoint of branch.workdir")
    if optimizer.schedule != "wsd":
        raise ValueError(
            f"branch.workdir is set and optimizer.schedule is {optimizer.schedule!r}: only wsd has branches"
        )
    if not optimizer.decay_steps:
        if optimizer.decay_fraction == 1:
            raise ValueError("optimizer.decay_fraction is 1: a branch has a stable phase before its decay")
        optimizer.decay_steps = round(step / (1 - optimizer.decay_fraction)) - step
    batch_tokens, phases = config.batch_size * config.seq_len, []
    for phase in map(_parse_phase, config.data.phases):
        start_tokens = phase.start_step(batch_tokens, config.total_steps) * batch_tokens
        phases.append({"rates": phase.rates} | ({"start_tokens": start_tokens} if start_tokens else {"start": 0.0}))
    config.data.phases = tuple(phases)
    config.total_steps = step + optimizer.decay_steps


def _parse_phase(phase: Any) -> Phase:
    try:
        return Phase.parse(phase)
    except ValueError as error:
        raise ValueError(f"data.phases: {error}") from error


def _origin(config: ConfigDict, workdir: str) -> tuple[str, str, checkpoint.Meta] | None:
    """Name, folder and record of the checkpoint that the run will begin with, if any; names of a hub are pinned."""
    if workdir and (meta := _newest_record(workdir)):
        return f"checkpoint {workdir}", workdir, meta  # a hub that is gone stops no run that has begun
    for field in ("tokenizer", "init_checkpoint"):
        config[field] = hub.pinned(config[field])
    if folder := config.branch.workdir:
        checkpoints, _, meta = checkpoint.open_checkpoint(folder, step=config.branch.step, setting="branch.step")
        checkpoints.close()
        return f"branch.workdir {folder}", folder, meta
    if source := config.init_checkpoint:
        return f"init_checkpoint {source}", source, sources.read_meta(source)
    return None


def _newest_record(workdir: str) -> checkpoint.Meta | None:
    """The record of a folder's newest checkpoint that can be read, or None where there is none."""
    if not (epath.Path(workdir) / "checkpoints").is_dir():
        return None
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        for step in reversed(checkpoints.steps()):
            try:
                return checkpoints.read_meta(step)
            except CorruptCheckpointError:
                continue
    return None


def _load_tokenizer(config: ConfigDict, origin: tuple[str, str, checkpoint.Meta] | None) -> Tokenizer:
    found = _own_tokenizer(config, origin)
    return found.with_document_end(config.document_end).with_chat_template(config.chat_template)


def _own_tokenizer(config: ConfigDict, origin: tuple[str, str, checkpoint.Meta] | None) -> Tokenizer:
    has_begun = origin is not None and origin[0].startswith("checkpoint ")
    if config.tokenizer and not (has_begun and hub.is_name(config.tokenizer)):
        return Tokenizer.from_pretrained(config.tokenizer)
    if origin:
        return sources.load_tokenizer(origin[1])
    raise ValueError("tokenizer is not set: give --config.tokenizer=PATH or an init_checkpoint that has one")


def _resolve_model(
    config: ConfigDict, tokenizer: Tokenizer | None, origin: tuple[str, str, checkpoint.Meta] | None
) -> ModelConfig:
    """The model; without a tokenizer its vocabulary is taken from the config and not compared with any."""
    fields = config.model.to_dict()
    if origin:
        where, _, meta = origin
        theirs = dataclasses.asdict(checkpoint.model_config_from_meta(meta, where=where))
        fields |= {name: value for name, value in theirs.items() if name in fields and fields[name] is None}
        if tokenizer is not None:
            checkpoint.check_vocabulary(meta, tokenizer, where=where)
        checkpoint.check_model(meta, ModelConfig(**fields), where=where)
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    if tokenizer is not None:
        defaults["vocab_size"] = tokenizer.vocab_size
    for name in [name for name, value in fields.items() if value is None]:
        if defaults[name] is dataclasses.MISSING:
            raise ValueError(f"model.{name} is not set: give it, or an init_checkpoint to take it from")
        fields[name] = defaults[name]
    if tokenizer is not None and fields["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size is {fields['vocab_size']}, the tokenizer has {tokenizer.vocab_size} ids")
    routed = config.routing.to_dict() if config.routing.labelled else None
    return ModelConfig(**fields, lora=config.lora.to_dict() if config.lora.rank else None, routed=routed)
