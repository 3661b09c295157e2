"""Gradient routing: heads and MLP units of every layer that alone learn labelled rows, to be ablated at export.

Gradient routing (Cloud et al. 2024, arXiv 2410.04332) in the form of selective gradient masking (SGTM, Shilov et al.
2025, arXiv 2512.05648). The designated units are the last heads and MLP units of every layer. By its source a row is

    labelled    the whole model computes; only the designated units' parameters get its gradient
    plain       the designated units are silent, as after the ablation, so that only the others get its gradient
    mixed       the whole model computes and learns: of data in which labels are missing

Parameters of a designated head: its query and output, and the key and value of a group whose heads are all designated;
of an MLP unit: its gate, up and down. Everything else (embeddings, norms, ..) belongs to the rest.

A kernel's gradient is masked where it is made: a row's part in it is left out, the gradient that flows on to lower
layers is whole. It costs no further product, except that the logits of labelled rows are computed apart
(`safelm.train.step`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.models.arrays import ArrayLike
from safelm.models.config import ModelConfig
from safelm.models.routing_config import LABELLED, PLAIN


@flax.struct.dataclass
class Routes:
    """What becomes of a batch's rows, as 0 and 1.

    Attributes:
      hears_B: whether the designated units compute, and learn.
      teaches_B: whether the others learn.
    """

    hears_B: Float[Array, " B"]
    teaches_B: Float[Array, " B"]

    @classmethod
    def of_rows(cls, routes_B: Array) -> "Routes":
        """From PLAIN, LABELLED or MIXED of every row."""
        return cls((routes_B != PLAIN).astype(jnp.float32), (routes_B != LABELLED).astype(jnp.float32))

    def by_unit(self, units: int, designated: int) -> Float[Array, "B U"]:
        """For every unit whether it learns from a row."""
        is_designated_U = jnp.arange(units) >= units - designated
        return jnp.where(is_designated_U, self.hears_B[:, None], self.teaches_B[:, None])

    def silence(self, x: Float[Array, "B T U *H"], designated: int) -> Float[Array, "B T U *H"]:
        """The units' activations with those of designated ones at 0 in plain rows."""
        is_other_U = jnp.arange(x.shape[2]) < x.shape[2] - designated
        open_BU = jnp.where(is_other_U, 1.0, self.hears_B[:, None]).astype(x.dtype)
        return x * open_BU.reshape(len(x), 1, x.shape[2], *(1,) * (x.ndim - 3))

    def of_rest(self, parameter: Array, axes: int) -> Array:
        """A parameter of the rest, for each row; the gradient has the parts of rows that teach it alone.

        Args:
          axes: of length 1 between the rows and the parameter's own, for what it is multiplied with or added to.
        """
        shape = (len(self.teaches_B), *(1,) * axes, *parameter.shape)
        teaches = self.teaches_B.reshape(-1, *(1,) * (len(shape) - 1)) > 0
        return jnp.where(teaches, parameter, jax.lax.stop_gradient(parameter))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def routed_product(equation: str, masks_outputs: bool, x: Array, kernel: Array, learns: Array) -> Array:
    """`jnp.einsum(equation, x, kernel)` whose kernel gets the gradient of chosen rows and units only.

    Args:
      masks_outputs: whether `learns` is laid on the product's gradient or on `x`: on that which has the units.
      learns: 0 or 1, broadcast to it.
    """
    return jnp.einsum(equation, x, kernel)


def _forward(equation: str, masks_outputs: bool, x: Array, kernel: Array, learns: Array) -> tuple[Array, Any]:
    return routed_product(equation, masks_outputs, x, kernel, learns), (x, kernel, learns)


def _backward(equation: str, masks_outputs: bool, saved: Any, grad: Array) -> tuple[Array, Array, None]:
    x, kernel, learns = saved
    operands, out = equation.split("->")
    into, weights = operands.split(",")
    x_grad = jnp.einsum(f"{out},{weights}->{into}", grad, kernel).astype(x.dtype)
    learns = learns.astype(grad.dtype)
    masked = (x, grad * learns) if masks_outputs else (x * learns, grad)
    kernel_grad = jnp.einsum(f"{into},{out}->{weights}", *masked).astype(kernel.dtype)
    return x_grad, kernel_grad, None


routed_product.defvjp(_forward, _backward)


def designated_kv_heads(config: ModelConfig) -> int:
    """The key and value heads whose queries are all designated."""
    return config.routed.heads // (config.num_heads // config.num_kv_heads)


def products(config: ModelConfig, routes: Routes, attention: Mapping[str, Array], mlp: Mapping[str, Array]) -> Any:
    """A block's products by name, as `safelm.models.decoder.Block` has them, with routed gradients."""
    routed, kv = config.routed, designated_kv_heads(config)
    counts = {"query": (config.num_heads, routed.heads), "key": (config.num_kv_heads, kv)}
    counts["value"] = counts["key"]
    learns = {name: routes.by_unit(*of)[:, None, :, None] for name, of in counts.items()}
    of_heads = routes.by_unit(config.num_heads, routed.heads)[:, None, :, None]
    of_units = routes.by_unit(config.d_ff, routed.mlp_units)[:, None]

    def heads(name: str, x_BTD: Array) -> Array:
        out_BTNH = routed_product("btd,dnh->btnh", True, x_BTD, attention[name], learns[name])
        bias = attention.get(f"{name}_bias")
        if bias is None:
            return out_BTNH
        return out_BTNH + jnp.where(learns[name] > 0, bias, jax.lax.stop_gradient(bias))

    def output(x_BTNH: Array) -> Array:
        x_BTNH = routes.silence(x_BTNH, routed.heads)
        return routed_product("btnh,nhd->btd", False, x_BTNH, attention["output"], of_heads)

    def down(x_BTF: Array) -> Array:
        return routed_product("btf,fd->btd", False, routes.silence(x_BTF, routed.mlp_units), mlp["down"], of_units)

    def into_mlp(name: str, x_BTD: Array) -> Array:
        return routed_product("btd,df->btf", True, x_BTD, mlp[name], of_units)

    found = {name: functools.partial(heads, name) for name in counts}
    found |= {name: functools.partial(into_mlp, name) for name in ("gate", "up")}
    return found | {"output": output, "down": down}


def norms(config: ModelConfig, routes: Routes | None, scales: dict[str, Array]) -> dict[str, Array]:
    """The scales of a block's norms, learned from rows that teach the rest alone; as they are without routes."""
    if routes is None:
        return scales
    of_heads = () if config.qk_norm_width else ("query_norm", "key_norm")
    return {name: routes.of_rest(scale, 2 if name in of_heads else 1) for name, scale in scales.items()}


def ablated(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The model without its designated units: their parameters are 0. ValueError for a model that has none."""
    if config.routed is None:
        raise ValueError("no units are designated: it was trained without routing")
    kv, routed = designated_kv_heads(config), config.routed
    # [L, D, N, H], [L, N, H, D], [L, D, F], [L, F, D]; biases [L, N, H]
    axes = {"query": 2, "key": 2, "value": 2, "output": 1, "gate": 2, "up": 2, "down": 1}
    axes |= {f"{name}_bias": 1 for name in ("query", "key", "value")}

    def count(name: str) -> int:
        if name in ("gate", "up", "down"):
            return routed.mlp_units
        return kv if name.startswith(("key", "value")) else routed.heads

    layers = dict(params["layers"])
    for part in ("attention", "mlp"):
        layers[part] = {
            name: _without_last(kernel, axes[name], count(name)) for name, kernel in params["layers"][part].items()
        }
    return dataclasses.replace(config, routed=None), {**params, "layers": layers}


def _without_last(kernel: ArrayLike, axis: int, count: int) -> Array:
    """The array with zeros at the last `count` places of an axis."""
    place = jnp.arange(kernel.shape[axis]).reshape(*(-1 if i == axis else 1 for i in range(kernel.ndim)))
    return jnp.where(place < kernel.shape[axis] - count, kernel, jnp.zeros((), kernel.dtype))
