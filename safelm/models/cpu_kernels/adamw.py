"""AdamW in one pass over memory by the C++ kernels, and the norm before it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from safelm.models.cpu_kernels import building

Arrays = Sequence[Float[Array, "..."]]


def squared_norm(arrays: Arrays) -> Float[Array, ""]:
    """The sum of the squares of all numbers, float32, added up in float64 in an order that never changes."""
    return jax.ffi.ffi_call(building.target("squared_norm"), jax.ShapeDtypeStruct((), jnp.float32))(*arrays)


def adamw(
    params: Arrays,
    first_moments: Arrays,
    second_moments: Arrays,
    gradients: Arrays,
    *,
    scale: Float[Array, ""],
    learning_rate: Float[Array, ""],
    corrections: tuple[Float[Array, ""], Float[Array, ""]],
    is_applied: Bool[Array, ""],
    b1: float,
    b2: float,
    eps: float,
    decays: Sequence[float],
) -> tuple[list[Array], list[Array], list[Array]]:
    """New parameters and moments (Loshchilov and Hutter 2019), in place where the old ones are given up.

    All in float32.

    Args:
      scale: what gradients are multiplied by.
      corrections: of the moments, 1 - b1^t and 1 - b2^t at the t-th update.
      is_applied: False leaves everything as it was, whatever the other numbers are.
      decays: of each parameter, times the learning rate.
    """
    old, count = [*params, *first_moments, *second_moments], len(params)
    numbers = jnp.stack([jnp.asarray(each, jnp.float32) for each in (scale, learning_rate, *corrections, is_applied)])
    call = jax.ffi.ffi_call(
        building.target("adamw"),
        [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in old],
        input_output_aliases={1 + place: place for place in range(3 * count)},
    )
    settings = {name: np.float32(value) for name, value in (("b1", b1), ("b2", b2), ("eps", eps))}
    new = call(numbers, *old, *gradients, **settings, decays=np.asarray(decays, np.float32))
    return tuple(list(new[part * count : (part + 1) * count]) for part in range(3))
