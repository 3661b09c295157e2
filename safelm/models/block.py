"""One block of the decoder for both training, which declares kernels, and inference, which reads prepared ones.

Axes: see `safelm.models.decoder`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.models import attention
from safelm.models.config import ModelConfig

Product = Callable[[Array], Array]
Rope = tuple[Array, Array]
Attend = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class BlockWeights:
    """A block's products with its kernels, and its norms' scales.

    Attributes:
      query, key, value: [B, T, D] -> [B, T, heads, H] in `config.dtype`.
      output: [B, T, N, H] -> [B, T, D] in `config.dtype`.
      gate, up: [B, T, D] -> [B, T, F].
      down: [B, T, F] -> [B, T, D] in `config.dtype`.
      norms: scales by the norm's name in `ModelConfig.block_shapes`.
    """

    query: Product
    key: Product
    value: Product
    output: Product
    gate: Product
    up: Product
    down: Product
    norms: Mapping[str, Array]


def block(
    config: ModelConfig, weights: BlockWeights, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Attention and gated MLP, each behind an RMSNorm and added to the stream.

    Args:
      rope: `attention.rope_angles` of the tokens' positions.
      attend: (queries [B, T, N, H], keys, values [B, T, K, H]), keys and queries rotated, -> [B, T, N, H].

    Returns:
      The stream, and the tokens' keys (rotated) and values.
    """
    normed_BTD = rms_norm(config, x_BTD, weights.norms["attention_norm"])
    q_BTNH, k_BTKH = weights.query(normed_BTD), weights.key(normed_BTD)
    if config.qk_norm:
        q_BTNH = rms_norm(config, q_BTNH, weights.norms["query_norm"])
        k_BTKH = rms_norm(config, k_BTKH, weights.norms["key_norm"])
    q_BTNH, k_BTKH = attention.rotate(q_BTNH, *rope), attention.rotate(k_BTKH, *rope)
    v_BTKH = weights.value(normed_BTD)
    x_BTD += weights.output(attend(q_BTNH, k_BTKH, v_BTKH))
    normed_BTD = rms_norm(config, x_BTD, weights.norms["mlp_norm"])
    x_BTD += weights.down(jax.nn.silu(weights.gate(normed_BTD)) * weights.up(normed_BTD))
    return x_BTD, k_BTKH, v_BTKH


def rms_norm(config: ModelConfig, x: Float[Array, "*A D"], scale_D: Float[Array, " D"]) -> Float[Array, "*A D"]:
    """`x` over its root mean square along the last axis, times the scale; computed in float32, in `config.dtype`."""
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.rms_norm_eps)
    return (x * scale_D.astype(jnp.float32)).astype(config.dtype)
