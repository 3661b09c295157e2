"""Matrix products by the C++ kernels, and the weights in the order they read them.

Axes: R rows, K inputs, N outputs; outputs stand in blocks of 32, filled up with zeros.
"""

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.models.arrays import ArrayLike, Leaf
from safelm.models.cpu_kernels import building

BLOCK = 32  # outputs
_GROUPS = {"int8": 4, "bfloat16": 2, "float32": 1}  # inputs that one instruction multiplies
MOST_INPUTS = 2**31 // (255 * 127) - _GROUPS["int8"]  # whose products are added up in int32


@flax.struct.dataclass
class PackedKernel:
    """A matrix as the kernels read it, from first to last."""

    values: Leaf  # float32 [N/32, K, 32], bfloat16 [N/32, K/2, 32, 2], or int8 [N/32, K/4, 32, 4]
    scales: Leaf | None  # of int8: one per output, float32
    sums: Leaf | None  # of int8: of each output's values, int32
    num_inputs: int = flax.struct.field(pytree_node=False)
    num_outputs: int = flax.struct.field(pytree_node=False)
    num_terms: int = flax.struct.field(pytree_node=False, default=1)  # of int8: what inputs are split into


def pack(
    values_KN: Float[ArrayLike, "K N"] | Int[ArrayLike, "K N"],
    scales_N: Float[ArrayLike, " N"] | None,
    *,
    num_terms: int = 1,
) -> PackedKernel:
    """A float32 or bfloat16 matrix without scales, or an int8 one with them (values from -127 to 127)."""
    num_inputs, num_outputs = values_KN.shape
    group = _GROUPS[values_KN.dtype.name]
    padded = np.pad(np.asarray(values_KN), ((0, -num_inputs % group), (0, -num_outputs % BLOCK)))
    blocks = padded.reshape(-1, group, padded.shape[1] // BLOCK, BLOCK).transpose(2, 0, 3, 1)
    if scales_N is None:
        blocks = blocks[..., 0] if group == 1 else blocks
        return PackedKernel(jnp.asarray(np.ascontiguousarray(blocks)), None, None, *values_KN.shape)
    scales = np.pad(np.asarray(scales_N, np.float32), (0, -num_outputs % BLOCK))
    sums = padded.sum(axis=0, dtype=np.int32)
    arrays = (jnp.asarray(array) for array in (np.ascontiguousarray(blocks), scales, sums))
    return PackedKernel(*arrays, *values_KN.shape, num_terms)


def multiply(x_RK: Float[ArrayLike, "R K"], kernels: Sequence[PackedKernel]) -> list[Float[Array, "R _"]]:
    """`x_RK @ kernel` in float32 for kernels of one kind and width, by one call.

    int8: each row of `x_RK` is rounded to int8 with its own scale, as `weights.rounded_to_int8` does it (with two terms
    the rest too, 254 times as fine); the sums of products are exact. bfloat16: inputs are rounded to it, sums are in
    float32.
    """
    operands: list[Leaf] = []
    for kernel in kernels:
        operands += [kernel.values] if kernel.scales is None else [kernel.values, kernel.scales, kernel.sums]
    outputs = [jax.ShapeDtypeStruct((x_RK.shape[0], kernel.num_outputs), jnp.float32) for kernel in kernels]
    is_int8 = kernels[0].scales is not None
    call = jax.ffi.ffi_call(building.target(f"{kernels[0].values.dtype.name}_products"), outputs)
    settings = {"num_terms": np.int64(kernels[0].num_terms)} if is_int8 else {}
    return list(call(jnp.asarray(x_RK, jnp.float32), *operands, **settings))


def take_outputs(kernel: PackedKernel, outputs: Int[Array, "*A"]) -> Float[Array, "*A K"]:
    """The columns of the matrix that belong to some outputs, in float32: an embedding's rows."""
    blocks, places = jnp.divmod(outputs, BLOCK)
    columns = kernel.values[blocks, :, places]  # [*A, K], [*A, K/2, 2] or [*A, K/4, 4]
    columns = columns.reshape(*outputs.shape, -1)[..., : kernel.num_inputs].astype(jnp.float32)
    return columns if kernel.scales is None else columns * kernel.scales[outputs][..., None]
