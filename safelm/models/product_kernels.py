"""Chooses what multiplies large matrices in training: XLA, or on CPUs with bfloat16 instructions our C++ kernels.

XLA's CPU backend multiplies bfloat16 at the speed of float32, whatever the CPU has for it.
"""

import dataclasses
import math

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from safelm.models import cpu_kernels
from safelm.models.arrays import Params
from safelm.models.config import ModelConfig
from safelm.models.remat import PRODUCT_OUTPUT


@dataclasses.dataclass(frozen=True)
class Choice:
    """What multiplies, "xla" or "native" (the C++ kernels), and the reason in words."""

    kernel: str
    reason: str


def choose(config: ModelConfig, mesh: Mesh) -> Choice:
    """Settles `config.products` for the devices of `mesh`: "auto" is native where that can run, else xla.

    Raises ValueError if it is "native" and that can't run, saying why.
    """
    return _choose(config, mesh.devices.flat[0].platform, mesh.size)


def settled(config: ModelConfig, params: Params) -> ModelConfig:
    """The config with `products` settled for the devices that the parameters are on; errors as of `choose`."""
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    devices = {device for array in arrays for device in array.devices()} or {jax.devices()[0]}
    choice = _choose(config, next(iter(devices)).platform, len(devices))
    return dataclasses.replace(config, products=choice.kernel)


def _choose(config: ModelConfig, platform: str, num_devices: int) -> Choice:
    if config.products == "xla":
        return Choice("xla", "model.products is xla")
    refusal = _refuse_native(config, platform, num_devices)
    if config.products == "auto":
        return Choice("xla", f"auto: not native, {refusal}") if refusal else Choice("native", "auto: a CPU in bfloat16")
    if refusal:
        raise ValueError(f"model.products={config.products!r} can't run: {refusal}")
    return Choice("native", "model.products is native")


def _refuse_native(config: ModelConfig, platform: str, num_devices: int) -> str | None:
    if platform != "cpu":
        return f"it is for CPUs, these are {platform} devices"
    if num_devices > 1:
        return "XLA doesn't split its products over a mesh"
    if config.dtype != "bfloat16":
        return f"it multiplies in bfloat16, model.dtype is {config.dtype}"
    return cpu_kernels.matmul_refusal()


def einsum(
    equation: str,
    left: Float[Array, "..."],
    right: Float[Array, "..."],
    dtype: jax.typing.DTypeLike | None = None,
    kernel: str = "xla",
) -> Float[Array, "..."]:
    """`jnp.einsum` of two arrays, summed and returned in `dtype` (that of the arguments when not given).

    Args:
      kernel: a `ModelConfig.products`; "native" takes what is one product of two matrices, with each one's summed axes
        side by side, and sums in float32 whatever `dtype` is.

    Raises ValueError for an equation that "native" doesn't take.
    """
    if kernel != "native":
        return jnp.einsum(equation, left, right, preferred_element_type=dtype)
    operands, of_out = equation.split("->")
    of_left, of_right = operands.split(",")
    summed = "".join(axis for axis in of_left if axis in of_right)
    rows, columns = ("".join(axis for axis in axes if axis not in summed) for axes in (of_left, of_right))
    if of_out == columns + rows and rows:
        return einsum(f"{of_right},{of_left}->{of_out}", right, left, dtype, kernel)
    is_left_matrix = of_left in (rows + summed, summed + rows)
    is_right_matrix = of_right in (summed + columns, columns + summed)
    if of_out != rows + columns or not is_left_matrix or not is_right_matrix:
        raise ValueError(f"{equation!r} is not a product of two matrices")
    sizes = dict(zip(of_left + of_right, left.shape + right.shape, strict=True))
    num_summed = math.prod(sizes[axis] for axis in summed)
    transpose_left, transpose_right = of_left != rows + summed, of_right != summed + columns
    out = cpu_kernels.matmul(
        left.reshape((num_summed, -1) if transpose_left else (-1, num_summed)),
        right.reshape((-1, num_summed) if transpose_right else (num_summed, -1)),
        transpose_left=transpose_left,
        transpose_right=transpose_right,
        dtype=dtype or jnp.result_type(left, right),
    )
    out = jax.ad_checkpoint.checkpoint_name(out, PRODUCT_OUTPUT)
    return out.reshape([sizes[axis] for axis in rows + columns])
