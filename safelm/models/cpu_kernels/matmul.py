"""Products of two large matrices in bfloat16 by the C++ kernels: those of training.

Axes: M rows and N columns of the result, K summed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.models.arrays import ArrayLike
from safelm.models.cpu_kernels import building

_INSTRUCTIONS = "avx512_bf16"


def matmul(
    left: Float[ArrayLike, "_ _"],
    right: Float[ArrayLike, "_ _"],
    *,
    transpose_left: bool = False,
    transpose_right: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "M N"]:
    """`left @ right`, either of them transposed first, rounded to bfloat16, and summed in float32.

    Args:
      left: [M, K], or [K, M] with `transpose_left`; float32 or bfloat16, as the others.
      right: [K, N], or [N, K] with `transpose_right`.
      dtype: of the result.
    """
    shape = left.shape[1 if transpose_left else 0], right.shape[0 if transpose_right else 1]
    out = jax.ShapeDtypeStruct(shape, dtype)
    call = jax.ffi.ffi_call(building.target("matmul"), out, vmap_method="sequential")
    return call(left, right, transpose_left=transpose_left, transpose_right=transpose_right)


def matmul_refusal() -> str | None:
    """Why large matrices can't be multiplied by the kernels on this machine, if they can't."""
    if isinstance(vectors := building.find(), str):
        return vectors
    return None if _INSTRUCTIONS in vectors.cpu_flags else f"this CPU has no {_INSTRUCTIONS}"
