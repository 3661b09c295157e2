"""One block of the decoder for both training, which declares kernels, and inference, which reads prepared ones.

Axes: see `safelm.models.decoder`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.models import attention
from safelm.models.config import NORMS, ModelConfig

Product = Callable[[Array], Array]
Products = Callable[[Array], tuple[Array, ...]]
Rope = tuple[Array, Array]
Attend = Callable[[Array, Array, Array], Array]
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True)
class BlockWeights:
    """A block's products with its kernels, and its norms' scales.

    Attributes:
      heads: [B, T, D] -> queries [B, T, N, H], keys and values [B, T, K, H] in `config.dtype`, with their biases.
      output: [B, T, N, H] -> [B, T, D] in `config.dtype`.
      gated: [B, T, D] -> gate and up, both [B, T, F].
      down: [B, T, F] -> [B, T, D] in `config.dtype`.
      norms: scales by the norm's name in `ModelConfig.block_shapes`.
    """

    heads: Products
    output: Product
    gated: Products
    down: Product
    norms: Mapping[str, Array]


def block(
    config: ModelConfig, weights: BlockWeights, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Attention and gated MLP, each normed where `config.norms` says and added to the stream.

    Args:
      rope: this layer's of `attention.rope_angles`, for the tokens' positions.
      attend: (queries [B, T, N, H], keys, values [B, T, K, H]), keys and queries rotated, -> [B, T, N, H].

    Returns:
      The stream, and the tokens' keys (rotated) and values.
    """
    into_BTD = _before(config, weights, "attention", x_BTD)
    q_BTNH, k_BTKH, v_BTKH = weights.heads(into_BTD)
    if config.qk_norm:
        q_BTNH = _head_norm(config, q_BTNH, weights.norms["query_norm"])
        k_BTKH = _head_norm(config, k_BTKH, weights.norms["key_norm"])
    rotate = attention.rotate_by_product if config.attention == "splash" else attention.rotate
    q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
    if (scalar := config.query_pre_attn_scalar or config.head_dim) != config.head_dim:
        q_BTNH *= math.sqrt(config.head_dim / scalar)
    x_BTD += _after(config, weights, "attention", weights.output(attend(q_BTNH, k_BTKH, v_BTKH)))
    into_BTD = _before(config, weights, "mlp", x_BTD)
    gate_BTF, up_BTF = weights.gated(into_BTD)
    x_BTD += _after(config, weights, "mlp", weights.down(_ACTIVATIONS[config.activation](gate_BTF) * up_BTF))
    return x_BTD, k_BTKH, v_BTKH


def _before(config: ModelConfig, weights: BlockWeights, part: str, x_BTD: Array) -> Array:
    """What attention or MLP reads of the stream."""
    return x_BTD if config.norms == "after" else rms_norm(config, x_BTD, weights.norms[f"{part}_norm"])


def _after(config: ModelConfig, weights: BlockWeights, part: str, out_BTD: Array) -> Array:
    """What of the output of attention or MLP is added to the stream."""
    if config.norms == "before":
        return out_BTD
    return rms_norm(config, out_BTD, weights.norms[f"{part}{NORMS[config.norms][-1]}_norm"])


def _head_norm(config: ModelConfig, x_BTNH: Array, scale: Array) -> Array:
    """The norm of queries or keys: over every head, or over all of them together."""
    if not config.qk_norm_width:
        return rms_norm(config, x_BTNH, scale)
    return rms_norm(config, x_BTNH.reshape(*x_BTNH.shape[:2], -1), scale).reshape(x_BTNH.shape)


def rms_norm(config: ModelConfig, x: Float[Array, "*A D"], scale_D: Float[Array, "*R D"]) -> Float[Array, "*A D"]:
    """`x` over its root mean square along the last axis, times the scale; computed in float32, in `config.dtype`."""
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.rms_norm_eps)
    scale_D = scale_D.astype(jnp.float32)
    return (x * (1 + scale_D if config.norm_offset else scale_D)).astype(config.dtype)


def embedded(config: ModelConfig, rows: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
    """Rows of the embedding as the stream begins with them, in `config.dtype`."""
    rows = rows.astype(config.dtype)
    return rows * jnp.asarray(math.sqrt(config.d_model), config.dtype) if config.scale_embeddings else rows
