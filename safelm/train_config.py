"""What a training run can be told, and the checks on it that need nothing but the config, the tokenizer and a model.

Which fields may change when a run is resumed: everything but the model's architecture, the tokenizer, `seed`,
`batch_size`, `seq_len`, `data.packing`, the token stores' contents and what the mixture has given so far. So more
steps, other learning rates, another mesh, gradient accumulation, cadence of logs, evaluation or checkpoints are fine
(and are reported); another past is an error that names the field.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from safelm import checkpoint
from safelm.model import ModelConfig
from safelm.tokenizer import Tokenizer

# Fields that fix what has been trained on so far; a resumed run must have them as they were.
FIXED_FIELDS = ("seed", "batch_size", "seq_len", "data.packing")


def default_config() -> ConfigDict:
    """Every field with its default, unlocked; `configs/` start from it.

    A model field left unset is taken from `init_checkpoint`; `model.vocab_size` otherwise from the tokenizer.
    """
    unset = config_dict.placeholder
    required = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim")
    model = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name not in required}
    model |= {name: unset(int) for name in required}
    model |= {
        name: unset(type(model[name])) for name in ("rope_theta", "rms_norm_eps", "tie_embeddings", "max_seq_len")
    }
    return ConfigDict(
        {
            "seed": 0,  # of the parameters and of the data's order
            "total_steps": 0,  # one of the two, the other 0
            "total_tokens": 0,
            "batch_size": 8,  # sequences in an update, over all devices and all accumulation steps
            "seq_len": 256,  # tokens in a row
            "grad_accum_steps": 1,
            "tokenizer": "",  # Hugging Face folder, tokenizer.json or .gguf; empty: that of init_checkpoint
            "init_checkpoint": "",  # folder of `safelm.convert` or another run's workdir: its parameters to begin with
            "compilation_cache_dir": "",  # folder that keeps compiled programs, so that a restart need not compile
            "model": model,
            "data": {
                "root": "",  # folder of token stores: <root>/<source>/<split>
                "split": "train",
                # Rates are shares of tokens; `start` is a fraction of the run (`start_tokens` counts tokens instead).
                "phases": ({"start": 0.0, "rates": {}},),
                "packing": "concat",
                "num_workers": 0,
            },
            "eval": {"every_steps": 0, "sources": (), "split": "validation", "batches": 8},  # every_steps 0: never
            "optimizer": {
                "name": "adamw",
                "peak_lr": 3e-3,
                "min_lr": 0.0,
                "schedule": "wsd",  # wsd, cosine or linear
                "warmup_steps": 0,
                "decay_steps": 0,  # of wsd; 0: decay_fraction of the run
                "decay_fraction": 0.2,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "clip_norm": 1.0,  # 0: no clipping
            },
            "loss": {"z_loss": 0.0},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # devices along each axis; -1: those left
            "checkpoint": {"every_steps": 1000, "keep_last": 2, "keep_every": 0},
            "log": {
                "every_steps": 10,
                "peak_flops": 0.0,  # FLOP/s of one device for MFU; 0: from a table of chips
                "profile_start_step": 0,  # a profile of `profile_steps` steps from here on; 0: none but by SIGUSR1
                "profile_steps": 5,
            },
            "faults": {  # see safelm.train_faults
                "on_nonfinite": "halt",  # halt, skip or rollback, when the loss or the gradients aren't finite
                "on_spike": "ignore",  # ignore, skip or rollback, at a spike of the loss or the gradients' norm
                "spike_loss_ratio": 2.0,  # a spike is so many times the median over the window; 0: no limit
                "spike_grad_norm_ratio": 10.0,
                "spike_window": 128,  # updates
                "max_skips": 10,  # in spike_window steps; one more halts the run
                "max_rollbacks": 5,  # in the whole run; one more halts it
                "grace_s": 25.0,  # seconds from SIGTERM to the end of the step; then the process ends without a save
            },
        }
    )


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config whose every open field is settled, with what it names loaded."""

    config: ConfigDict
    model: ModelConfig
    tokenizer: Tokenizer


def resolve(config: ConfigDict) -> Resolved:
    """Settles steps, tokenizer and model. Raises ValueError or FileNotFoundError naming the field and its value."""
    config = _settle_run(config)
    tokenizer = _load_tokenizer(config)
    return Resolved(*_settle_model(config, _resolve_model(config, tokenizer)), tokenizer)


def resolve_sizes(config: ConfigDict) -> tuple[ConfigDict, ModelConfig]:
    """`resolve` for what needs shapes only: loads the tokenizer only if `model.vocab_size` is not set."""
    config = _settle_run(config)
    tokenizer = None if config.model.vocab_size else _load_tokenizer(config)
    return _settle_model(config, _resolve_model(config, tokenizer))


def _settle_run(config: ConfigDict) -> ConfigDict:
    """An unlocked copy with its steps settled."""
    config = config.copy_and_resolve_references().unlock()
    _check_numbers(config)
    config.total_steps = _total_steps(config)
    config.total_tokens = config.total_steps * config.batch_size * config.seq_len
    if config.optimizer.schedule == "wsd" and not config.optimizer.decay_steps:
        config.optimizer.decay_steps = round(config.optimizer.decay_fraction * config.total_steps)
    return config


def _settle_model(config: ConfigDict, model: ModelConfig) -> tuple[ConfigDict, ModelConfig]:
    if config.seq_len > model.max_seq_len:
        raise ValueError(f"seq_len is {config.seq_len}, longer than model.max_seq_len {model.max_seq_len}")
    config.model = ConfigDict(dataclasses.asdict(model))
    return config.lock(), model


def run_record(resolved: Resolved, data: Mapping[str, Any]) -> checkpoint.Meta:
    """What a checkpoint says of its run; `data` is the position and the stores (`train_data.TrainData.record`)."""
    fixed = {name: _get(resolved.config, name) for name in FIXED_FIELDS}
    return {**checkpoint.model_meta(resolved.model, resolved.tokenizer), "run": fixed, "data": dict(data)}


def check_resumable(meta: checkpoint.Meta, resolved: Resolved, data: Mapping[str, Any], *, where: str) -> None:
    """Raises ValueError naming the first field in which a checkpoint's run differs from this one's.

    `data` is this run's record at the checkpoint's step.
    """
    checkpoint.check_model(meta, resolved.model, where=where)
    checkpoint.check_vocabulary(meta, resolved.tokenizer, where=where)
    if "run" not in meta:
        raise ValueError(f"{where} holds parameters only: give its folder as init_checkpoint, and another workdir")
    for name, there in meta["run"].items():
        if there != (here := _get(resolved.config, name)):
            raise ValueError(f"{where} is of another run: {name} is {there!r} there, {here!r} here")
    for source, there in meta["data"]["stores"].items():
        if source in data["stores"] and there != (here := data["stores"][source]):
            raise ValueError(f"{where} is of another run: data.root's {source} is {there} there, {here} here")
    if meta["data"]["rows_given"] != data["rows_given"]:
        raise ValueError(
            f"{where} is of another run: data.phases gave it {meta['data']['rows_given']} rows by step {meta['step']}, "
            f"here they would have given {data['rows_given']}"
        )


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


def _get(config: ConfigDict, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part]
    return config


def _check_numbers(config: ConfigDict) -> None:
    positive = ("batch_size", "seq_len", "grad_accum_steps", "checkpoint.every_steps", "checkpoint.keep_last")
    for name in (*positive, "log.every_steps", "eval.batches"):
        if _get(config, name) < 1:
            raise ValueError(f"{name} is {_get(config, name)}: it must be at least 1")
    for name in ("total_steps", "total_tokens", "eval.every_steps", "checkpoint.keep_every", "loss.z_loss"):
        if _get(config, name) < 0:
            raise ValueError(f"{name} is {_get(config, name)}: it can't be negative")
    if config.batch_size % config.grad_accum_steps:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of grad_accum_steps {config.grad_accum_steps}"
        )


def _total_steps(config: ConfigDict) -> int:
    if bool(config.total_steps) == bool(config.total_tokens):
        both = f"total_steps is {config.total_steps} and total_tokens is {config.total_tokens}"
        raise ValueError(f"{both}: give one of them, the other 0")
    return config.total_steps or -(-config.total_tokens // (config.batch_size * config.seq_len))


def _load_tokenizer(config: ConfigDict) -> Tokenizer:
    if config.tokenizer:
        return Tokenizer.from_pretrained(config.tokenizer)
    if config.init_checkpoint:
        return checkpoint.load_tokenizer(config.init_checkpoint)
    raise ValueError("tokenizer is not set: give --config.tokenizer=PATH or an init_checkpoint that has one")


def _resolve_model(config: ConfigDict, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model; without a tokenizer its vocabulary is taken from the config and not compared with any."""
    fields = config.model.to_dict()
    if config.init_checkpoint:
        where = f"init_checkpoint {config.init_checkpoint}"
        checkpoints, _, meta = checkpoint.open_checkpoint(config.init_checkpoint)
        checkpoints.close()
        theirs = dataclasses.asdict(checkpoint.model_config_from_meta(meta, where=where))
        fields |= {name: value for name, value in theirs.items() if fields[name] is None}
        if tokenizer is not None:
            checkpoint.check_vocabulary(meta, tokenizer, where=where)
        checkpoint.check_model(meta, ModelConfig(**fields), where=where)
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    if tokenizer is not None:
        defaults["vocab_size"] = tokenizer.vocab_size
    for name in (name for name, value in fields.items() if value is None):
        if defaults[name] is dataclasses.MISSING:
            raise ValueError(f"model.{name} is not set: give it, or an init_checkpoint to take it from")
        fields[name] = defaults[name]
    if tokenizer is not None and fields["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size is {fields['vocab_size']}, the tokenizer has {tokenizer.vocab_size} ids")
    return ModelConfig(**fields)
