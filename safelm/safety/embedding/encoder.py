"""Bidirectional encoders in Flax Linen: one, whose variants (BERT, DeBERTa, ModernBERT, GTE) are fields of its config.

Axes: B batch, T query position, S key position, D embed, F mlp, N heads, H head_dim, V vocab, P positions, R relative
positions, 3 query, key and value.

Parameters: embeddings/{words [V, D], positions [P, D], types [types, D], norm/{scale, bias} [D]}; relative/{rows [R,
D], norm}; layer_<i>/{qkv [D, 3, N, H], qkv_bias [3, N, H], output [N, H, D], output_bias [D], attention_norm/{scale,
bias} [D], up [D, F] and up_bias [F], or up_gate [D, 2, F], down [F, D], down_bias [D], mlp_norm/{scale, bias} [D]};
final_norm. Which of them there are is the config's; without biases none of those is there.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.models import attention
from safelm.models.arrays import Params
from safelm.safety.embedding import relative_positions
from safelm.safety.embedding.encoder_config import EncoderConfig
from safelm.safety.embedding.relative_positions import RelativeTerms

ACTIVATIONS = {
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
        c, T = self.config, x.shape[1]
        ropes = {theta: rope_angles(c, T, theta) for theta in {c.rope_theta, c.window_rope_theta} if theta is not None}
        if positions_BT is not None:
            ropes = {theta: tuple(a_1T1P[0][positions_BT] for a_1T1P in rope) for theta, rope in ropes.items()}
        x_BTD = x.astype(c.dtype) if self.first else Embeddings(c, name="embeddings")(x, positions_BT)
        relative_RD = RelativeRows(c, name="relative")(T) if c.relative_buckets else None
        states = [x_BTD]
        for i in range(self.first, c.num_layers):
            window = c.windows[i] if c.windows else 0
            rope = ropes.get(c.window_rope_theta if window else c.rope_theta)
            visible = lengths_B if segments_BT is None else segments_BT
            x_BTD = Layer(c, i, name=f"layer_{i}")(x_BTD, visible, rope, relative_RD)
            states.append(x_BTD)
        if c.has_final_norm:
            states[-1] = LayerNorm(c, name="final_norm")(states[-1])
        return states


class LayerNorm(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D = x_BTD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (D,))
        bias_D = self.param("bias", nn.initializers.zeros, (D,)) if self.config.has_biases else 0
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
        if c.has_position_table:
            positions_PD = self.param("positions", normal, (c.max_positions, c.d_model))
            where = slice(c.position_offset, c.position_offset + T)
            x_BTD += positions_PD[where if positions_BT is None else positions_BT + c.position_offset]
        if c.type_vocab_size:
            x_BTD += self.param("types", normal, (c.type_vocab_size, c.d_model))[0]
        return LayerNorm(c, name="norm")(x_BTD)


class RelativeRows(nn.Module):
    """The vectors of the relative positions that occur in rows of a length (He et al. 2021, DeBERTa)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        c = self.config
        rows_RD = self.param("rows", nn.initializers.normal(0.02), (2 * c.relative_buckets, c.d_model))
        first, index_TS = relative_positions.rows_of(length, c.relative_buckets, c.relative_reach)
        return LayerNorm(c, name="norm")(rows_RD[first : first + index_TS.max() + 1])


class Layer(nn.Module):
    config: EncoderConfig
    index: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, visible: jax.Array, rope: Any, relative_RD: jax.Array | None) -> jax.Array:
        c = self.config
        attention_norm, mlp_norm = LayerNorm(c, name="attention_norm"), LayerNorm(c, name="mlp_norm")
        if c.norms_first:
            normed_BTD = attention_norm(x_BTD) if self.index else x_BTD
            x_BTD += self._attention(normed_BTD, visible, rope, relative_RD)
            return x_BTD + self._mlp(mlp_norm(x_BTD))
        x_BTD = attention_norm(x_BTD + self._attention(x_BTD, visible, rope, relative_RD))
        return mlp_norm(x_BTD + self._mlp(x_BTD))

    def _kernel(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, nn.initializers.normal(0.02), shape).astype(self.config.dtype)

    def _bias(self, name: str, shape: tuple[int, ...]) -> jax.Array | float:
        return self._kernel(name, shape) if self.config.has_biases else 0.0

    def _attention(self, x_BTD: jax.Array, visible: jax.Array, rope: Any, relative_RD: jax.Array | None) -> jax.Array:
        c, D = self.config, x_BTD.shape[-1]
        N, H = c.num_heads, c.head_dim
        qkv_D3NH, bias_3NH = self._kernel("qkv", (D, 3, N, H)), self._bias("qkv_bias", (3, N, H))
        output_NHD, output_bias_D = self._kernel("output", (N, H, D)), self._bias("output_bias", (D,))
        qkv_BT3NH = jnp.einsum("btd,dcnh->btcnh", x_BTD, qkv_D3NH) + bias_3NH
        relative = None
        if relative_RD is not None:
            qkv_R3NH = jnp.einsum("rd,dcnh->rcnh", relative_RD, qkv_D3NH) + bias_3NH
            _, index_TS = relative_positions.rows_of(x_BTD.shape[1], c.relative_buckets, c.relative_reach)
            relative = RelativeTerms(qkv_R3NH[:, 0], qkv_R3NH[:, 1], index_TS)
        window = c.windows[self.index] if c.windows else 0
        out_BTNH = attend(qkv_BT3NH, visible, rope, window=window, relative=relative)
        return jnp.einsum("btnh,nhd->btd", out_BTNH, output_NHD) + output_bias_D

    def _mlp(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        D, F = c.d_model, c.d_ff
        activate = ACTIVATIONS[c.activation]
        if c.is_gated:
            up_gate_BT2F = jnp.einsum("btd,dcf->btcf", x_BTD, self._kernel("up_gate", (D, 2, F)))
            h_BTF = up_gate_BT2F[:, :, 0] * activate(up_gate_BT2F[:, :, 1])
        else:
            h_BTF = activate(x_BTD @ self._kernel("up", (D, F)) + self._bias("up_bias", (F,)))
        return h_BTF @ self._kernel("down", (F, D)) + self._bias("down_bias", (D,))


def attend(
    qkv_BT3NH: Float[Array, "B T 3 N H"],
    visible: Int[Array, " B"] | Int[Array, "B T"],
    rope: tuple[jax.Array, jax.Array] | None,
    *,
    window: int = 0,
    relative: RelativeTerms | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of every token to its row's first tokens or to its own chunk's; scores and sums in float32.

    Args:
      visible: how many of a row's tokens are seen, or the chunk of each of them.
      rope: cosine and sine [1 T 1 P], or [B T 1 P] where rows have positions of their own.
      window: how far a token sees to either side; 0 for everywhere. Chunks in a row are contiguous, so distances inside
        one are those in the row.
      relative: what distances add to the scores.

    Computed row by row: on a CPU the scores of one row stay in a core's cache, which is two to three times as fast as
    all rows at once.
    """
    T, H = qkv_BT3NH.shape[1], qkv_BT3NH.shape[-1]
    scale = 1 / math.sqrt(H if relative is None else H * relative_positions.TERMS)
    at_T = jnp.arange(T)

    def of_row(row: Any) -> jax.Array:
        qkv_T3NH, seen, angles = row
        q_TNH, k_TNH, v_TNH = qkv_T3NH[:, 0], qkv_T3NH[:, 1], qkv_T3NH[:, 2]
        if rope is not None:
            turn = angles or rope
            q_TNH, k_TNH = (attention.rotate(x[None], *turn)[0] for x in (q_TNH, k_TNH))
        q_NTH, k_NSH, v_NSH = ((x.transpose(1, 0, 2)) for x in (q_TNH * scale, k_TNH, v_TNH))
        scores_NTS = jnp.einsum("nth,nsh->nts", q_NTH, k_NSH, preferred_element_type=jnp.float32)
        if relative is not None:
            scores_NTS += relative.scores(q_NTH, k_NSH * scale)
        is_seen = seen[:, None] == seen if seen.ndim else at_T < seen
        if window:
            is_seen &= abs(at_T[:, None] - at_T) <= window
        scores_NTS = jnp.where(is_seen, scores_NTS, attention.MASKED_SCORE)
        weights_NTS = jnp.exp(scores_NTS - jax.lax.stop_gradient(scores_NTS.max(axis=-1, keepdims=True)))
        sums_NT1 = weights_NTS.sum(axis=-1, keepdims=True)
        out_NTH = jnp.einsum("nts,nsh->nth", weights_NTS.astype(v_NSH.dtype), v_NSH, preferred_element_type=jnp.float32)
        return (out_NTH / sums_NT1).astype(qkv_T3NH.dtype).transpose(1, 0, 2)

    own = () if rope is None or rope[0].shape[0] == 1 else tuple(angles_BT1P[:, None] for angles_BT1P in rope)
    return jax.lax.map(of_row, (qkv_BT3NH, visible, own))


def rope_angles(
    config: EncoderConfig, length: int, theta: float
) -> tuple[Float[Array, "1 T 1 P"], Float[Array, "1 T 1 P"]]:
    """Cosine and sine of rotary positions 0 to `length - 1` and pairs (P = head_dim / 2), float32.

    With a factor the frequencies are NTK-scaled at any length: the base times the factor and all divided by
    factor^(2 / head_dim), or, when mixed, each divided by exp(ln(factor) (i / P)^b) for pair i = 1 to P.
    """
    H, factor, mixed_b = config.head_dim, config.rope_factor, config.rope_mixed_b
    if factor == 1.0:
        base, divisor_P = theta, 1.0
    elif mixed_b is None:
        base, divisor_P = theta * factor, factor ** (2 / H)
    else:
        pairs_P = jnp.arange(1, H // 2 + 1, dtype=jnp.float32)
        base, divisor_P = theta, jnp.exp(math.log(factor) * (pairs_P / (H // 2)) ** mixed_b)
    frequencies_P = base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H) / divisor_P
    angles_1T1P = jnp.arange(length, dtype=jnp.float32)[None, :, None, None] * frequencies_P
    return jnp.cos(angles_1T1P), jnp.sin(angles_1T1P)
