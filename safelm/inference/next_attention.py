"""Attention of alternatives for the next token over a cache. Axes: see `safelm.inference.asked`; M = C * G queries."""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from safelm.models import attention


def attend_next(
    q_RCNH: Float[Array, "R C N H"],
    k_RCKH: Float[Array, "R C K H"],
    v_RCKH: Float[Array, "R C K H"],
    k_RKSH: Float[Array, "R K S H"],
    v_RKSH: Float[Array, "R K S H"],
    is_seen_RS: Bool[Array, "R S"],
) -> Float[Array, "R C N H"]:
    """Attention of C alternatives over their row's cache and, each, itself; scores and sums in float32."""
    q_RKMH, own_RKM1 = _next_queries(q_RCNH, k_RCKH)
    cached_RKMS = jnp.einsum("rkmh,rksh->rkms", q_RKMH, k_RKSH, preferred_element_type=jnp.float32)
    cached_RKMS = jnp.where(is_seen_RS[:, None, None], cached_RKMS, attention.MASKED_SCORE)
    peak_RKM1 = jnp.maximum(cached_RKMS.max(axis=-1, keepdims=True), own_RKM1)
    weights_RKMS, own_RKM1 = jnp.exp(cached_RKMS - peak_RKM1), jnp.exp(own_RKM1 - peak_RKM1)
    out_RKMH = jnp.einsum(
        "rkms,rksh->rkmh", weights_RKMS.astype(v_RKSH.dtype), v_RKSH, preferred_element_type=jnp.float32
    )
    out_RKMH += own_RKM1 * _by_query(v_RCKH, q_RKMH.shape[2])
    out_RKMH /= weights_RKMS.sum(axis=-1, keepdims=True) + own_RKM1
    return _by_alternative(out_RKMH, q_RCNH)


def attend_next_over_rows(
    q_RCNH: Float[Array, "R C N H"],
    k_RCKH: Float[Array, "R C K H"],
    v_RCKH: Float[Array, "R C K H"],
    k_RKSH: Float[Array, "R K S H"],
    v_RKSH: Float[Array, "R K S H"],
    is_seen_PWVS: Bool[Array, "P W W S"],
) -> Float[Array, "R C N H"]:
    """`attend_next` where a row's text lies in the rows of all of its prompt's W beams (V = W).

    A prompt's keys are read once, for the queries of all its beams: W times the products, and nothing is gathered.
    """
    q_RKMH, own_RKM1 = _next_queries(q_RCNH, k_RCKH)
    P, W = is_seen_PWVS.shape[:2]

    def of_prompt(x_R: Array) -> Array:
        return x_R.reshape(P, W, *x_R.shape[1:])

    q_PWKMH, own_PWKM1, k_PVKSH, v_PVKSH = map(of_prompt, (q_RKMH, own_RKM1, k_RKSH, v_RKSH))
    summed = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_PWKMVS = summed("pwkmh,pvksh->pwkmvs", q_PWKMH, k_PVKSH)
    scores_PWKMVS = jnp.where(is_seen_PWVS[:, :, None, None], scores_PWKMVS, attention.MASKED_SCORE)
    peak_PWKM1 = jnp.maximum(scores_PWKMVS.max(axis=(-2, -1))[..., None], own_PWKM1)
    weights_PWKMVS, own_PWKM1 = jnp.exp(scores_PWKMVS - peak_PWKM1[..., None]), jnp.exp(own_PWKM1 - peak_PWKM1)
    out_PWKMH = summed("pwkmvs,pvksh->pwkmh", weights_PWKMVS.astype(v_RKSH.dtype), v_PVKSH)
    out_PWKMH += own_PWKM1 * of_prompt(_by_query(v_RCKH, q_RKMH.shape[2]))
    out_PWKMH /= weights_PWKMVS.sum(axis=(-2, -1))[..., None] + own_PWKM1
    return _by_alternative(out_PWKMH.reshape(q_RKMH.shape), q_RCNH)


def _next_queries(q_RCNH: Array, k_RCKH: Array) -> tuple[Array, Array]:
    """The scaled queries of every row's alternatives by head of the keys [R, K, M, H], and their scores of themselves
    [R, K, M, 1]; M = C * G."""
    R, C, N, H = q_RCNH.shape
    K = k_RCKH.shape[2]
    q_RKMH = (q_RCNH * (1 / math.sqrt(H))).reshape(R, C, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(R, K, -1, H)
    return q_RKMH, (q_RKMH.astype(jnp.float32) * _by_query(k_RCKH, q_RKMH.shape[2])).sum(axis=-1, keepdims=True)


def _by_query(x_RCKH: Array, num_queries: int) -> Array:
    """Keys or values of the alternatives for each of their queries, [R, K, M, H], float32."""
    return jnp.repeat(x_RCKH.swapaxes(1, 2), num_queries // x_RCKH.shape[1], axis=2).astype(jnp.float32)


def _by_alternative(out_RKMH: Array, q_RCNH: Array) -> Array:
    R, C, N, H = q_RCNH.shape
    out_RKCGH = out_RKMH.reshape(R, out_RKMH.shape[1], C, -1, H)
    return out_RKCGH.transpose(0, 2, 1, 3, 4).reshape(R, C, N, H).astype(q_RCNH.dtype)
