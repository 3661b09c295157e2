"""Places weights and cache on a mesh by `safelm.models.sharding`'s table, as in training."""

from typing import Any

import jax
from jax.sharding import Mesh

from safelm.inference.weights import Kernel, Layer, Weights
from safelm.models import decoder as model
from safelm.models import sharding
from safelm.models.config import ModelConfig

CACHE_AXES = ("batch", "kv_heads", "length", "head_dim")
STREAM_AXES = ("batch", "length", "residual")


def place(config: ModelConfig, weights: Weights, mesh: Mesh) -> Weights:
    """The weights on the mesh's devices. Raises ValueError for a mesh axis that does not divide the axis it splits."""
    return jax.tree.map(jax.device_put, weights, shardings(config, weights, mesh))


def shardings(config: ModelConfig, weights: Weights, mesh: Mesh) -> Weights:
    """A `NamedSharding` for every array.

    Raises ValueError for a mesh axis that does not divide the axis it splits, or weights packed for the CPU kernels.
    """
    if weights.is_packed:
        raise ValueError("weights prepared with products='native' are not for a mesh")
    sharding.param_shardings(mesh, model.logical_axes(config), model.abstract_params(config))
    return sharding.param_shardings(mesh, _axes(weights))


def _axes(weights: Weights) -> Weights:
    """A tree like `weights` whose leaves are the names of axes; heads and their width are one axis."""

    def kernel(of: Kernel, inputs: str, outputs: str, *, is_embedding: bool = False) -> Kernel:
        names: Any = (outputs, inputs) if is_embedding else (inputs, outputs)
        return of.replace(values=names, scales=None if of.scales is None else (outputs,))

    def layer(of: Layer) -> Layer:
        return Layer(
            query=kernel(of.query, "embed", "heads"),
            key=kernel(of.key, "embed", "kv_heads"),
            value=kernel(of.value, "embed", "kv_heads"),
            output=kernel(of.output, "heads", "embed"),
            gate=kernel(of.gate, "embed", "mlp"),
            up=kernel(of.up, "embed", "mlp"),
            down=kernel(of.down, "mlp", "embed"),
            norms={name: ("norm",) for name in of.norms},
            biases={name: ("heads",) if name == "query_bias" else ("kv_heads",) for name in of.biases},
        )

    return Weights(
        embedding=kernel(weights.embedding, "embed", "vocab", is_embedding=True),
        layers=[layer(each) for each in weights.layers],
        final_norm_D=("norm",),
        unembedding=kernel(weights.unembedding, "embed", "vocab", is_embedding=True),
    )
