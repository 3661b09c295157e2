"""Weighted next-token cross-entropy as sums, so that any split of a batch adds up to exactly the same loss."""

import typing

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

WITHOUT_TARGET = -1e30  # the logit of a target that is left out of a sum: finite, so that nothing becomes NaN


@typing.no_type_check  # JAX also builds it of shapes, shardings and placeholders
@flax.struct.dataclass
class TokenKinds:
    """What kind of token every target is, to sum by; the sums have no part in the loss and no gradient.

    Attributes:
      ids_BT: from 0 to `number` - 1; -1 at padding.
      number: of kinds.
    """

    ids_BT: Int[Array, "B T"]
    number: int = flax.struct.field(pytree_node=False)

    def sums(self, cross_entropy_BT: Float[Array, "B T"], weight_BT: Float[Array, "B T"]) -> Float[Array, "K 3"]:
        """Weighted cross-entropy, weight and number of the targets of every kind."""
        is_of_KBT = jnp.arange(self.number)[:, None, None] == self.ids_BT
        columns = (cross_entropy_BT, weight_BT, jnp.ones_like(weight_BT))
        summed = [jnp.sum(jnp.where(is_of_KBT, column_BT, 0.0), axis=(1, 2)) for column_BT in columns]
        return jax.lax.stop_gradient(jnp.stack(summed, axis=1))


@typing.no_type_check  # JAX also builds it of shapes, shardings and placeholders
@flax.struct.dataclass
class LossSums:
    """Sums over the targets of a batch or a part of one, on device or host; add two with `+`, then take the mean.

    Attributes:
      cross_entropy: of each target times its weight, in nats.
      z_square: the squared log-partition of each target's logits, times its weight.
      weight: of all targets.
      tokens: how many targets have a weight above 0.
      unlikelihood: -log(1 - p) of each target times its unlikelihood weight, in nats; None in batches without any.
      unlikelihood_weight: of all targets.
      by_kind_KS: of the targets of every kind of token, cross-entropy, weight and number, as the columns; None where
        kinds aren't told apart.
    """

    cross_entropy: Float[Array, ""]
    z_square: Float[Array, ""]
    weight: Float[Array, ""]
    tokens: Float[Array, ""]
    unlikelihood: Float[Array, ""] | None = None
    unlikelihood_weight: Float[Array, ""] | None = None
    by_kind_KS: Float[Array, "K 3"] | None = None

    @classmethod
    def zero(cls, *, has_unlikelihood: bool = False, num_kinds: int = 0) -> "LossSums":
        """The sums over no token; `num_kinds` 0: kinds aren't told apart."""
        scalars = (jnp.zeros((), jnp.float32) for _ in range(6 if has_unlikelihood else 4))
        return cls(*scalars, by_kind_KS=jnp.zeros((num_kinds, 3), jnp.float32) if num_kinds else None)

    def __add__(self, other: "LossSums") -> "LossSums":
        def add(own: Array | None, more: Array | None) -> Array | None:
            return own if more is None else more if own is None else jnp.add(own, more)

        return jax.tree.map(add, self, other, is_leaf=lambda leaf: leaf is None)

    def total(self, z_loss: float | int) -> Float[Array, ""]:
        """The minimised sum over targets: cross-entropy + z_loss * log(Z)^2 + unlikelihood, each times its weight."""
        total = self.cross_entropy + z_loss * self.z_square
        return total if self.unlikelihood is None else total + self.unlikelihood

    def divisor(self) -> Float[Array, ""]:
        """What makes a mean of the total: the weights of both kinds, or 1 when no target counts."""
        return _or_1(self.weight if self.unlikelihood_weight is None else self.weight + self.unlikelihood_weight)

    def mean_cross_entropy(self) -> Float[Array, ""]:
        """Weighted mean in nats per token; 0 when no target counts."""
        return self.cross_entropy / _or_1(self.weight)


def _or_1(weight: jax.typing.ArrayLike) -> Float[Array, ""]:
    return jnp.where(weight > 0, weight, 1.0)


def loss_sums(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    loss_weight_BT: Float[Array, "B T"],
    unlikelihood_BT: Float[Array, "B T"] | None = None,
    kinds: TokenKinds | None = None,
) -> LossSums:
    """Sums the cross-entropy of `targets_BT`, each times its weight, in float32.

    What stands at a position of weight 0 (even NaN-free garbage) has no effect.

    Args:
      unlikelihood_BT: weights of -log(1 - p), p being the target's probability (Welleck et al. 2020).
      kinds: of the targets, to sum by kind too.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_z_BT, target_logit_BT = jax.nn.logsumexp(logits_BTV, axis=-1), _pick(logits_BTV, targets_BT)
    log_rest_BT = None
    if unlikelihood_BT is not None:
        is_target_BTV = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype) == targets_BT[..., None]
        log_rest_BT = jax.nn.logsumexp(jnp.where(is_target_BTV, WITHOUT_TARGET, logits_BTV), axis=-1)
    return loss_sums_of(log_z_BT, target_logit_BT, loss_weight_BT, log_rest_BT, unlikelihood_BT, kinds)


@jax.custom_vjp
def _pick(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The target's logit. Its gradient is a comparison with the ids, which fuses with that of log(Z) into one pass over
    the logits, instead of autodiff's scatter into a second array of their size."""
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


def _pick_forward(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _pick(logits_BTV, targets_BT), (targets_BT, jnp.zeros((0, logits_BTV.shape[-1]), logits_BTV.dtype))


def _pick_backward(saved: tuple[jax.Array, jax.Array], grad_BT: jax.Array) -> tuple[jax.Array, None]:
    targets_BT, like_V = saved
    ids_V = jnp.arange(like_V.shape[-1], dtype=targets_BT.dtype)
    return jnp.where(ids_V == targets_BT[..., None], grad_BT[..., None], jnp.zeros((), like_V.dtype)), None


_pick.defvjp(_pick_forward, _pick_backward)


def loss_sums_of(
    log_z_BT: Float[Array, "B T"],
    target_logit_BT: Float[Array, "B T"],
    loss_weight_BT: Float[Array, "B T"],
    log_rest_BT: Float[Array, "B T"] | None = None,
    unlikelihood_BT: Float[Array, "B T"] | None = None,
    kinds: TokenKinds | None = None,
) -> LossSums:
    """`loss_sums` from what it needs of the logits: their log-partition and the target's, both float32.

    -log(1 - p) is the softplus of the target's logit less the log-partition of all others, `log_rest_BT`: nothing
    cancels, and the gradient by a logit stays within 1, however close p comes to 0 or 1.
    """
    loss_weight_BT = loss_weight_BT.astype(jnp.float32)
    unlikelihood: dict[str, Array] = {}
    if unlikelihood_BT is not None:
        unlikelihood_BT = unlikelihood_BT.astype(jnp.float32)
        unlikelihood = {
            "unlikelihood": jnp.sum(jax.nn.softplus(target_logit_BT - log_rest_BT) * unlikelihood_BT),
            "unlikelihood_weight": jnp.sum(unlikelihood_BT),
        }
    cross_entropy_BT = (log_z_BT - target_logit_BT) * loss_weight_BT
    return LossSums(
        cross_entropy=jnp.sum(cross_entropy_BT),
        z_square=jnp.sum(jnp.square(log_z_BT) * loss_weight_BT),
        weight=jnp.sum(loss_weight_BT),
        tokens=jnp.sum((loss_weight_BT > 0).astype(jnp.float32)),
        **unlikelihood,
        by_kind_KS=None if kinds is None else kinds.sums(cross_entropy_BT, loss_weight_BT),
    )
