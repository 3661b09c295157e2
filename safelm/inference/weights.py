"""A model's weights for decoding: separate arrays for every layer, in float32, bfloat16 or int8.

A decoding step is bound by reading the weights once. Slices of stacked layers would have to be copied first, which
takes as long as the product on a CPU. int8 kernels have a scale per output channel. The int8 units of CPUs and TPUs
need both sides in int8: "int8" rounds a product's inputs too, with a scale per token; "int8_weight_only" splits them
into two int8 terms, which keeps 15 bits and takes two products instead of one.

SmolLM2-135M-Instruct against float32 over 1,524 positions of C4 pages (`scripts/studies/measure_weights.py`): the
likeliest next token is the same at 99.3% with bfloat16 (KL 0.0002 nats), at 95.3% with the weights alone in int8 (KL
0.005), and at 86.1% with int8 (KL 0.047): that is for speed where single tokens don't matter.

On CPUs the kernels of `safelm.models.cpu_kernels` read packed matrices faster than XLA reads plain ones.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.models import cpu_kernels, lora
from safelm.models import decoder as model
from safelm.models.arrays import Leaf
from safelm.models.config import ModelConfig
from safelm.models.cpu_kernels import PackedKernel

WEIGHTS_DTYPES = ("float32", "bfloat16", "int8", "int8_weight_only")
_FINER = 254  # times the resolution of the first term


@flax.struct.dataclass
class Kernel:
    """A matrix [inputs, outputs], or [outputs, inputs] for an embedding."""

    values: Leaf
    scales: Leaf | None  # of int8: one per output, float32
    num_terms: int = flax.struct.field(pytree_node=False, default=1)  # of int8: what inputs are split into


@flax.struct.dataclass
class Layer:
    """One block; `norms` holds their scales by name, `biases` what its kernels' outputs get, [outputs], float32."""

    query: Kernel | PackedKernel
    key: Kernel | PackedKernel
    value: Kernel | PackedKernel
    output: Kernel | PackedKernel
    gate: Kernel | PackedKernel
    up: Kernel | PackedKernel
    down: Kernel | PackedKernel
    norms: dict[str, Leaf]
    biases: dict[str, Leaf]


@flax.struct.dataclass
class Weights:
    """A decoder's weights. With a tied embedding, `unembedding` has the same arrays."""

    embedding: Kernel | PackedKernel  # [V, D]; packed as [D, V]
    layers: list[Layer]
    final_norm_D: Leaf
    unembedding: Kernel | PackedKernel  # [V, D]; packed as [D, V]

    @property
    def is_packed(self) -> bool:
        """Whether they are for the CPU kernels."""
        return isinstance(self.unembedding, PackedKernel)


def prepare(
    config: ModelConfig, params: model.Params, dtype: str = "", *, products: str = "xla", has_mesh: bool = False
) -> Weights:
    """Converts parameters to weights in `dtype` (empty: the config's). Needs memory for both meanwhile.

    Args:
      products: one of `cpu_kernels.PRODUCTS`, what the weights are laid out for.
      has_mesh: whether they will be split over devices.

    Raises:
      ValueError: `dtype` is none of `WEIGHTS_DTYPES`, or `products` can't run here.
    """
    dtype = dtype or config.dtype
    if dtype not in (*WEIGHTS_DTYPES, config.dtype):
        raise ValueError(f"weights={dtype!r}: one of {', '.join(WEIGHTS_DTYPES)}")
    config, params = lora.merged(config, params)
    most_inputs = max(config.d_model, config.d_ff, config.num_heads * config.head_dim)
    choice = cpu_kernels.choose(products, dtype, most_inputs=most_inputs, has_mesh=has_mesh)
    to_kernel = _packed if choice.products == "native" else _kernel
    blocks, tied = params["layers"], config.tie_embeddings
    embedding = (to_kernel if tied else _kernel)(params["embedder"]["embedding"], dtype, axis=1)
    return Weights(
        embedding=embedding,
        layers=[
            _layer(jax.tree.map(operator.itemgetter(i), blocks), dtype, to_kernel) for i in range(config.num_layers)
        ],
        final_norm_D=jnp.asarray(params["final_norm"]["scale"], jnp.float32),
        unembedding=embedding if tied else to_kernel(jnp.asarray(params["unembed"]["kernel"]).T, dtype, axis=1),
    )


def _layer(block: model.Params, dtype: str, to_kernel: Callable[..., Kernel | PackedKernel]) -> Layer:
    attention, mlp = block["attention"], block["mlp"]
    d_model = attention["query"].shape[0]

    def flat(name: str) -> Kernel | PackedKernel:
        return to_kernel(attention[name].reshape(d_model, -1), dtype)

    scales = {name: part["scale"] for name, part in block.items() if "scale" in part}
    return Layer(
        query=flat("query"),
        key=flat("key"),
        value=flat("value"),
        output=to_kernel(attention["output"].reshape(-1, d_model), dtype),
        gate=to_kernel(mlp["gate"], dtype),
        up=to_kernel(mlp["up"], dtype),
        down=to_kernel(mlp["down"], dtype),
        norms={name: jnp.asarray(scale, jnp.float32) for name, scale in scales.items()},
        biases={name: jnp.asarray(attention[name], jnp.float32).reshape(-1) for name in attention if "bias" in name},
    )


def _kernel(values: Any, dtype: str, axis: int = 0) -> Kernel:
    """`axis` is that of the inputs."""
    if dtype not in ("int8", "int8_weight_only"):
        return Kernel(jnp.asarray(values, dtype), None)
    values = jnp.asarray(values, jnp.float32)
    rounded, scales = rounded_to_int8(values, axis=axis)
    return Kernel(rounded, jnp.squeeze(scales, axis), num_terms=2 if dtype == "int8_weight_only" else 1)


def _packed(values: Any, dtype: str, axis: int = 0) -> PackedKernel:
    plain = _kernel(values, dtype, axis)
    return cpu_kernels.pack(plain.values if axis == 0 else plain.values.T, plain.scales, num_terms=plain.num_terms)


def rounded_to_int8(values: Float[Array, "..."], axis: int) -> tuple[Array, Float[Array, "..."]]:
    """Values from -127 to 127, and one scale for each line along `axis`, which keeps length 1."""
    scales = jnp.maximum(jnp.abs(values).max(axis=axis, keepdims=True), 1e-30) / 127
    return jnp.round(values / scales).astype(jnp.int8), scales


def products(x_AD: Float[Array, "*A D"], kernels: Sequence[Kernel | PackedKernel]) -> list[Float[Array, "*A _"]]:
    """`product` with each of the kernels, which are of one kind: packed ones in one call."""
    packed = [kernel for kernel in kernels if isinstance(kernel, PackedKernel)]
    if not packed:
        return [product(x_AD, kernel) for kernel in kernels]
    *rows, width = x_AD.shape
    return [out_RF.reshape(*rows, -1) for out_RF in cpu_kernels.multiply(x_AD.reshape(-1, width), packed)]


def product(
    x_AD: Float[Array, "*A D"], kernel: Kernel | PackedKernel, *, is_embedding: bool = False
) -> Float[Array, "*A F"]:
    """`x @ kernel`, summed and returned in float32 (in int32 over int8)."""
    if isinstance(kernel, PackedKernel):
        return products(x_AD, [kernel])[0]
    *rows, width = x_AD.shape
    x_RD = x_AD.reshape(-1, width)
    num_rows = x_RD.shape[0]
    if num_rows == 1 and kernel.values.dtype != jnp.float32:
        x_RD = jnp.concatenate([x_RD, x_RD])  # XLA's CPU backend has no fast product of a vector but in float32
    over = (((1,), (1 if is_embedding else 0,)), ((), ()))
    if kernel.scales is None:
        x_RD = x_RD.astype(kernel.values.dtype)
        out_RF = jax.lax.dot_general(x_RD, kernel.values, over, preferred_element_type=jnp.float32)
    else:
        x_RD = x_RD.astype(jnp.float32)
        terms_RD, scale_R1 = rounded_to_int8(x_RD, axis=1)
        if kernel.num_terms == 2:
            rest_RD = jnp.round((x_RD / scale_R1 - terms_RD) * _FINER)  # within -127 .. 127
            terms_RD = jnp.concatenate([terms_RD, rest_RD.astype(jnp.int8)])
        sums_RF = jax.lax.dot_general(terms_RD, kernel.values, over, preferred_element_type=jnp.int32)
        first_RF, *others = jnp.split(sums_RF.astype(jnp.float32), kernel.num_terms)
        out_RF = sum((rest_RF / _FINER for rest_RF in others), first_RF) * (scale_R1 * kernel.scales)
    return out_RF[:num_rows].reshape(*rows, -1)


def look_up(embedding: Kernel | PackedKernel, tokens: Array, dtype: str) -> Array:
    """Rows of the embedding, in `dtype`."""
    if isinstance(embedding, PackedKernel):
        return cpu_kernels.take_outputs(embedding, tokens).astype(dtype)
    rows = jnp.take(embedding.values, tokens, axis=0)
    if embedding.scales is not None:
        rows = rows.astype(jnp.float32) * jnp.take(embedding.scales, tokens)[..., None]
    return rows.astype(dtype)
