"""The loss from hidden states where the unembedding is small: a block of tokens at a time, gradients on the way.

A block's logits stay in a CPU's cache from the matrix product to the gradient, and nothing is computed twice. With a
large kernel, its gradient, read and written for every block, would cost more than that saves; over a mesh it would be
summed over the devices for every block. Axes: see `safelm.models.decoder`; N tokens in a block, M blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from safelm.models import decoder as model
from safelm.models import product_kernels
from safelm.models.loss import WITHOUT_TARGET, LossSums, TokenKinds, loss_sums_of

BLOCK_BYTES = 8 * 2**20  # of a block's float32 logits
KERNEL_BYTES = 4 * 2**20  # of the float32 kernel up to which blocks are the faster way
MIN_BLOCK_TOKENS = 64  # fewer make poor matrix products


def num_blocks(tokens: int, padded_vocab_size: int, d_model: int) -> int:
    """How many blocks to cut a batch's tokens into; 1 where blocks are no gain (or under a mesh of several devices)."""
    mesh = jax.sharding.get_abstract_mesh()
    if 4 * padded_vocab_size * d_model > KERNEL_BYTES or not (mesh.empty or mesh.size == 1):
        return 1
    wanted = -(-4 * tokens * padded_vocab_size // BLOCK_BYTES)
    most = max(tokens // MIN_BLOCK_TOKENS, 1)
    return next((number for number in range(wanted, most + 1) if tokens % number == 0), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def total_loss(
    blocks: int,
    num_real: int,
    z_loss: float | int,
    kernels: str,
    x_BTD: jax.Array,
    kernel_VD: jax.Array,
    targets_BT: jax.Array,
    loss_weight_BT: jax.Array,
    unlikelihood_BT: jax.Array | None = None,
    kinds: TokenKinds | None = None,
) -> tuple[jax.Array, LossSums]:
    """`LossSums.total` and the sums it is made of, of `num_real` ids; only the total has a gradient.

    `kernels`: what multiplies, a `ModelConfig.products`.
    """
    weights = (loss_weight_BT, unlikelihood_BT, kinds)
    sums, _, _ = _over_blocks(blocks, num_real, None, kernels, x_BTD, kernel_VD, targets_BT, *weights)
    return sums.total(z_loss), sums


def _forward(
    blocks: int, num_real: int, z_loss: float | int, kernels: str, x_BTD: jax.Array, *others: Any
) -> tuple[tuple[jax.Array, LossSums], tuple[jax.Array, jax.Array]]:
    sums, x_grad_BTD, kernel_grad_VD = _over_blocks(blocks, num_real, z_loss, kernels, x_BTD, *others)
    return (sums.total(z_loss), sums), (x_grad_BTD, kernel_grad_VD)


def _backward(
    blocks: int,
    num_real: int,
    z_loss: float | int,
    kernels: str,
    gradients: tuple[jax.Array, jax.Array],
    out_grads: tuple[jax.Array, LossSums],
) -> tuple[jax.Array | None, ...]:
    return *((grad * out_grads[0]).astype(grad.dtype) for grad in gradients), None, None, None, None


total_loss.defvjp(_forward, _backward)


def _over_blocks(
    blocks: int,
    num_real: int,
    z_loss: float | int | None,
    kernels: str,
    x_BTD: jax.Array,
    kernel_VD: jax.Array,
    targets_BT: jax.Array,
    loss_weight_BT: jax.Array,
    unlikelihood_BT: jax.Array | None,
    kinds: TokenKinds | None,
) -> tuple[LossSums, jax.Array | None, jax.Array | None]:
    """The sums, and the gradients of their total by hidden states and kernel (None where `z_loss` is None)."""
    ids_V = jnp.arange(kernel_VD.shape[0], dtype=targets_BT.dtype)
    cast_VD = kernel_VD.astype(x_BTD.dtype)
    summed = functools.partial(product_kernels.einsum, dtype=jnp.float32, kernel=kernels)

    def add_block(total: Any, block: tuple[Any, ...]) -> tuple[Any, jax.Array | None]:
        (sums, kernel_grad_DV), (x_ND, targets_N, weights_N, unlikely_N, kinds_N) = total, block
        logits_NV = jnp.where(ids_V < num_real, summed("nd,vd->nv", x_ND, cast_VD), model.MASKED_LOGIT)
        max_N = logits_NV.max(axis=-1)
        shares_NV = jnp.exp(logits_NV - max_N[:, None])
        sum_N = shares_NV.sum(axis=-1)
        log_z_N = max_N + jnp.log(sum_N)
        target_logit_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
        is_target_NV = (ids_V == targets_N[:, None]) & (ids_V < num_real)
        log_rest_N = None
        if unlikely_N is not None:
            rest_NV = jnp.where(is_target_NV, WITHOUT_TARGET, logits_NV)
            log_rest_N = jax.nn.logsumexp(rest_NV, axis=-1)
        rows = (log_z_N, target_logit_N, weights_N, log_rest_N, unlikely_N, kinds_N)
        sums += loss_sums_of(*jax.tree.map(lambda row: row[None], rows))
        if z_loss is None:
            return (sums, kernel_grad_DV), None
        share_grad_N = weights_N * (1 + 2 * z_loss * log_z_N) / sum_N
        grad_NV = shares_NV * share_grad_N[:, None] - jnp.where(is_target_NV, weights_N[:, None], 0.0)
        if unlikely_N is not None:
            others_NV = jnp.exp(rest_NV - log_rest_N[:, None])
            share_N = unlikely_N * jnp.exp(target_logit_N - log_z_N)
            grad_NV += share_N[:, None] * (is_target_NV - others_NV)
        grad_NV = grad_NV.astype(x_ND.dtype)
        kernel_grad_DV += summed("nd,nv->dv", x_ND, grad_NV)  # XLA's CPU backend transposes the left side in memory
        return (sums, kernel_grad_DV), summed("nv,vd->nd", grad_NV, cast_VD).astype(x_ND.dtype)

    def cut(array: jax.Array) -> jax.Array:
        return array.reshape(blocks, targets_BT.size // blocks, *array.shape[2:])

    num_kinds = 0 if kinds is None else kinds.number
    empty = LossSums.zero(has_unlikelihood=unlikelihood_BT is not None, num_kinds=num_kinds)
    start = (empty, None if z_loss is None else jnp.zeros(kernel_VD.shape[::-1], jnp.float32))
    weights_BT, unlikely_BT = jax.tree.map(lambda w: w.astype(jnp.float32), (loss_weight_BT, unlikelihood_BT))
    parts = jax.tree.map(cut, (x_BTD, targets_BT, weights_BT, unlikely_BT, kinds))
    (sums, kernel_grad_DV), x_grad_MND = jax.lax.scan(add_block, start, parts)
    if z_loss is None:
        return sums, None, None
    return sums, x_grad_MND.reshape(x_BTD.shape), kernel_grad_DV.T.astype(kernel_VD.dtype)
