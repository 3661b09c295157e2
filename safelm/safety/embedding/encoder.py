"""Bidirectional encoders in Flax Linen: the BERT family, and the GTE v1.5 variant (rotary positions, gated MLP).

Axes: B batch, T query position, S key position, D embed, F mlp, N heads, H head_dim, V vocab, P positions, 3 query, key
and value.

Parameters: embeddings/{words [V, D], positions [P, D], types [types, D], norm/{scale, bias} [D]}; layer_<i>/{qkv [D, 3,
N, H], qkv_bias [3, N, H], output [N, H, D], output_bias [D], attention_norm/{scale, bias} [D], up [D, F] and up_bias
[F], or up_gate [D, 2, F], down [F, D], down_bias [D], mlp_norm/{scale, bias} [D]}.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.models import attention
from safelm.models.arrays import Params
from safelm.safety.embedding.encoder_config import EncoderConfig

_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def hidden_states(
    config: EncoderConfig, params: Params, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"]
) -> list[Float[Array, "B T D"]]:
    """The residual stream after the embeddings and after every layer: `num_layers + 1` arrays in `config.dtype`.

    Args:
      lengths_B: number of real tokens of each row; later ids don't change them.
    """
    return Encoder(config).apply({"params": params}, tokens_BT, lengths_B)


def packed_states(
    config: EncoderConfig,
    params: Params,
    x: Int[Array, "B T"] | Float[Array, "B T D"],
    segments_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    first: int = 0,
) -> list[Float[Array, "B T D"]]:
    """As `hidden_states` for rows of several chunks: the stream behind layer `first` and every later one.

    Args:
      x: token ids where `first` is 0, else the stream behind layer `first`.
      segments_BT: the chunk of each token, from 1 (0 = padding); attention stays inside it.
      positions_BT: of each token in its chunk.
    """
    return Encoder(config, first).apply({"params": params}, x, None, segments_BT, positions_BT)


def init(config: EncoderConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, for tests and shapes."""
    tokens_BT, lengths_B = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    return Encoder(config).init(key, tokens_BT, lengths_B)["params"]


class Encoder(nn.Module):
    """Layers from `first` on; a row is one chunk (`lengths_B`) or several (`segments_BT`, `positions_BT`)."""

    config: EncoderConfig
    first: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths_B: Any, segments_BT: Any = None, positions_BT: Any = None
    ) -> list[jax.Array]:
        c = self.config
        rope = None if c.rope_theta is None else rope_angles(c, x.shape[1])
        if rope is not None and positions_BT is not None:
            rope = tuple(angles_1T1P[0][positions_BT] for angles_1T1P in rope)
        x_BTD = x.astype(c.dtype) if self.first else Embeddings(c, name="embeddings")(x, positions_BT)
        states = [x_BTD]
        for i in range(self.first, c.num_layers):
            x_BTD = Layer(c, name=f"layer_{i}")(x_BTD, lengths_B if segments_BT is None else segments_BT, rope)
            states.append(x_BTD)
        return states


class LayerNorm(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D = x_BTD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (D,))
        bias_D = self.param("bias", nn.initializers.zeros, (D,))
        x = x_BTD.astype(jnp.float32)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(variance + self.config.norm_eps)
        return (x * scale_D + bias_D).astype(self.config.dtype)


class Embeddings(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        c, T = self.config, tokens_BT.shape[1]
        normal = nn.initializers.normal(0.02)
        x_BTD = jnp.take(self.param("words", normal, (c.vocab_size, c.d_model)), tokens_BT, axis=0)
        if c.rope_theta is None:
            positions_PD = self.param("positions", normal, (c.max_positions, c.d_model))
            where = slice(c.position_offset, c.position_offset + T)
            x_BTD += positions_PD[where if positions_BT is None else positions_BT + c.position_offset]
        if c.type_vocab_size:
            x_BTD += self.param("types", normal, (c.type_vocab_size, c.d_model))[0]
        return LayerNorm(c, name="norm")(x_BTD)


class Layer(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, visible: jax.Array, rope: Any) -> jax.Array:
        c = self.config
        x_BTD = LayerNorm(c, name="attention_norm")(x_BTD + self._attention(x_BTD, visible, rope))
        return LayerNorm(c, name="mlp_norm")(x_BTD + self._mlp(x_BTD))

    def _kernel(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, nn.initializers.normal(0.02), shape).astype(self.config.dtype)

    def _attention(self, x_BTD: jax.Array, visible: jax.Array, rope: Any) -> jax.Array:
        c, D = self.config, x_BTD.shape[-1]
        N, H = c.num_heads, c.head_dim
        qkv_D3NH, bias_3NH = self._kernel("qkv", (D, 3, N, H)), self._kernel("qkv_bias", (3, N, H))
        output_NHD, output_bias_D = self._kernel("output", (N, H, D)), self._kernel("output_bias", (D,))
        qkv_BT3NH = jnp.einsum("btd,dcnh->btcnh", x_BTD, qkv_D3NH) + bias_3NH
        out_BTNH = attend(qkv_BT3NH, visible, rope)
        return jnp.einsum("btnh,nhd->btd", out_BTNH, output_NHD) + output_bias_D

    def _mlp(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        D, F = c.d_model, c.d_ff
        activate = _ACTIVATIONS[c.activation]
        if c.is_gated:
            up_gate_BT2F = jnp.einsum("btd,dcf->btcf", x_BTD, self._kernel("up_gate", (D, 2, F)))
            h_BTF = up_gate_BT2F[:, :, 0] * activate(up_gate_BT2F[:, :, 1])
        else:
            h_BTF = activate(x_BTD @ self._kernel("up", (D, F)) + self._kernel("up_bias", (F,)))
        return h_BTF @ self._kernel("down", (F, D)) + self._kernel("down_bias", (D,))


def attend(
    qkv_BT3NH: Float[Array, "B T 3 N H"],
    visible: Int[Array, " B"] | Int[Array, "B T"],
    rope: tuple[jax.Array, jax.Array] | None,
) -> Float[Array, "B T N H"]:
    """Attention of every token to its row's first tokens or to its own chunk's; scores and sums in float32.

    Args:
      visible: how many of a row's tokens are seen, or the chunk of each of them.
      rope: cosine and sine [1 T 1 P], or [B T 1 P] where rows have positions of their own.

    Computed row by row: on a CPU the scores of one row stay in a core's cache, which is two to three times as fast as
    all rows at once.
    """

    def of_row(row: Any) -> jax.Array:
        qkv_T3NH, seen, angles = row
        q_TNH, k_TNH, v_TNH = qkv_T3NH[:, 0], qkv_T3NH[:, 1], qkv_T3NH[:, 2]
        if rope is not None:
            turn = angles or rope
            q_TNH, k_TNH = (attention.rotate(x[None], *turn)[0] for x in (q_TNH, k_TNH))
        q_NTH, k_NSH, v_NSH = ((x.transpose(1, 0, 2)) for x in (q_TNH * (1 / math.sqrt(q_TNH.shape[-1])), k_TNH, v_TNH))
        scores_NTS = jnp.einsum("nth,nsh->nts", q_NTH, k_NSH, preferred_element_type=jnp.float32)
        is_seen = seen[:, None] == seen if seen.ndim else jnp.arange(len(qkv_T3NH)) < seen
        scores_NTS = jnp.where(is_seen, scores_NTS, attention.MASKED_SCORE)
        weights_NTS = jnp.exp(scores_NTS - jax.lax.stop_gradient(scores_NTS.max(axis=-1, keepdims=True)))
        sums_NT1 = weights_NTS.sum(axis=-1, keepdims=True)
        out_NTH = jnp.einsum("nts,nsh->nth", weights_NTS.astype(v_NSH.dtype), v_NSH, preferred_element_type=jnp.float32)
        return (out_NTH / sums_NT1).astype(qkv_T3NH.dtype).transpose(1, 0, 2)

    own = () if rope is None or rope[0].shape[0] == 1 else tuple(angles_BT1P[:, None] for angles_BT1P in rope)
    return jax.lax.map(of_row, (qkv_BT3NH, visible, own))


def rope_angles(config: EncoderConfig, length: int) -> tuple[Float[Array, "1 T 1 P"], Float[Array, "1 T 1 P"]]:
    """Cosine and sine of rotary positions 0 to `length - 1` and pairs (P = head_dim / 2), float32.

    With a factor the frequencies are NTK-scaled at any length: the base times the factor and all divided by
    factor^(2 / head_dim), or, when mixed, each divided by exp(ln(factor) (i / P)^b) for pair i = 1 to P.
    """
    H, factor, mixed_b = config.head_dim, config.rope_factor, config.rope_mixed_b
    if factor == 1.0:
        base, divisor_P = config.rope_theta, 1.0
    elif mixed_b is None:
        base, divisor_P = config.rope_theta * factor, factor ** (2 / H)
    else:
        pairs_P = jnp.arange(1, H // 2 + 1, dtype=jnp.float32)
        base, divisor_P = config.rope_theta, jnp.exp(math.log(factor) * (pairs_P / (H // 2)) ** mixed_b)
    frequencies_P = base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H) / divisor_P
    angles_1T1P = jnp.arange(length, dtype=jnp.float32)[None, :, None, None] * frequencies_P
    return jnp.cos(angles_1T1P), jnp.sin(angles_1T1P)
