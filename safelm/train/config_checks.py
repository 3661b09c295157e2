"""Checks of a config's values that need neither data nor devices."""

from ml_collections import ConfigDict

from safelm.models.config import ModelConfig
from safelm.train import compiler
from safelm.train.config_fields import get_field
from safelm.train.defaults import CHANGES

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


def check_numbers(config: ConfigDict) -> None:
    """Raises ValueError, naming field and value, for one that can't be, or that another field contradicts."""
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
    if config.eval.every_steps and not config.eval.sources:
        raise ValueError(f"eval.every_steps is {config.eval.every_steps}: eval.sources must name what to evaluate on")
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


def check_export_steps(config: ConfigDict) -> None:
    """Raises ValueError for a step of `export.at_steps` that the run never comes to; `total_steps` is settled."""
    if beyond := [step for step in config.export.at_steps if step > config.total_steps]:
        raise ValueError(f"export.at_steps has {beyond[0]}: the run has {config.total_steps} steps (total_steps)")


def check_dtypes(config: ModelConfig) -> None:
    """Raises ValueError for dtypes in which training would lose updates."""
    if config.dtype == "float16":
        raise ValueError(
            "model.dtype is 'float16': training doesn't scale its loss, so small gradients would be 0; take bfloat16"
        )
    if config.lora is None and config.param_dtype != "float32":
        raise ValueError(
            f"model.param_dtype is {config.param_dtype!r}: parameters are trained in float32, since in fewer bits small"
            " updates vanish; model.dtype may be bfloat16, and with lora.rank, whose adapters are float32, both may be"
        )
