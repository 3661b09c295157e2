"""Rotary positions, masks and grouped-query attention as pure functions. Axis letters: see `safelm.models.decoder`."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from safelm.models.arrays import ArrayLike
from safelm.models.config import ModelConfig

MASKED_SCORE = -1e30  # finite, so that a query without any key averages instead of giving NaN


def rope_angles(
    config: ModelConfig, positions_BT: Int[ArrayLike, "B T"]
) -> tuple[Float[Array, "B T 1 P"], Float[Array, "B T 1 P"]]:
    """Cosine and sine per position and pair (P = head_dim / 2), float32, with a broadcast axis for heads."""
    frequencies_P = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if config.rope_scaling is not None:
        frequencies_P = config.rope_scaling.scaled(frequencies_P)
    angles_BT1P = positions_BT[..., None, None].astype(jnp.float32) * frequencies_P
    return jnp.cos(angles_BT1P), jnp.sin(angles_BT1P)


def rotate(
    x_BTNH: Float[Array, "B T N H"], cos_BT1P: Float[Array, "b T 1 P"], sin_BT1P: Float[Array, "b T 1 P"]
) -> Float[Array, "B T N H"]:
    """Applies rotary positions to pairs (i, i + H/2), the Hugging Face convention; float32 inside, dtype kept."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos_BT1P - second * sin_BT1P, second * cos_BT1P + first * sin_BT1P)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def causal_mask(length: int, segment_ids_BT: Int[ArrayLike, "B T"] | None = None) -> Bool[Array, "b T T"]:
    """True where query t may attend to key s: s <= t, and the same document when segment ids are given."""
    mask_1TS = jnp.tril(jnp.ones((1, length, length), dtype=bool))
    if segment_ids_BT is None:
        return mask_1TS
    return mask_1TS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def _scores(q_BTKGH: jax.Array, k_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    return jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED_SCORE)


def _grouped(q_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    return (q_BTNH * (1 / math.sqrt(H))).reshape(B, T, num_kv_heads, N // num_kv_heads, H)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[ArrayLike, "b T S"],
) -> Float[Array, "B T N H"]:
    """Softmax attention, several query heads per key head; scores and sums in float32.

    The weights are divided by their sum after the values are added up, not before: on a CPU that halves the time of
    forward and backward.
    """
    scores_BKGTS = _scores(_grouped(q_BTNH, k_BSKH.shape[2]), k_BSKH, mask_BTS)
    weights_BKGTS = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True)))
    sums_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
    out_BKGTH = jnp.einsum(
        "bkgts,bskh->bkgth", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
    )
    out_BKGTH = (out_BKGTH / sums_BKGT1).astype(q_BTNH.dtype)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def attend_behind(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache_kv: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    lengths_B: Int[ArrayLike, " B"],
) -> Float[Array, "B T N H"]:
    """Causal attention of new tokens over their row's first `lengths_B` cached ones and each other.

    The two sets of keys are not concatenated (which would copy them); scores and sums are in float32.
    """
    k_BKSH, v_BKSH = cache_kv
    q_BTKGH = _grouped(q_BTNH, k_BTKH.shape[2])
    is_cached_BS = jnp.arange(k_BKSH.shape[2]) < jnp.asarray(lengths_B)[:, None]
    cached_BKGTS = jnp.einsum("btkgh,bksh->bkgts", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    cached_BKGTS = jnp.where(is_cached_BS[:, None, None, None], cached_BKGTS, MASKED_SCORE)
    new_BKGTT = _scores(q_BTKGH, k_BTKH, causal_mask(q_BTNH.shape[1]))
    weights = jax.nn.softmax(jnp.concatenate([cached_BKGTS, new_BKGTT], axis=-1), axis=-1).astype(v_BTKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bksh->btkgh", weights[..., : k_BKSH.shape[2]], v_BKSH)
    out_BTKGH += jnp.einsum("bkgts,bskh->btkgh", weights[..., k_BKSH.shape[2] :], v_BTKH)
    return out_BTKGH.reshape(q_BTNH.shape)
