"""Truncation of what is drawn from: top-k (Fan et al. 2018) and the nucleus, top-p (Holtzman et al. 2020).

The vocabulary isn't sorted. The lowest log-prob that stays is bisected over the bits of float32, whose order as
integers is that of the numbers: 32 sums over a row, however flat it is (`scripts/bench/nucleus.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from safelm.inference.asked import NEVER

_BITS = 32


def filtered(
    log_probs_PV: Float[Array, "P V"],
    *,
    top_k_P: Int[Array, " P"],
    top_p_P: Float[Array, " P"],
    is_used_P: Bool[Array, " P"],
) -> Float[Array, "P V"]:
    """Log-probs with -inf outside the `top_k` likeliest tokens (0: all) and, of those, outside the nucleus of `top_p`.

    Of equally likely tokens the one with the smaller id comes first; the likeliest token always stays. Unused rows are
    undefined.
    """
    vocab_size = log_probs_PV.shape[1]
    has_top_k_P = is_used_P & (top_k_P > 0) & (top_k_P < vocab_size)
    has_top_p_P = is_used_P & (top_p_P < 1)
    key_PV = _ordered(log_probs_PV)

    def likeliest() -> Bool[Array, "P V"]:
        ones_PV = jnp.ones_like(log_probs_PV, jnp.float32)
        return _first(key_PV, ones_PV, top_k_P.astype(jnp.float32)) | ~has_top_k_P[:, None]

    def nucleus(is_in_PV: Bool[Array, "P V"]) -> Bool[Array, "P V"]:
        peak_P1 = log_probs_PV.max(axis=1, keepdims=True)
        weight_PV = jnp.where(is_in_PV, jnp.exp(log_probs_PV.astype(jnp.float32) - peak_P1), 0)
        within_PV = _first(key_PV, weight_PV, top_p_P * weight_PV.sum(axis=1))
        return is_in_PV & (within_PV | ~has_top_p_P[:, None])

    is_kept_PV = jnp.ones(log_probs_PV.shape, jnp.bool_)
    is_kept_PV = jax.lax.cond(has_top_k_P.any(), likeliest, lambda: is_kept_PV)
    is_kept_PV = jax.lax.cond(has_top_p_P.any(), nucleus, lambda is_in_PV: is_in_PV, is_kept_PV)
    return jnp.where(is_kept_PV, log_probs_PV, NEVER)


def _ordered(values: Float[Array, "P V"]) -> Int32[Array, "P V"]:
    """Integers in the order of the numbers; both zeros are 0."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    return jnp.where(values == 0, 0, jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits))


def _first(
    key_PV: Int32[Array, "P V"], weight_PV: Float32[Array, "P V"], target_P: Float32[Array, " P"]
) -> Bool[Array, "P V"]:
    """The tokens, by falling key and then by id, that have less than `target_P` before them; weights go by key."""

    def before(threshold_P: Int32[Array, " P"]) -> Float32[Array, " P"]:
        return jnp.where(key_PV > threshold_P[:, None], weight_PV, 0).sum(axis=1)

    lowest_P = _bisected(key_PV.min(axis=1), key_PV.max(axis=1), lambda middle_P: before(middle_P) < target_P)
    is_last_PV = key_PV == lowest_P[:, None]
    each_P = jnp.where(is_last_PV, weight_PV, 0).max(axis=1)
    room_P = jnp.ceil((target_P - before(lowest_P)) / jnp.maximum(each_P, jnp.finfo(jnp.float32).tiny))
    id_V = jnp.arange(key_PV.shape[1], dtype=jnp.int32)

    def up_to(end_P: Int32[Array, " P"]) -> Bool[Array, "P V"]:
        return is_last_PV & (id_V <= end_P[:, None])

    def with_room() -> Bool[Array, "P V"]:
        none_P = jnp.zeros_like(lowest_P)
        return up_to(_bisected(none_P, none_P + id_V[-1], lambda end_P: up_to(end_P).sum(axis=1) >= room_P))

    are_all_P = is_last_PV.sum(axis=1) <= room_P
    last_PV = jax.lax.cond(are_all_P.all(), lambda: is_last_PV, with_room)
    return (key_PV > lowest_P[:, None]) | last_PV


def _bisected(
    low_P: Int32[Array, " P"], high_P: Int32[Array, " P"], holds: Callable[[Int32[Array, " P"]], Bool[Array, " P"]]
) -> Int32[Array, " P"]:
    """The smallest integer from `low_P` on that `holds`; it holds from some integer on, at `high_P` at the latest."""

    def halved(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low_P, high_P = ends
        middle_P = (low_P & high_P) + ((low_P ^ high_P) >> 1)  # their mean; the sum may overflow
        does_P = holds(middle_P)
        return jnp.where(does_P, low_P, middle_P + 1), jnp.where(does_P, middle_P, high_P)

    return jax.lax.fori_loop(0, _BITS, halved, (low_P, high_P))[1]
