"""Matrix products whose gradients are computed in the order that moves the least memory."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.models import product_kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x_BTD: Float[Array, "*B D"],
    kernel_DF: Float[Array, "D F"],
    dtype: jax.typing.DTypeLike | None = None,
    kernels: str = "xla",
) -> Float[Array, "*B F"]:
    """`x_BTD @ kernel_DF`, summed and returned in `dtype` (that of the arguments when not given).

    The kernel's gradient sums over positions, for which XLA's CPU backend first transposes the product's left side in
    memory. Autodiff always puts the gradient of the output there, [tokens, F]; here it is the smaller of the two.
    Where a compiler chooses layouts by itself (TPU, GPU) the order makes no difference.

    `kernels`: what multiplies, a `ModelConfig.products`.
    """
    return _product("df", x_BTD, kernel_DF, dtype, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project_by_rows(
    x_BTD: Float[Array, "*B D"],
    kernel_FD: Float[Array, "F D"],
    dtype: jax.typing.DTypeLike | None = None,
    kernels: str = "xla",
) -> Float[Array, "*B F"]:
    """`project` by `kernel_FD.T`, which the C++ kernels read where it stands."""
    return _product("fd", x_BTD, kernel_FD, dtype, kernels)


def _product(
    axes: str, x_BTD: jax.Array, kernel: jax.Array, dtype: jax.typing.DTypeLike | None, kernels: str
) -> jax.Array:
    if kernels != "native":
        return jnp.einsum(f"...d,{axes}->...f", x_BTD, kernel, preferred_element_type=dtype)
    out_PF = product_kernels.einsum(f"pd,{axes}->pf", _flat(x_BTD), kernel, dtype, kernels)
    return out_PF.reshape(*x_BTD.shape[:-1], out_PF.shape[-1])


def _forward(
    axes: str, x_BTD: jax.Array, kernel: jax.Array, dtype: jax.typing.DTypeLike | None, kernels: str
) -> tuple[jax.Array, tuple]:
    # Not by `project`, which would hide the product from the remat policy "dots": it would be computed again.
    return _product(axes, x_BTD, kernel, dtype, kernels), (x_BTD, kernel)


def _backward(
    axes: str,
    dtype: jax.typing.DTypeLike | None,
    kernels: str,
    saved: tuple[jax.Array, jax.Array],
    grad_BTF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x_BTD, kernel = saved
    if kernels == "native":
        x_PD, grad_PF = _flat(x_BTD), _flat(grad_BTF)
        x_grad_BTD = product_kernels.einsum(f"pf,{axes}->pd", grad_PF, kernel, dtype, kernels).reshape(x_BTD.shape)
        kernel_grad = product_kernels.einsum(f"pd,pf->{axes}", x_PD, grad_PF, dtype, kernels)
        return x_grad_BTD.astype(x_BTD.dtype), kernel_grad.astype(kernel.dtype)
    product = functools.partial(jax.lax.dot_general, preferred_element_type=dtype)
    positions = tuple(range(x_BTD.ndim - 1))
    x_grad_BTD = product(grad_BTF, kernel, (((grad_BTF.ndim - 1,), (axes.index("f"),)), ((), ())))
    is_turned = (x_BTD.shape[-1] > grad_BTF.shape[-1]) != (axes == "fd")
    if x_BTD.shape[-1] <= grad_BTF.shape[-1]:
        kernel_grad = product(x_BTD, grad_BTF, ((positions, positions), ((), ())))
    else:
        kernel_grad = product(grad_BTF, x_BTD, ((positions, positions), ((), ())))
    kernel_grad = kernel_grad.T if is_turned else kernel_grad
    return x_grad_BTD.astype(x_BTD.dtype), kernel_grad.astype(kernel.dtype)


def _flat(x_BTD: jax.Array) -> jax.Array:
    return x_BTD.reshape(-1, x_BTD.shape[-1])


project.defvjp(functools.partial(_forward, "df"), functools.partial(_backward, "df"))
project_by_rows.defvjp(functools.partial(_forward, "fd"), functools.partial(_backward, "fd"))


def to_heads(
    x_BTD: Float[Array, "B T D"], kernel_DNH: Float[Array, "D N H"], *, is_flat: bool, kernels: str = "xla"
) -> Float[Array, "B T N H"]:
    """`x_BTD` times a kernel of heads.

    With `is_flat` heads and their width are one axis in the product: with 64 of its 128 lanes in use a TPU's matrix
    unit takes twice as long, and as much memory again holds padding. `kernels` as in `project`.
    """
    kernel_DF = kernel_DNH.reshape(kernel_DNH.shape[0], -1)
    if kernels == "native":
        flat_BTF = project(x_BTD, kernel_DF, None, kernels)
    elif is_flat:
        flat_BTF = jnp.einsum("btd,df->btf", x_BTD, kernel_DF)
    else:
        return jnp.einsum("btd,dnh->btnh", x_BTD, kernel_DNH)
    return flat_BTF.reshape(*flat_BTF.shape[:2], *kernel_DNH.shape[1:])


def from_heads(
    out_BTNH: Float[Array, "B T N H"], kernel_NHD: Float[Array, "N H D"], *, is_flat: bool, kernels: str = "xla"
) -> Float[Array, "B T D"]:
    """Heads times a kernel back to the stream; `is_flat` and `kernels` as in `to_heads`."""
    flat_BTF, kernel_FD = out_BTNH.reshape(*out_BTNH.shape[:2], -1), kernel_NHD.reshape(-1, kernel_NHD.shape[-1])
    if kernels == "native":
        return project(flat_BTF, kernel_FD, None, kernels)
    if not is_flat:
        return jnp.einsum("btnh,nhd->btd", out_BTNH, kernel_NHD)
    return jnp.einsum("btf,fd->btd", flat_BTF, kernel_FD)
