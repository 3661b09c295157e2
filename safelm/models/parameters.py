"""The decoder's parameters as Flax modules: their shapes, logical axes and initial values.

Axes and names: see `safelm.models.decoder`.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from safelm.models import lora, sharding
from safelm.models.arrays import ArrayLike
from safelm.models.config import ModelConfig


def normal(std: float, *, num_real: int | None = None, axis: int = 0) -> nn.initializers.Initializer:
    """Normal with this standard deviation; entries from `num_real` on along `axis` are zero."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        values = std * jax.random.normal(key, shape, dtype)
        if num_real is None or num_real == shape[axis]:
            return values
        is_real = jax.lax.broadcasted_iota(jnp.int32, shape, axis) < num_real
        return jnp.where(is_real, values, jnp.zeros((), dtype))

    return initialize


class Scale(nn.Module):
    """A norm's scale."""

    config: ModelConfig

    @nn.compact
    def __call__(self, size: int) -> jax.Array:
        init = nn.initializers.zeros_init() if self.config.norm_offset else nn.initializers.ones_init()
        initializer = nn.with_logical_partitioning(init, ("norm",))
        return self.param("scale", initializer, (size,), self.config.param_dtype)


# Logical axes of a block's kernels, by part and name; one that ends in "embed" writes to the stream.
KERNEL_AXES = {
    "attention": {
        "query": ("embed", "heads", "head_dim"),
        "key": ("embed", "kv_heads", "head_dim"),
        "value": ("embed", "kv_heads", "head_dim"),
        "output": ("heads", "head_dim", "embed"),
        "query_bias": ("heads", "head_dim"),
        "key_bias": ("kv_heads", "head_dim"),
        "value_bias": ("kv_heads", "head_dim"),
    },
    "mlp": {"gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed")},
}
KERNEL_AXES["lora"] = lora.logical_axes(KERNEL_AXES["attention"] | KERNEL_AXES["mlp"])


class Kernels(nn.Module):
    """The kernels of a block's part, which its name says: parameters in `param_dtype`, handed out in `dtype`.

    Adapters are float32 whatever the model is, since they are trained.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        axes = KERNEL_AXES[self.name]
        shapes = self.config.block_shapes[self.name]
        return {name: self._kernel(name, shape, axes[name]) for name, shape in shapes.items()}

    def _kernel(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        std = self.config.init_std / (math.sqrt(2 * self.config.num_layers) if axes[-1] == "embed" else 1.0)
        if name.endswith("_a"):
            std = lora.init_std(shape)
        draw = nn.initializers.zeros_init() if name.endswith(("_bias", "_b")) else normal(std)
        initializer = nn.with_logical_partitioning(draw, axes)
        dtype = "float32" if self.name == lora.PART else self.config.param_dtype
        kernel = self.param(name, initializer, shape, dtype).astype(self.config.dtype)
        return sharding.gather(kernel, axes)  # in `dtype`: half the bytes


class Table(nn.Module):
    """A table of the vocabulary: the embedding, or the logits' kernel."""

    initializer: Any
    shape: tuple[int, ...]
    param_name: str
    param_dtype: str

    @nn.compact
    def __call__(self) -> ArrayLike:
        return self.param(self.param_name, self.initializer, self.shape, self.param_dtype)
