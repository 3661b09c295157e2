"""The logarithm of a sum of exponentials along rows of logits."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from safelm.models.arrays import ArrayLike
from safelm.models.cpu_kernels import building


def log_sum_exp(logits: Float32[ArrayLike, "*A V"]) -> Float[Array, "*A"]:
    """log sum exp of each row; no number where one of the row is none."""
    *rows, width = logits.shape
    call = jax.ffi.ffi_call(building.target("log_sum_exp"), jax.ShapeDtypeStruct((math.prod(rows),), jnp.float32))
    return call(jnp.reshape(logits, (math.prod(rows), width))).reshape(rows)
