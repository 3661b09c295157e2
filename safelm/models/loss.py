"""Next-token cross-entropy as sums over tokens, so that any split of a batch adds up to exactly the same loss."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class LossSums:
    """Sums over the tokens of a batch or a part of one, on device or host; add two with `+`, then take the mean."""

    cross_entropy: Any  # float32 scalar, nats
    z_square: Any  # float32 scalar, squares of the logits' log-partition
    tokens: Any  # float32 scalar, targets counted: the sum of the mask

    @classmethod
    def zero(cls) -> "LossSums":
        """The sums over no token."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    def __add__(self, other: "LossSums") -> "LossSums":
        return jax.tree.map(jnp.add, self, other)

    def total(self, z_loss: float | int) -> Any:
        """The minimised sum over tokens: cross-entropy + z_loss * log(Z)^2."""
        return self.cross_entropy + z_loss * self.z_square

    def mean_cross_entropy(self) -> Any:
        """Nats per token; 0 when no token counts."""
        return self.cross_entropy / jnp.maximum(self.tokens, 1.0)


def loss_sums(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], loss_mask_BT: Float[Array, "B T"]
) -> LossSums:
    """Sums the cross-entropy of `targets_BT` over the positions whose mask is 1, in float32.

    A mask weights its position; what stands at a position of mask 0 (even NaN-free garbage) has no effect.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    return loss_sums_of(jax.nn.logsumexp(logits_BTV, axis=-1), _pick(logits_BTV, targets_BT), loss_mask_BT)


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
    log_z_BT: Float[Array, "B T"], target_logit_BT: Float[Array, "B T"], loss_mask_BT: Float[Array, "B T"]
) -> LossSums:
    """`loss_sums` from what it needs of the logits: their log-partition and the target's, both float32."""
    loss_mask_BT = loss_mask_BT.astype(jnp.float32)
    return LossSums(
        cross_entropy=jnp.sum((log_z_BT - target_logit_BT) * loss_mask_BT),
        z_square=jnp.sum(jnp.square(log_z_BT) * loss_mask_BT),
        tokens=jnp.sum(loss_mask_BT),
    )
