"""The decoder: SmolLM2/Llama (rotary positions, grouped-query attention, SwiGLU, RMSNorm), in Flax Linen.

Others see a config, `init` and `apply`: parameters are a plain nested dict, Linen stays in this file.

Axes: B batch, T query position, S key position, D embed, F mlp, N heads, K kv heads, G query heads per kv head,
H head_dim, V vocab (padded), L layers, W beams, C candidates.

Parameters (layers always stacked on a leading axis, whether scanned or not):
  embedder/embedding [V, D]; layers/{attention_norm,mlp_norm}/scale [L, D];
  layers/attention/{query [L, D, N, H], key, value [L, D, K, H], output [L, N, H, D]};
  layers/mlp/{gate, up [L, D, F], down [L, F, D]}; final_norm/scale [D]; unembed/kernel [D, V] when not tied.
Rows of padded ids are zero and stay zero: their logits are masked, so they get no gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safelm.models import attention, attention_kernels, sharding
from safelm.models.config import REMAT_POLICIES, ModelConfig
from safelm.models.projection import project

__all__ = ["KVCache", "ModelConfig", "Params", "abstract_params", "apply", "apply_cached", "hidden_states", "init",
           "init_cache", "layer_states", "logical_axes", "unembed", "unembedding", "write_cache"]  # fmt: skip

MASKED_LOGIT = -1e9  # of ids that exist only to pad the vocabulary
Params = dict[str, Any]
ArrayLike = Array | np.ndarray


@flax.struct.dataclass
class KVCache:
    """Keys (already rotated) and values of tokens seen, in `config.dtype`."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array


def _normal(std: float, *, num_real: int | None = None, axis: int = 0) -> nn.initializers.Initializer:
    """Normal with this standard deviation; entries from `num_real` on along `axis` are zero."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        values = std * jax.random.normal(key, shape, dtype)
        if num_real is None or num_real == shape[axis]:
            return values
        is_real = jax.lax.broadcasted_iota(jnp.int32, shape, axis) < num_real
        return jnp.where(is_real, values, jnp.zeros((), dtype))

    return initialize


class RMSNorm(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        initializer = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale_D = self.param("scale", initializer, (x_BTD.shape[-1],), self.config.param_dtype)
        x = x_BTD.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return (x * scale_D.astype(jnp.float32)).astype(self.config.dtype)


class _WithKernels(nn.Module):
    """A module that declares its kernels by name: parameters in `param_dtype`, handed out in `dtype`."""

    config: ModelConfig

    def kernel(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], *, is_output: bool = False) -> jax.Array:
        std = self.config.init_std / (math.sqrt(2 * self.config.num_layers) if is_output else 1.0)
        initializer = nn.with_logical_partitioning(_normal(std), axes)
        kernel = self.param(name, initializer, shape, self.config.param_dtype).astype(self.config.dtype)
        return sharding.gather(kernel, axes)  # in `dtype`: half the bytes


class Attention(_WithKernels):
    @nn.compact
    def __call__(self, x_BTD: jax.Array, cache_kv: Any, rope: Any, visible: Any) -> tuple[jax.Array, Any]:
        c = self.config
        query_DNH = self.kernel("query", (c.d_model, c.num_heads, c.head_dim), ("embed", "heads", "head_dim"))
        key_DKH = self.kernel("key", (c.d_model, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))
        value_DKH = self.kernel("value", (c.d_model, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))
        output_NHD = self.kernel(
            "output", (c.num_heads, c.head_dim, c.d_model), ("heads", "head_dim", "embed"), is_output=True
        )
        q_BTNH = attention.rotate(jnp.einsum("btd,dnh->btnh", x_BTD, query_DNH), *rope)
        k_BTKH = attention.rotate(jnp.einsum("btd,dkh->btkh", x_BTD, key_DKH), *rope)
        v_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, value_DKH)
        if cache_kv is None:
            out_BTNH, new_kv = attention_kernels.attend(c.attention, q_BTNH, k_BTKH, v_BTKH, visible), None
        else:
            new_kv = (k_BTKH, v_BTKH)
            out_BTNH = attention.attend_cached(q_BTNH, new_kv, cache_kv, *visible)
        return jnp.einsum("btnh,nhd->btd", out_BTNH, output_NHD), new_kv


class MLP(_WithKernels):
    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        gate_DF = self.kernel("gate", (c.d_model, c.d_ff), ("embed", "mlp"))
        up_DF = self.kernel("up", (c.d_model, c.d_ff), ("embed", "mlp"))
        down_FD = self.kernel("down", (c.d_ff, c.d_model), ("mlp", "embed"), is_output=True)
        return project(jax.nn.silu(project(x_BTD, gate_DF)) * project(x_BTD, up_DF), down_FD)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cache_kv: Any, rope: Any, visible: Any) -> tuple[jax.Array, Any]:
        normed = RMSNorm(self.config, name="attention_norm")(x_BTD)
        attended, new_kv = Attention(self.config, name="attention")(normed, cache_kv, rope, visible)
        x_BTD += attended
        x_BTD += MLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x_BTD))
        return sharding.constrain(x_BTD, ("batch", "length", "residual")), new_kv


class Decoder(nn.Module):
    """Tokens to the residual stream after the blocks, normed."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, cache_kv: Any, rope: Any, visible: Any) -> tuple[jax.Array, Any]:
        c = self.config
        initializer = nn.with_logical_partitioning(_normal(c.init_std, num_real=c.vocab_size), ("vocab", "embed"))
        shape = (c.padded_vocab_size, c.d_model)
        embedding_VD = _Table(initializer, shape, "embedding", c.param_dtype, name="embedder")()
        if not c.tie_embeddings:
            initializer = _normal(c.init_std, num_real=c.vocab_size, axis=1)
            initializer = nn.with_logical_partitioning(initializer, ("embed", "vocab"))
            _Table(initializer, shape[::-1], "kernel", c.param_dtype, name="unembed")()
        x_BTD = jnp.take(embedding_VD, tokens_BT, axis=0).astype(c.dtype)
        x_BTD = sharding.constrain(x_BTD, ("lookup_batch", "length", "embed"))  # then rows change places with columns
        x_BTD = sharding.constrain(x_BTD, ("batch", "length", "residual"))
        x_BTD, new_kv = _stacked_block(c)(c, name="layers")(x_BTD, cache_kv, rope, visible)
        return RMSNorm(c, name="final_norm")(x_BTD), new_kv


class _Table(nn.Module):
    initializer: Any
    shape: tuple[int, ...]
    param_name: str
    param_dtype: str

    @nn.compact
    def __call__(self) -> ArrayLike:
        return self.param(self.param_name, self.initializer, self.shape, self.param_dtype)


def _all_but_what_is_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy "none" under FSDP: kernels are gathered again for the backward pass, not kept whole."""
    return primitive.name != "sharding_constraint"


def _stacked_block(config: ModelConfig) -> Any:
    """`Block` scanned over a leading layers axis; unrolled to a plain loop when not `scan_layers`: same parameters."""
    block = Block
    if config.remat != "none" or sharding.splits_parameters():
        policy = REMAT_POLICIES.get(config.remat, _all_but_what_is_gathered)
        block = nn.remat(Block, policy=policy, prevent_cse=not config.scan_layers)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=config.num_layers,
        unroll=1 if config.scan_layers else config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _init_boxed(config: ModelConfig, key: jax.Array) -> Params:
    config = dataclasses.replace(config, attention="xla")
    tokens_BT = jnp.zeros((1, 1), dtype=jnp.int32)
    rope = attention.rope_angles(tokens_BT, config.head_dim, config.rope_theta)
    return Decoder(config).init(key, tokens_BT, None, rope, attention.causal_mask(1))["params"]


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters (the same for scanned and unrolled layers, any remat and any sharding)."""
    return nn.meta.unbox(_init_boxed(config, key))


def abstract_params(config: ModelConfig) -> Params:
    """The parameters' shapes and dtypes, without computing anything."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def logical_axes(config: ModelConfig) -> Params:
    """For every parameter the tuple of its logical axis names: see `sharding.LOGICAL_AXES`."""
    boxed = jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0))
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[ArrayLike, "B T"],
    *,
    positions_BT: Int[ArrayLike, "B T"] | None = None,
    segment_ids_BT: Int[ArrayLike, "B T"] | None = None,
    layer: int | None = None,
) -> Float[Array, "B T D"]:
    """The residual stream, in `config.dtype`.

    Args:
      positions_BT: of each token in its document; 0, 1, .. along the row when not given.
      segment_ids_BT: the document of each token (0 = padding); attention stays inside a document.
      layer: None for the last layer after the final norm (what `unembed` takes), else the stream after this many
        blocks, not normed (0 = the embeddings); the later blocks are not computed.
    """
    if layer is not None:
        (x_BTD,) = layer_states(
            config, params, tokens_BT, (layer,), positions_BT=positions_BT, segment_ids_BT=segment_ids_BT
        )
        return x_BTD
    seen = _rope_and_visible(config, tokens_BT, positions_BT, segment_ids_BT)
    x_BTD, _ = Decoder(config).apply({"params": params}, tokens_BT, None, *seen)
    return x_BTD


def layer_states(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[ArrayLike, "B T"],
    layers: Sequence[int],
    *,
    positions_BT: Int[ArrayLike, "B T"] | None = None,
    segment_ids_BT: Int[ArrayLike, "B T"] | None = None,
) -> list[Float[Array, "B T D"]]:
    """The residual stream after each of these many blocks, not normed (0 = the embeddings); every block runs once.

    Blocks after the last one asked for are not computed. Other arguments as in `hidden_states`; ValueError for a layer
    that the model does not have.
    """
    for layer in layers:
        if not 0 <= layer <= config.num_layers:
            raise ValueError(f"layer={layer}: the model has layers 0 to {config.num_layers}")
    seen = _rope_and_visible(config, tokens_BT, positions_BT, segment_ids_BT)
    states = {0: jnp.take(params["embedder"]["embedding"], tokens_BT, axis=0).astype(config.dtype)}
    before = 0
    for layer in sorted(set(layers) - {0}):
        part = dataclasses.replace(config, num_layers=layer - before)
        blocks = jax.tree.map(functools.partial(_part, before, layer), params["layers"])
        states[layer], _ = _stacked_block(part)(part).apply({"params": blocks}, states[before], None, *seen)
        before = layer
    return [states[layer] for layer in layers]


def _part(start: int, stop: int, stacked: ArrayLike) -> ArrayLike:
    return stacked[start:stop]


def _rope_and_visible(config: ModelConfig, tokens_BT: Any, positions_BT: Any, segment_ids_BT: Any) -> tuple[Any, Any]:
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    rope = attention.rope_angles(positions_BT, config.head_dim, config.rope_theta)
    return rope, attention_kernels.what_is_visible(config.attention, tokens_BT.shape[1], segment_ids_BT)


def unembed(config: ModelConfig, params: Params, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits over the padded vocabulary; those of padded ids are `MASKED_LOGIT`."""
    kernel_VD = unembedding(config, params).astype(config.dtype)
    logits = project(x_BTD, kernel_VD.T, jnp.float32)
    if config.padded_vocab_size == config.vocab_size:
        return logits
    return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits, MASKED_LOGIT)


def unembedding(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The kernel of the logits, in `param_dtype`: the embedding itself where it is tied."""
    return params["embedder"]["embedding"] if config.tie_embeddings else params["unembed"]["kernel"].T


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[ArrayLike, "B T"],
    *,
    positions_BT: Int[ArrayLike, "B T"] | None = None,
    segment_ids_BT: Int[ArrayLike, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits of the next token at every position, for inference; arguments as in `hidden_states`.

    Attention is xla's, which takes rows of any length on any device, whatever `config.attention` is.
    """
    config = dataclasses.replace(config, attention="xla")
    x_BTD = hidden_states(config, params, tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
    return unembed(config, params, x_BTD)


def init_cache(config: ModelConfig, batch_size: int, max_len: int) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_len` tokens."""
    shape = (config.num_layers, batch_size, max_len, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def apply_cached(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[ArrayLike, "B T"],
    cache: KVCache,
    *,
    lengths_B: Int[ArrayLike, " B"],
    positions_BT: Int[ArrayLike, "B T"],
    new_mask_BTT: Bool[ArrayLike, "_ T T"] | None = None,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Logits of new tokens after cached ones, and the new tokens' keys and values (S = T).

    A new token attends to its row's first `lengths_B` cache entries and to the new tokens that `new_mask_BTT` allows
    ([query, key]; causal when not given). The cache is not changed: write what is kept with `write_cache`. So with
    the identity as mask and equal positions, T alternatives for the next token share one prefix.
    """
    if new_mask_BTT is None:
        new_mask_BTT = attention.causal_mask(tokens_BT.shape[1])
    new_mask_BTT, lengths_B = jnp.asarray(new_mask_BTT), jnp.asarray(lengths_B)
    cache_mask_BS = jnp.arange(cache.k_LBSKH.shape[2]) < lengths_B[:, None]
    rope = attention.rope_angles(positions_BT, config.head_dim, config.rope_theta)
    x_BTD, new_kv = Decoder(config).apply(
        {"params": params}, tokens_BT, (cache.k_LBSKH, cache.v_LBSKH), rope, (new_mask_BTT, cache_mask_BS)
    )
    return unembed(config, params, x_BTD), KVCache(*new_kv)


def write_cache(cache: KVCache, new_kv: KVCache, starts_B: Int[ArrayLike, " B"]) -> KVCache:
    """Writes every row's new entries from its start on; entries past the end of the cache are dropped."""
    rows_B1 = jnp.arange(cache.k_LBSKH.shape[1])[:, None]
    columns_BT = starts_B[:, None] + jnp.arange(new_kv.k_LBSKH.shape[2])
    write = lambda old, new: old.at[:, rows_B1, columns_BT].set(new.astype(old.dtype), mode="drop")  # noqa: E731
    return jax.tree.map(write, cache, new_kv)
