"""Pools token vectors to one vector per row, ignoring padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

POOLINGS = ("mean", "cls", "max", "last", "mean_last")
WIDTHS = {"mean_last": 2}  # vectors that a pooling joins, where more than one


def pool(kind: str, x_BTD: Float[Array, "B T D"], lengths_B: Int[Array, " B"]) -> Float[Array, "B E"]:
    """The mean, first, elementwise maximum or last of each row's first `lengths_B` vectors, in float32.

    "mean_last" concatenates the mean and the last vector, 2 D long.
    """
    if kind == "mean_last":
        return jnp.concatenate([pool("mean", x_BTD, lengths_B), pool("last", x_BTD, lengths_B)], axis=-1)
    if kind == "cls":
        return x_BTD[:, 0].astype(jnp.float32)
    if kind == "last":
        return jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    is_real_BT1 = (jnp.arange(x_BTD.shape[1]) < lengths_B[:, None])[..., None]
    x = x_BTD.astype(jnp.float32)
    if kind == "max":
        return jnp.where(is_real_BT1, x, -jnp.inf).max(axis=1)
    return jnp.where(is_real_BT1, x, 0).sum(axis=1) / lengths_B[:, None].astype(jnp.float32)


def normalize(x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Scales rows to length 1; a row of zeros stays zero."""
    return x_BD * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_BD), axis=-1, keepdims=True), 1e-24))
