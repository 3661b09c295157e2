"""Rotary positions, masks and grouped-query attention as pure functions. Axis letters: see `safelm.models.decoder`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safelm.models.arrays import ArrayLike
from safelm.models.config import ModelConfig

MASKED_SCORE = -1e30  # finite, so that a query without any key averages instead of giving NaN


def rope_angles(
    config: ModelConfig, positions_BT: Int[ArrayLike, "B T"], theta: float | None = None
) -> tuple[Float[Array, "B T 1 P"], Float[Array, "B T 1 P"]]:
    """Cosine and sine per position and pair (P = head_dim / 2), float32, with a broadcast axis for heads.

    `theta` is the base, that of the config where not given; 0 rotates nothing.
    """
    theta = config.rope_theta if theta is None else theta
    if theta == 0:
        frequencies_P = jnp.zeros(config.head_dim // 2, jnp.float32)
    else:
        frequencies_P = theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if config.rope_scaling is not None and theta == config.rope_theta:
        frequencies_P = config.rope_scaling.scaled(frequencies_P)
    angles_BT1P = positions_BT[..., None, None].astype(jnp.float32) * frequencies_P
    return jnp.cos(angles_BT1P), jnp.sin(angles_BT1P)


def inside_window(distance: Int[ArrayLike, "*A"], window: int | Int[Array, ""]) -> Bool[Array, "*A"]:
    """True where a key that stands so many tokens before its query is in the layer's window; 0: every one is."""
    return (distance < window) | (window == 0)


def windowed(mask_BTS: Bool[ArrayLike, "b T T"], window: int | Int[Array, ""]) -> Bool[ArrayLike, "b T T"]:
    """A mask of tokens among themselves, further restricted to a window."""
    if isinstance(window, int) and window == 0:
        return mask_BTS
    places_T = jnp.arange(mask_BTS.shape[-1])
    return mask_BTS & inside_window(places_T[:, None] - places_T, window)


def rotate(
    x_BTNH: Float[Array, "B T N H"], cos_BT1P: Float[Array, "b T 1 P"], sin_BT1P: Float[Array, "b T 1 P"]
) -> Float[Array, "B T N H"]:
    """Applies rotary positions to pairs (i, i + H/2), the Hugging Face convention; float32 inside, dtype kept."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos_BT1P - second * sin_BT1P, second * cos_BT1P + first * sin_BT1P)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


@jax.custom_vjp
def rotate_by_product(
    x_BTNH: Float[Array, "B T N H"], cos_BT1P: Float[Array, "b T 1 P"], sin_BT1P: Float[Array, "b T 1 P"]
) -> Float[Array, "B T N H"]:
    """`rotate` for TPUs: a product with a permutation swaps the two halves, exactly, instead of cutting vectors of 128
    lanes into 32; the angles get no gradient.

    Heads go before positions meanwhile, as splash takes them: the order is changed in `x_BTNH`'s own dtype, not in
    float32 between the two."""
    half = x_BTNH.shape[-1] // 2
    swap_HH = np.zeros((2 * half, 2 * half), np.float32)
    swap_HH[range(half, 2 * half), range(half)], swap_HH[range(half), range(half, 2 * half)] = -1.0, 1.0
    x_BNTH = x_BTNH.swapaxes(1, 2)
    swapped_BNTH = jnp.einsum(
        "bnth,hg->bntg", x_BNTH, jnp.asarray(swap_HH, x_BTNH.dtype), preferred_element_type=jnp.float32
    )
    cos_B1TH, sin_B1TH = (
        jnp.concatenate([angle_BT1P] * 2, axis=-1).swapaxes(1, 2) for angle_BT1P in (cos_BT1P, sin_BT1P)
    )
    rotated_BNTH = (x_BNTH.astype(jnp.float32) * cos_B1TH + swapped_BNTH * sin_B1TH).astype(x_BTNH.dtype)
    return rotated_BNTH.swapaxes(1, 2)


def _rotate_forward(x_BTNH: Array, cos_BT1P: Array, sin_BT1P: Array) -> tuple[Array, tuple[Array, Array]]:
    # By the function itself, which hides the product from remat policies: it is not to be kept.
    return rotate_by_product(x_BTNH, cos_BT1P, sin_BT1P), (cos_BT1P, sin_BT1P)


def _rotate_backward(angles: tuple[Array, Array], grad_BTNH: Array) -> tuple[Array, None, None]:
    cos_BT1P, sin_BT1P = angles
    return rotate_by_product(grad_BTNH, cos_BT1P, -sin_BT1P), None, None


rotate_by_product.defvjp(_rotate_forward, _rotate_backward)


def causal_mask(length: int, segment_ids_BT: Int[ArrayLike, "B T"] | None = None) -> Bool[Array, "b T T"]:
    """True where query t may attend to key s: s <= t, and the same document when segment ids are given."""
    mask_1TS = jnp.tril(jnp.ones((1, length, length), dtype=bool))
    if segment_ids_BT is None:
        return mask_1TS
    return mask_1TS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def branching_mask(branches_BT: Int[ArrayLike, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t may attend to key s: s <= t, of the same branch or of the trunk, which is branch 0."""
    branches_BT = jnp.asarray(branches_BT)
    is_own_BTS = branches_BT[:, :, None] == branches_BT[:, None, :]
    return causal_mask(branches_BT.shape[1]) & (is_own_BTS | (branches_BT == 0)[:, None, :])


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

    The weights are divided by their sum after the values are added up, not before, and heads go before positions, so
    that products write scores in the order in which they are used: on a CPU each halves the time of forward and
    backward. For training see `safelm.models.causal_attention`.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BSKH.shape[2], k_BSKH.shape[1]
    q_BKRH = _grouped(q_BTNH, K).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    scores_BKRS = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKRS.reshape(B, K, N // K, T, S), MASKED_SCORE)
    weights_BKGTS = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True)))
    sums_BKR1 = weights_BKGTS.sum(axis=-1).reshape(B, K, -1, 1)
    weights_BKRS = weights_BKGTS.reshape(B, K, -1, S).astype(v_BSKH.dtype)
    out_BKRH = jnp.einsum("bkrs,bksh->bkrh", weights_BKRS, v_BKSH, preferred_element_type=jnp.float32)
    out_BKRH = (out_BKRH / sums_BKR1).astype(q_BTNH.dtype)
    return out_BKRH.reshape(B, N, T, H).swapaxes(1, 2)


def seen_in_cache(max_len: int, lengths_B: Int[Array, " B"], num_new: int, window: int) -> Bool[Array, "B t S"]:
    """Which cached tokens each of `num_new` tokens behind them sees; one answer for all (t = 1) without a window."""
    places_S = jnp.arange(max_len)
    is_cached_B1S = (places_S < lengths_B[:, None])[:, None]
    if not window:
        return is_cached_B1S
    places_BT = lengths_B[:, None] + jnp.arange(num_new)
    return is_cached_B1S & inside_window(places_BT[..., None] - places_S, window)


def attend_behind(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache_kv: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    lengths_B: Int[ArrayLike, " B"],
    window: int = 0,
) -> Float[Array, "B T N H"]:
    """Causal attention of new tokens over their row's first `lengths_B` cached ones and each other, in a window.

    The two sets of keys are not concatenated (which would copy them); scores and sums are in float32.
    """
    max_len, num_new = cache_kv[0].shape[2], q_BTNH.shape[1]
    is_seen_BTS = seen_in_cache(max_len, jnp.asarray(lengths_B), num_new, window)
    return attend_both(q_BTNH, k_BTKH, v_BTKH, cache_kv, is_seen_BTS, windowed(causal_mask(num_new), window))


def attend_both(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache_kv: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    is_seen_BTS: Bool[Array, "B t S"],
    mask_BTT: Bool[Array, "b T T"],
) -> Float[Array, "B T N H"]:
    """Attention of new tokens over the cached ones that they see, and by `mask_BTT` over each other."""
    k_BKSH, v_BKSH = cache_kv
    q_BTKGH = _grouped(q_BTNH, k_BTKH.shape[2])
    cached_BKGTS = jnp.einsum("btkgh,bksh->bkgts", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    cached_BKGTS = jnp.where(is_seen_BTS[:, None, None], cached_BKGTS, MASKED_SCORE)
    new_BKGTT = _scores(q_BTKGH, k_BTKH, mask_BTT)
    weights = jax.nn.softmax(jnp.concatenate([cached_BKGTS, new_BKGTT], axis=-1), axis=-1).astype(v_BTKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bksh->btkgh", weights[..., : k_BKSH.shape[2]], v_BKSH)
    out_BTKGH += jnp.einsum("bkgts,bskh->btkgh", weights[..., k_BKSH.shape[2] :], v_BTKH)
    return out_BTKGH.reshape(q_BTNH.shape)
