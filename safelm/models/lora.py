"""Low-rank adapters: a block's products with them, what is trained and what is frozen, and merging.

LoRA (Hu et al. 2021, arXiv 2106.09685): beside a frozen projection x W stands alpha / rank x A B. A begins random, B as
zeros, so that an adapted model begins as the model. Parameters: `layers/lora/NAME_a` [L, inputs, R] and `NAME_b`
[L, R, outputs] for every projection NAME of `ModelConfig.lora`, R its rank, inputs and outputs as its kernel has them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from safelm.models.arrays import Params
from safelm.models.config import PROJECTIONS, ModelConfig

PART = "lora"  # of a block's parameters


def logical_axes(kernels: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The axes of all adapters from those of the kernels."""
    found = {}
    for name in PROJECTIONS:
        split = -1 if kernels[name][-1] == "embed" else 1
        inputs, outputs = kernels[name][:split], kernels[name][split:]
        found |= {f"{name}_a": (*inputs, "rank"), f"{name}_b": ("rank", *outputs)}
    return found


def init_std(shape: Sequence[int]) -> float:
    """Standard deviation of a new A [inputs, R]: that of the uniform distribution which PEFT draws from."""
    return 1 / math.sqrt(3 * math.prod(shape[:-1]))


def adapted(
    config: ModelConfig, adapters: Mapping[str, Array], name: str, product: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """A projection's product with its adapter's added; the product itself where it has none."""
    if f"{name}_a" not in adapters:
        return product
    a, b = adapters[f"{name}_a"], adapters[f"{name}_b"]

    def with_adapter(x: Array) -> Array:
        low_BTR = jnp.tensordot(x, a, axes=a.ndim - 1) * jnp.asarray(config.lora.scale, x.dtype)
        return product(x) + jnp.tensordot(low_BTR, b, axes=1)

    return with_adapter


def split(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """What a run trains of a tree like the parameters, and what it leaves: everything and nothing without adapters."""
    if config.lora is None:
        return params, {}
    layers = dict(params["layers"])
    adapters = layers.pop(PART)
    return {"layers": {PART: adapters}}, {**params, "layers": layers}


def joined(trained: Params, frozen: Params) -> Params:
    """The tree that `split` took apart."""
    return {**frozen, "layers": {**frozen["layers"], **trained["layers"]}} if frozen else trained


def merged(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model without adapters that computes the same: W + alpha / rank A B, in the parameters' own dtype."""
    if config.lora is None:
        return config, params
    trained, frozen = split(config, params)
    adapters, layers = trained["layers"][PART], dict(frozen["layers"])
    with jax.default_matmul_precision("highest"):
        for part, shapes in config.block_shapes.items():
            for name in filter(config.lora.targets.__contains__, shapes):
                kernel = layers[part][name]
                a, b = adapters[f"{name}_a"], adapters[f"{name}_b"]
                added = a.reshape(len(a), -1, config.lora.rank) @ b.reshape(len(b), config.lora.rank, -1)
                change = kernel + config.lora.scale * added.reshape(kernel.shape)
                layers[part] = {**layers[part], name: change.astype(kernel.dtype)}
    return dataclasses.replace(config, lora=None), {**frozen, "layers": layers}
