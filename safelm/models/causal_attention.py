"""Attention for training where no fused kernel runs: blocks of queries, each over the keys up to its end only.

The backward pass is written by hand, so that every product over the scores takes and gives them in the order in which
they lie in memory: a product's backward by autodiff transposes them, which on a CPU costs more than the product.

Axes: see `safelm.models.decoder`; Q queries of a block, E keys up to its end, R = G * Q queries of a kv head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from safelm.models.arrays import ArrayLike
from safelm.models.attention import MASKED_SCORE

Saved = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_causally(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask_BTT: Bool[ArrayLike, "b T T"],
    blocks: int,
) -> Float[Array, "B T N H"]:
    """`attention.attend` for a mask that is causal and may hide more, such as other documents; has a gradient.

    Args:
      mask_BTT: True where a query may attend to a key. Keys behind the query's block are not seen whatever it says.
      blocks: of queries; a divisor of T, see `config.query_blocks`.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, mask_BTT, blocks)[0]


def _forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTT: jax.Array, blocks: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, list[Saved]]]:
    B, T, N, H = q_BTNH.shape
    K, Q = k_BTKH.shape[2], T // blocks
    q_BKGTH = (q_BTNH * (1 / math.sqrt(H))).swapaxes(1, 2).reshape(B, K, N // K, T, H)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    outs_BKGQH, saved = [], []
    for begin in range(0, T, Q):
        end = begin + Q
        q_BKRH = q_BKGTH[:, :, :, begin:end].reshape(B, K, -1, H)
        out_BKRH, *rest = _block(q_BKRH, k_BKTH[:, :, :end], v_BKTH[:, :, :end], mask_BTT[:, begin:end, :end])
        outs_BKGQH.append(out_BKRH.reshape(B, K, -1, Q, H))
        saved.append((q_BKRH, out_BKRH, *rest))
    out_BKGTH = jnp.concatenate(outs_BKGQH, axis=3).astype(q_BTNH.dtype)
    return out_BKGTH.reshape(B, N, T, H).swapaxes(1, 2), (k_BKTH, v_BKTH, saved)


def _block(q_BKRH: jax.Array, k_BKEH: jax.Array, v_BKEH: jax.Array, mask_BQE: jax.Array) -> Saved:
    """The block's output in float32, its weights before they are divided, and the sums that divide them."""
    scores_BKRE = _product("bkrh,bkeh->bkre", q_BKRH, k_BKEH)
    B, K, R, E = scores_BKRE.shape
    scores_BKGQE = scores_BKRE.reshape(B, K, -1, mask_BQE.shape[1], E)
    scores_BKRE = jnp.where(mask_BQE[:, None, None], scores_BKGQE, MASKED_SCORE).reshape(B, K, R, E)
    weights_BKRE = jnp.exp(scores_BKRE - scores_BKRE.max(axis=-1, keepdims=True))
    sums_BKR1 = weights_BKRE.sum(axis=-1, keepdims=True)
    weights_BKRE = weights_BKRE.astype(v_BKEH.dtype)
    return _product("bkre,bkeh->bkrh", weights_BKRE, v_BKEH) / sums_BKR1, weights_BKRE, sums_BKR1


def _backward(
    blocks: int, residuals: tuple[jax.Array, jax.Array, list[Saved]], grad_BTNH: jax.Array
) -> tuple[jax.Array | None, ...]:
    k_BKTH, v_BKTH, saved = residuals
    B, T, N, H = grad_BTNH.shape
    K, Q = k_BKTH.shape[1], T // blocks
    grad_BKGTH = grad_BTNH.swapaxes(1, 2).reshape(B, K, N // K, T, H)
    q_grads_BKGQH, kv_grads_BKHT = [], (0.0, 0.0)
    for number, of_block in enumerate(saved):
        end = (number + 1) * Q
        grad_BKRH = grad_BKGTH[:, :, :, end - Q : end].reshape(B, K, -1, H)
        q_grad_BKRH, *new = _block_gradients(k_BKTH[:, :, :end], v_BKTH[:, :, :end], of_block, grad_BKRH)
        q_grads_BKGQH.append(q_grad_BKRH.reshape(B, K, -1, Q, H))
        behind = ((0, 0), (0, 0), (0, 0), (0, T - end))
        kv_grads_BKHT = tuple(total + jnp.pad(grad, behind) for total, grad in zip(kv_grads_BKHT, new, strict=True))
    q_grad_BNTH = jnp.concatenate(q_grads_BKGQH, axis=3).reshape(B, N, T, H) * (1 / math.sqrt(H))
    kv_grads_BTKH = (grad.transpose(0, 3, 1, 2).astype(k_BKTH.dtype) for grad in kv_grads_BKHT)
    return q_grad_BNTH.swapaxes(1, 2).astype(grad_BTNH.dtype), *kv_grads_BTKH, None


def _block_gradients(
    k_BKEH: jax.Array, v_BKEH: jax.Array, saved: Saved, grad_BKRH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Float32 gradients by the block's queries, and by keys and values [B, K, H, E]."""
    q_BKRH, out_BKRH, weights_BKRE, sums_BKR1 = saved
    grad_BKRH = grad_BKRH.astype(jnp.float32) / sums_BKR1
    along_BKR1 = (grad_BKRH * out_BKRH).sum(axis=-1, keepdims=True)
    grad_BKRH = grad_BKRH.astype(v_BKEH.dtype)
    score_grad_BKRE = weights_BKRE * (_product("bkrh,bkeh->bkre", grad_BKRH, v_BKEH) - along_BKR1)
    score_grad_BKRE = score_grad_BKRE.astype(q_BKRH.dtype)
    return (
        _product("bkre,bkeh->bkrh", score_grad_BKRE, k_BKEH),
        _product("bkrh,bkre->bkhe", q_BKRH, score_grad_BKRE),
        _product("bkrh,bkre->bkhe", grad_BKRH, weights_BKRE),
    )


def _product(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


attend_causally.defvjp(_forward, _backward)
