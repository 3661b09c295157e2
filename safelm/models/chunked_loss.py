"""The loss from hidden states, with the logits of a part of the vocabulary at a time, in forward and backward.

Only log(Z) of every position is kept for the backward pass, which computes each part's logits again: a third more
work on the unembedding, no [tokens, vocabulary] array. Parts are cut from the vocabulary and not from the tokens, so
that on a mesh every part of the kernel's gradient is summed over devices once, and the hidden states' stays local.

Axes: see `safelm.models.decoder`; C parts of the vocabulary, S its shards over the mesh, U ids in a part of a shard.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.models import decoder as model
from safelm.models import product_kernels, sharding
from safelm.models.blocked_loss import num_blocks, total_loss
from safelm.models.decoder import ModelConfig, Params
from safelm.models.loss import WITHOUT_TARGET, LossSums, TokenKinds, loss_sums, loss_sums_of

WHOLE_LOGITS_BYTES = 256 * 2**20  # of a device's float32 logits, up to which they are cheaper whole


def num_chunks(asked: int, tokens: int, padded_vocab_size: int) -> int:
    """How many parts a device's share of the vocabulary is computed in (under `jax.set_mesh`, if there is a mesh).

    Args:
      asked: `loss.vocab_chunks`: this many, or the next number that divides the share; 0 = as many as keep a part's
        float32 logits within `WHOLE_LOGITS_BYTES`, so 1 where all of them fit.
      tokens: of a batch, over all devices.

    Raises ValueError if more are asked for than the share has ids.
    """
    share = padded_vocab_size // sharding.num_shards("vocab")
    logits_bytes = 4 * (tokens // sharding.num_shards("batch")) * share
    wanted = asked or -(-logits_bytes // WHOLE_LOGITS_BYTES)
    if wanted > share:
        raise ValueError(f"loss.vocab_chunks is {asked}: a device holds {share} ids of the vocabulary")
    return next(number for number in range(max(wanted, 1), share + 1) if share % number == 0)


def next_token_loss(
    config: ModelConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    loss_weight_BT: Float[Array, "B T"],
    unlikelihood_BT: Float[Array, "B T"] | None = None,
    *,
    kinds: TokenKinds | None = None,
    z_loss: float | int = 0.0,
    vocab_chunks: int = 0,
) -> tuple[Float[Array, ""], LossSums]:
    """The loss of hidden states (`model.hidden_states`): the total to minimise, and the sums it is made of.

    They are what `loss_sums` gives for the states' logits; only the total has a gradient.

    Args:
      unlikelihood_BT: weights of -log(1 - p) of the targets, see `loss_sums`.
      kinds: of the targets, to sum by kind too.
      z_loss: see `LossSums.total`.
      vocab_chunks: see `num_chunks`; with 1 the logits are computed whole, with 0 a block of tokens at a time where
        that is faster (`blocked_loss.num_blocks`).
    """
    kernel_VD = model.unembedding(config, params)
    if not vocab_chunks and (blocks := num_blocks(targets_BT.size, *kernel_VD.shape)) > 1:
        weights = (loss_weight_BT, unlikelihood_BT, kinds)
        settings = (blocks, config.vocab_size, z_loss, config.products)
        return total_loss(*settings, x_BTD, kernel_VD, targets_BT, *weights)
    chunks = num_chunks(vocab_chunks, targets_BT.size, config.padded_vocab_size)
    if chunks == 1:
        sums = loss_sums(model.unembed(config, params, x_BTD), targets_BT, loss_weight_BT, unlikelihood_BT, kinds)
    else:
        of_parts = functools.partial(_log_z_and_target, chunks, config.vocab_size, config.products)
        if unlikelihood_BT is None:
            log_z_BT, target_logit_BT = of_parts(False, x_BTD, kernel_VD, targets_BT)
            sums = loss_sums_of(log_z_BT, target_logit_BT, loss_weight_BT, kinds=kinds)
        else:
            log_rest_BT, target_logit_BT = of_parts(True, x_BTD, kernel_VD, targets_BT)
            log_z_BT = jnp.logaddexp(log_rest_BT, target_logit_BT)
            sums = loss_sums_of(log_z_BT, target_logit_BT, loss_weight_BT, log_rest_BT, unlikelihood_BT, kinds)
    return sums.total(z_loss), sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _log_z_and_target(
    chunks: int,
    num_real: int,
    kernels: str,
    of_rest: bool,
    x_BTD: jax.Array,
    kernel_VD: jax.Array,
    targets_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The log-partition (with `of_rest` of all but the target) and the target's logit of every position, float32."""

    def add_part(sums: tuple[jax.Array, ...], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        max_BT, sum_BT, target_logit_BT = sums
        ids_SU, logits_BTSU = _logits(num_real, kernels, x_BTD, part)
        is_target = ids_SU == targets_BT[..., None, None]
        summed_BTSU = jnp.where(is_target, WITHOUT_TARGET, logits_BTSU) if of_rest else logits_BTSU
        new_max_BT = jnp.maximum(max_BT, summed_BTSU.max(axis=(-2, -1)))
        sum_BT *= jnp.exp(max_BT - new_max_BT)
        sum_BT += jnp.exp(summed_BTSU - new_max_BT[..., None, None]).sum(axis=(-2, -1))
        target_logit_BT += jnp.where(is_target, logits_BTSU, 0.0).sum(axis=(-2, -1))
        return (new_max_BT, sum_BT, target_logit_BT), None

    zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    (max_BT, sum_BT, target_logit_BT), _ = jax.lax.scan(
        add_part, (zeros_BT - jnp.inf, zeros_BT, zeros_BT), _parts(chunks, kernel_VD, x_BTD.dtype)
    )
    return max_BT + jnp.log(sum_BT), target_logit_BT


def _forward(
    chunks: int,
    num_real: int,
    kernels: str,
    of_rest: bool,
    x_BTD: jax.Array,
    kernel_VD: jax.Array,
    targets_BT: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    out = _log_z_and_target(chunks, num_real, kernels, of_rest, x_BTD, kernel_VD, targets_BT)
    return out, (x_BTD, kernel_VD, targets_BT, out[0])


def _backward(
    chunks: int,
    num_real: int,
    kernels: str,
    of_rest: bool,
    saved: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
    x_BTD, kernel_VD, targets_BT, log_z_BT = saved
    log_z_grad_BT, target_grad_BT = gradients

    def add_part(x_grad_BTD: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ids_SU, logits_BTSU = _logits(num_real, kernels, x_BTD, part)
        is_target = (ids_SU == targets_BT[..., None, None]) & (ids_SU < num_real)
        summed_BTSU = jnp.where(is_target, WITHOUT_TARGET, logits_BTSU) if of_rest else logits_BTSU
        grad_BTSU = jnp.exp(summed_BTSU - log_z_BT[..., None, None]) * log_z_grad_BT[..., None, None]
        grad_BTSU += jnp.where(is_target, target_grad_BT[..., None, None], 0.0)
        grad_BTSU = grad_BTSU.astype(x_BTD.dtype)
        summed = functools.partial(product_kernels.einsum, dtype=jnp.float32, kernel=kernels)
        x_grad_BTD += summed("btsu,sud->btd", grad_BTSU, part[1])
        kernel_grad_SUD = summed("btsu,btd->sud", grad_BTSU, x_BTD)
        return x_grad_BTD, sharding.constrain(kernel_grad_SUD.astype(kernel_VD.dtype), ("vocab", None, "embed"))

    x_grad_BTD, kernel_grad_CSUD = jax.lax.scan(
        add_part, jnp.zeros(x_BTD.shape, jnp.float32), _parts(chunks, kernel_VD, x_BTD.dtype)
    )
    kernel_grad_VD = kernel_grad_CSUD.swapaxes(0, 1).reshape(kernel_VD.shape)
    return x_grad_BTD.astype(x_BTD.dtype), kernel_grad_VD, None


_log_z_and_target.defvjp(_forward, _backward)


def _parts(chunks: int, kernel_VD: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """The ids [C, S, U] and the kernel [C, S, U, D] of every part; a part has its share of every shard.

    The kernel is brought together over the axes that split "embed" here, once, in the dtype of the computation.
    """
    shards = sharding.num_shards("vocab")
    shape = (shards, chunks, kernel_VD.shape[0] // (shards * chunks))
    ids_CSU = jnp.arange(kernel_VD.shape[0], dtype=jnp.int32).reshape(shape).swapaxes(0, 1)
    kernel_VD = sharding.constrain(kernel_VD.astype(dtype), ("vocab", None))
    kernel_CSUD = kernel_VD.reshape(*shape, -1).swapaxes(0, 1)
    return ids_CSU, sharding.constrain(kernel_CSUD, (None, "vocab", None, None))


def _logits(
    num_real: int, kernels: str, x_BTD: jax.Array, part: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A part's ids [S, U] and its float32 logits [B, T, S, U]; those of padded ids are `model.MASKED_LOGIT`."""
    ids_SU, kernel_SUD = part
    logits_BTSU = product_kernels.einsum("btd,sud->btsu", x_BTD, kernel_SUD, jnp.float32, kernels)
    return ids_SU, jnp.where(ids_SU < num_real, logits_BTSU, model.MASKED_LOGIT)
