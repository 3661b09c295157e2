"""What a run will need before it is started: memory on a device, tokens, steps and time.

Memory is an estimate from shapes alone, in bytes on one device. With s the devices that share an array
(`safelm.models.sharding`), P the parameters (padded vocabulary included), w the bytes of `model.dtype`, t the tokens of
a micro-batch on a device, L layers and the axis letters of `safelm.models.decoder`:

    parameters   P / s in `param_dtype`, adapters in float32
    optimizer    its state: of AdamW twice that (two moments), of Muon once for the blocks' matrices
    gradients    P / s in float32, twice when micro-batches are added up
    activations  what is kept for the backward pass, L times
                     remat full   t w D
                     remat dots   t w (2D + N H + 2 K H + 2F), and with a fused attention kernel t (w N H + 4N)
                     remat none   t (24D + 16 + w (2D + 2 K H + 6F)), the layer's kernels in w / s, and for attention
                                  t (3 w N H + 4N) fused, t (2 w N H + 4 N H + 4N + w 5/8 T N) with "xla", whose
                                  5/8 are 1 for rows that it does not cut (`config.query_blocks`);
                                  for `model.qk_norm` t (12 (N H + K H) + 8 (N + K)), 16 for 8 (N + K) if it is one
                                  over all heads; norms "around" once more t (24D + 16), "gelu" t w 2F more; with
                                  remat dots, norms not "before" t w D more; for each adapter of rank R t w R, and with
                                  remat dots its product
    layer        the layer that the backward pass is in: what "none" would keep of it; and where FSDP splits the
                 parameters, those of the layer, brought together, and their gradient, in w
    loss         t V in float32 twice (logits and their gradient), or that part of V that `loss.vocab_chunks` makes at
                 a time; t D in float32 three times; with FSDP the unembedding, V D, in w

The first four are there all the time, a layer or the loss for a moment, whichever is larger.
N, K, F and V are divided by the tensor axis. With adapters (`config.lora`) P of optimizer and gradients is theirs, and
"none" is a bound: what frozen norms would need is not kept. What is kept is exactly what JAX hands to the backward pass
(a test counts it); what of the rest the compiler holds at once is not known before compiling: `safelm.aot` asks it. One
such comparison: four layers of SmolLM2-1.7B, 1024 x 2048 tokens in 64 micro-batches, remat full, on v5e:4x4 with FSDP:
1,098 MiB here, 1,054 MiB compiled by libtpu 0.0.52.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from safelm.data.schedule import MixtureSchedule
from safelm.models import attention_kernels, chunked_loss, lora, product_kernels, sharding
from safelm.models import decoder as model
from safelm.models.decoder import ModelConfig
from safelm.train import metrics as train_metrics
from safelm.train import program as train_program
from safelm.train import step as train_step
from safelm.train.data import TrainData, make_schedule
from safelm.train.optimizer import make_optimizer
from safelm.train.types import Shardings

_ADAMW = make_optimizer()


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device; the module's docstring has the formulas."""

    params: int
    optimizer: int
    gradients: int
    activations: int
    layer: int
    loss: int

    @property
    def total(self) -> int:
        """At the peak of an update."""
        return self.params + self.optimizer + self.gradients + self.activations + max(self.layer, self.loss)


def memory_estimate(
    model_config: ModelConfig,
    mesh_shape: Mapping[str, int],
    batch_size: int,
    grad_accum_steps: int,
    seq_len: int,
    *,
    vocab_chunks: int = 0,
    optimizer: optax.GradientTransformation = _ADAMW,
) -> MemoryEstimate:
    """What a device holds at the peak of an update: batch in rows of `seq_len` tokens over all devices.

    `model_config.attention` "auto" counts as "xla"; `vocab_chunks` as in `loss.vocab_chunks`; `optimizer`: AdamW where
    not given. Raises ValueError for a mesh that doesn't divide the parameters or a micro-batch's rows.
    """
    c, mesh = model_config, abstract_mesh(mesh_shape)
    micro_batch, tensor = batch_size // grad_accum_steps, mesh.shape["tensor"]
    if micro_batch % (shards := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(
            f"batch_size={batch_size} / grad_accum_steps={grad_accum_steps} is not a multiple of mesh.data x mesh.fsdp "
            f"= {shards}"
        )
    tokens = sharding.batch_sharding(mesh).shard_shape((micro_batch,))[0] * seq_len
    width, param_width = jnp.dtype(c.dtype).itemsize, jnp.dtype(c.param_dtype).itemsize
    sizes = dataclasses.replace(c, remat="none", attention="xla")  # which have no parameters
    mine, gathered = _param_counts(sizes, mesh), _param_counts(sizes, abstract_mesh({"tensor": tensor}))
    is_gathered = mine["layers"] != gathered["layers"]
    with jax.sharding.use_abstract_mesh(mesh):
        chunks = chunked_loss.num_chunks(vocab_chunks, micro_batch * seq_len, c.padded_vocab_size)
    none_layer = tokens * c.kept_bytes_per_token(seq_len, remat="none", tensor=tensor)
    if c.remat == "none":
        kept = c.num_layers * none_layer + mine["layers"] * width
    else:
        kept = c.num_layers * tokens * c.kept_bytes_per_token(seq_len, tensor=tensor)
    return MemoryEstimate(
        params=sum(mine.values()) * param_width + _trained_count(sizes, mesh) * (4 - param_width),
        optimizer=_optimizer_bytes(optimizer, sizes, mesh),
        gradients=4 * _trained_count(sizes, mesh) * (1 if grad_accum_steps == 1 else 2),
        activations=kept,
        layer=none_layer + 2 * gathered["layers"] // c.num_layers * width * is_gathered,
        loss=4 * tokens * (2 * (c.padded_vocab_size // tensor // chunks) + 3 * c.d_model)
        + gathered["embedder"] * width * is_gathered,
    )


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, to compute with its sizes; an axis left out has size 1."""
    sizes = tuple(int(shape.get(axis, 1)) for axis in sharding.MESH_AXES)
    return AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


@functools.cache  # tracing takes long, and a plan asks about hundreds of variants of a model
def _traced(config: ModelConfig) -> tuple[model.Params, model.Params]:
    return model.abstract_params(config), model.logical_axes(config)


@functools.cache
def _param_counts(config: ModelConfig, mesh: AbstractMesh) -> dict[str, int]:
    """Parameters on one device, padded vocabulary included, by the top of their path."""
    shapes, axes = _traced(config)
    shardings = sharding.param_shardings(mesh, axes, shapes)
    counts = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)), shapes, shardings)
    return {name: sum(jax.tree.leaves(tree)) for name, tree in counts.items()}


def _trained(config: ModelConfig, mesh: AbstractMesh) -> tuple[model.Params, Shardings]:
    """Shapes and shardings of what is trained."""
    shapes, axes = (lora.split(config, tree)[0] for tree in _traced(config))
    return shapes, sharding.param_shardings(mesh, axes, shapes)


def _trained_count(config: ModelConfig, mesh: AbstractMesh) -> int:
    counts = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)), *_trained(config, mesh))
    return sum(jax.tree.leaves(counts))


@functools.cache
def _optimizer_bytes(optimizer: optax.GradientTransformation, config: ModelConfig, mesh: AbstractMesh) -> int:
    """The optimizer's state on one device."""
    shapes, shardings = _trained(config, mesh)
    state = train_step.abstract_opt_state(optimizer, shapes, shardings, sharding.replicated(mesh))
    leaves = jax.tree.leaves(state)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def absent_mesh(shape: Mapping[str, int], num_devices: int) -> AbstractMesh | None:
    """The mesh of a config that needs more devices than there are here (an axis of -1 is 1 then), or None."""
    fixed = {axis: size for axis, size in shape.items() if size != -1}
    if min(fixed.values(), default=1) < 1 or math.prod(fixed.values()) <= num_devices:
        return None  # or an error that `sharding.make_mesh` words
    return abstract_mesh(fixed)


def summary(
    config: ConfigDict,
    model_config: ModelConfig,
    data: TrainData | None,
    mesh: Mesh | AbstractMesh,
    attention: attention_kernels.Choice | None = None,
) -> str:
    """A run's size in lines for people: what `--dry_run` prints and every run begins with.

    Args:
      config: resolved.
      data: None where the token stores aren't there yet: what is planned is shown instead.
      attention: the kernel settled for the mesh's devices; None where they aren't here.
    """
    steps = config.total_steps
    schedule = data.schedule if data else make_schedule(config)
    tokens = steps * config.batch_size * config.seq_len
    device_kind = mesh.devices.flat[0].device_kind if isinstance(mesh, Mesh) else ""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    attention = attention or _assumed_attention(model_config, config.seq_len)
    memory = memory_estimate(
        dataclasses.replace(model_config, attention=attention.kernel),
        mesh.shape,
        config.batch_size,
        config.grad_accum_steps,
        config.seq_len,
        vocab_chunks=config.loss.vocab_chunks,
        optimizer=train_program.configured_optimizer(config.optimizer, model_config),
    )
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in dataclasses.asdict(memory).items())
    flops = tokens * model_config.flops_per_token(config.seq_len)
    lines = [
        f"parameters: {model_config.num_params:,}{_adapters(model_config)}",
        f"tokens:     {tokens:,} ({config.batch_size} x {config.seq_len} a step)",
        f"steps:      {steps:,}",
        f"devices:    {mesh.size} {device_kind or 'planned for, not here'} ({axes})",
        f"attention:  {attention.kernel} ({attention.reason})",
        *([_products(model_config, mesh)] if isinstance(mesh, Mesh) else []),
        f"memory:     about {_bytes(memory.total)} a device ({parts})",
        f"compute:    {flops:.3g} FLOPs, {_time(config, flops, mesh.size, device_kind)}",
        *(f"phase:      from step {start:,}: {_spelled(rates)}" for start, rates in schedule.starts()),
        data.ledger_table(steps) if data else _planned_table(schedule, steps),
        *filter(None, [data.kinds_table(config.total_steps) if data else ""]),
    ]
    return "\n".join(lines)


def _adapters(model_config: ModelConfig) -> str:
    return f", of which {model_config.num_trained_params:,} of adapters are trained" if model_config.lora else ""


def _planned_table(schedule: MixtureSchedule, steps: int) -> str:
    planned = schedule.tokens_planned(steps)
    return "\n".join(f"source:     {name}: {round(planned[name]):,} tokens planned" for name in schedule.sources)


def _products(config: ModelConfig, mesh: Mesh) -> str:
    choice = product_kernels.choose(config, mesh)
    return f"products:   {choice.kernel} ({choice.reason})"


def _assumed_attention(config: ModelConfig, seq_len: int) -> attention_kernels.Choice:
    if config.attention == "auto" and seq_len % attention_kernels.LANES == 0 and not any(config.windows):
        return attention_kernels.Choice("splash", "assumed: auto, and the devices aren't here")
    return attention_kernels.Choice("xla" if config.attention == "auto" else config.attention, "assumed")


def _bytes(size: int) -> str:
    unit, name = (2**30, "GiB") if size >= 2**27 else (2**20, "MiB")
    return f"{size / unit:.2f} {name}"


def _spelled(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())


def _time(config: ConfigDict, flops: int, num_devices: int, device_kind: str) -> str:
    peak = train_metrics.peak_flops(device_kind, config.log.peak_flops)
    if peak is None:
        chip_days = flops / (train_metrics.peak_flops("TPU v5e") * config.log.assumed_mfu * 86400)
        v5e = f"on TPU v5e about {chip_days:,.0f} chip-days at {config.log.assumed_mfu:.0%} MFU"
        return f"{v5e} (these devices' peak isn't known: give log.peak_flops)"
    seconds = flops / (num_devices * peak * config.log.assumed_mfu)
    days, hours, minutes = int(seconds // 86400), int(seconds // 3600 % 24), int(seconds // 60 % 60)
    spelled = f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{seconds / 60:.1f} min"
    return f"{spelled} at {config.log.assumed_mfu:.0%} MFU of {num_devices} x {peak / 1e12:g} TFLOP/s"
