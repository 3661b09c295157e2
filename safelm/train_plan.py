"""What a run will need before it is started: memory on a device, tokens, steps and time.

Memory is an estimate from shapes alone, in bytes on one device. With s the devices that share an array
(`safelm.sharding`), P the parameters (padded vocabulary included), w the bytes of `model.dtype`, t the tokens of a
micro-batch on a device, L layers and the axis letters of `safelm.model`:

    parameters   P / s in `param_dtype`
    optimizer    twice that: AdamW's two moments
    gradients    P / s in float32, twice when micro-batches are added up
    gathered     what FSDP brings together for a moment: a layer in w, twice, the next one being fetched already, and
                 its gradient; or the embedding table in w and its gradient in float32, whichever is larger
    activations  what is kept for the backward pass, L times
                     remat full   t w D
                     remat dots   t w (2D + N H + 2 K H + 2F), and with a fused attention kernel t (w N H + 4N)
                     remat none   t (24D + w (2D + 2 N H + 2 K H + 6F) + 4 N H), and P w / s / L for the kernels in w;
                                  with attention "xla" also t T N (4 + w): scores and weights
                 and twice one layer's "none": the layer that the backward pass is in, recomputed, and its gradients
    logits       t V / chunks in float32, three times: logits, their softmax and its gradient; and 3 t D in float32

N, K, F and V are divided by the tensor axis. What is kept is exactly what JAX hands to the backward pass (a test
counts it); what of the rest the compiler holds at once is not known before compiling: `safelm.aot` asks it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from safelm import model, sharding
from safelm.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device; the module's docstring has the formulas."""

    params: int
    optimizer: int
    gradients: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def memory_estimate(
    model_config: ModelConfig,
    mesh_shape: Mapping[str, int],
    batch_size: int,
    grad_accum_steps: int,
    seq_len: int,
    *,
    vocab_chunks: int = 1,
) -> MemoryEstimate:
    """What a device holds at the peak of an update: batch in rows of `seq_len` tokens over all devices.

    `model_config.attention` "auto" counts as "xla". `vocab_chunks`: parts in which the loss makes the logits.
    """
    c, tensor = model_config, mesh_shape.get("tensor", 1)
    layer, table, all_params = _param_bytes(c, mesh_shape)
    rows = batch_size / grad_accum_steps / _shards(mesh_shape, ("batch",))
    tokens, width = math.ceil(rows) * seq_len, jnp.dtype(c.dtype).itemsize
    none_layer = tokens * _none_bytes_per_token(c, seq_len, width, tensor)
    if c.remat == "none":
        kept = c.num_layers * none_layer + layer.sharded // jnp.dtype(c.param_dtype).itemsize * width
    else:
        kept = c.num_layers * tokens * _saved_bytes_per_token(c, width, tensor)
    is_gathered = layer.sharded != layer.whole
    gathered_layer = 3 * layer.whole // c.num_layers // jnp.dtype(c.param_dtype).itemsize * width
    gathered_table = table.whole // jnp.dtype(c.param_dtype).itemsize * (width + 4)
    return MemoryEstimate(
        params=all_params,
        optimizer=2 * all_params,
        gradients=all_params // jnp.dtype(c.param_dtype).itemsize * 4 * (1 if grad_accum_steps == 1 else 2),
        gathered=max(gathered_layer, gathered_table) if is_gathered else 0,
        activations=kept + 2 * none_layer,
        logits=3 * 4 * tokens * (c.padded_vocab_size // tensor // vocab_chunks + c.d_model),
    )


@dataclasses.dataclass(frozen=True)
class _Bytes:
    sharded: int  # on one device
    whole: int  # with the parts of all devices on the fsdp axis together


def _param_bytes(config: ModelConfig, mesh_shape: Mapping[str, int]) -> tuple[_Bytes, _Bytes, int]:
    """Of all layers together, of the larger embedding table, and of everything on one device."""
    axes, shapes = model.logical_axes(config), model.abstract_params(config)
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731

    def size(names: tuple[str | None, ...], leaf: Any) -> _Bytes:
        in_all = leaf.size * leaf.dtype.itemsize
        return _Bytes(
            in_all // _shards(mesh_shape, names), in_all // _shards({**mesh_shape, "fsdp": 1, "data": 1}, names)
        )

    sizes = jax.tree.map(size, axes, shapes, is_leaf=is_names)
    total = lambda tree: _Bytes(  # noqa: E731
        sum(leaf.sharded for leaf in jax.tree.leaves(tree)), sum(leaf.whole for leaf in jax.tree.leaves(tree))
    )
    return total(sizes["layers"]), total(sizes["embedder"]), total(sizes).sharded


def _saved_bytes_per_token(c: ModelConfig, width: int, tensor: int) -> int:
    """Kept for the backward pass in one layer under remat "full" or "dots"."""
    if c.remat == "full":
        return width * c.d_model
    split = c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim + 2 * c.d_ff
    fused = (width * c.head_dim + 4) * c.num_heads if c.attention in ("splash", "cudnn") else 0
    return width * 2 * c.d_model + (width * split + fused) // tensor


def _none_bytes_per_token(c: ModelConfig, seq_len: int, width: int, tensor: int) -> int:
    """Kept for the backward pass in one layer without rematerialisation."""
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    scores = 0 if c.attention in ("splash", "cudnn") else seq_len * c.num_heads * (4 + width)
    split = width * (2 * heads + 2 * kv_heads + 6 * c.d_ff) + 4 * heads + scores
    return (24 + 2 * width) * c.d_model + split // tensor


def _shards(mesh_shape: Mapping[str, int], names: Sequence[str | None]) -> int:
    """How many devices share an array with these logical axes."""
    axes = [axis for axis in sharding.partition_spec(names) if axis is not None]
    flat = [name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis)]
    return math.prod(mesh_shape.get(name, 1) for name in flat)
