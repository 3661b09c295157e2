"""The decoder of training: SmolLM2/Llama (rotary positions, grouped-query attention, SwiGLU, RMSNorm), in Flax Linen.

What other families have beyond it are options of `ModelConfig`; where layers differ, in their window or their rotary
base, the difference is an array over layers, so that they are scanned all the same.

Others see a config, `init` and `apply`: parameters are a plain nested dict, Linen stays in this file and
`safelm.models.parameters`.

Axes: B batch, T query position, S key position, D embed, F mlp, N heads, K kv heads, G query heads per kv head,
H head_dim, V vocab (padded), L layers, W beams, C candidates.

Parameters (layers always stacked on a leading axis, whether scanned or not):
  embedder/embedding [V, D]; layers/{attention_norm,mlp_norm}/scale [L, D];
  layers/attention/{query [L, D, N, H], key, value [L, D, K, H], output [L, N, H, D]};
  layers/{query_norm,key_norm}/scale [L, H] with `qk_norm`; layers/attention/{query_bias [L, N, H], key_bias, value_bias
  [L, K, H]} with `qkv_bias`; layers/mlp/{gate, up [L, D, F], down [L, F, D]};
  layers/lora/{NAME_a, NAME_b} of the projections in `lora`, see `safelm.models.lora`;
  final_norm/scale [D]; unembed/kernel [D, V] when not tied.
Rows of padded ids are zero and stay zero: their logits are masked, so they get no gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.models import attention, attention_kernels, lora, remat, routing, sharding
from safelm.models.arrays import ArrayLike, Params
from safelm.models.block import BlockWeights, block, embedded, rms_norm
from safelm.models.config import ModelConfig
from safelm.models.parameters import Kernels, Scale, Table, normal
from safelm.models.projection import from_heads, project, project_by_rows, to_heads
from safelm.models.routing import Routes

__all__ = [
    "ModelConfig",
    "Params",
    "abstract_params",
    "apply",
    "hidden_states",
    "init",
    "layer_states",
    "logical_axes",
    "mask_padded_ids",
    "unembed",
    "unembedding",
]

MASKED_LOGIT = -1e9  # of ids that exist only to pad the vocabulary


class Block(nn.Module):
    """`safelm.models.block` with its parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rope: Any, visible: Any, own: Any, routes: Routes | None = None
    ) -> tuple[jax.Array, None]:
        """One layer; `own` is what is its own: which of the bases in `rope` it has, and its window."""
        c = self.config
        if "rope" in own:
            rope = jax.tree.map(lambda angles: angles[own["rope"]], rope)
        if "window" in own:
            visible = attention.windowed(visible, own["window"])
        of_attention, of_mlp = Kernels(c, name="attention")(), Kernels(c, name="mlp")()
        adapters = Kernels(c, name="lora")() if c.lora else {}
        how = {"is_flat": c.attention == "splash", "kernels": c.products}
        norms = {name: part["scale"] for name, part in c.block_shapes.items() if "scale" in part}

        def heads(name: str) -> Callable[[jax.Array], jax.Array]:
            bias = of_attention.get(f"{name}_bias")

            def product(x_BTD: jax.Array) -> jax.Array:
                out_BTNH = to_heads(x_BTD, of_attention[name], **how)
                return out_BTNH if bias is None else out_BTNH + bias

            return product

        products = {name: heads(name) for name in ("query", "key", "value")}
        products["output"] = lambda out_BTNH: from_heads(out_BTNH, of_attention["output"], **how)
        products |= {name: lambda x_BTD, name=name: project(x_BTD, of_mlp[name], None, c.products) for name in of_mlp}
        if routes is not None:
            products = routing.products(c, routes, of_attention, of_mlp)
        adapted = {name: lora.adapted(c, adapters, name, product) for name, product in products.items()}
        if is_kept_by_name := remat.Kept.parse(c.remat) is not None:
            adapted = {name: _named(name, product) for name, product in adapted.items()}
        weights = BlockWeights(
            heads=lambda x_BTD: tuple(adapted[name](x_BTD) for name in ("query", "key", "value")),
            output=adapted["output"],
            gated=lambda x_BTD: (adapted["gate"](x_BTD), adapted["up"](x_BTD)),
            down=adapted["down"],
            norms=routing.norms(c, routes, {name: Scale(c, name=name)(*shape) for name, shape in norms.items()}),
        )

        def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            out_BTNH = attention_kernels.attend(c.attention, q_BTNH, k_BTKH, v_BTKH, visible)
            # Splash's kernel names its results itself.
            return remat.named("attention", out_BTNH) if is_kept_by_name and c.attention != "splash" else out_BTNH

        x_BTD, _, _ = block(c, weights, x_BTD, rope, attend)
        return sharding.constrain(x_BTD, ("batch", "length", "residual")), None


def _named(name: str, product: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The product, its result under a name that a remat policy can keep."""
    return lambda x_BTD: remat.named(name, product(x_BTD))


class Decoder(nn.Module):
    """Tokens to the residual stream after the blocks, normed."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, rope: Any, visible: Any, own: Any, routes: Routes | None = None
    ) -> jax.Array:
        c = self.config
        initializer = nn.with_logical_partitioning(normal(c.init_std, num_real=c.vocab_size), ("vocab", "embed"))
        shape = (c.padded_vocab_size, c.d_model)
        embedding_VD = Table(initializer, shape, "embedding", c.param_dtype, name="embedder")()
        if not c.tie_embeddings:
            initializer = normal(c.init_std, num_real=c.vocab_size, axis=1)
            initializer = nn.with_logical_partitioning(initializer, ("embed", "vocab"))
            Table(initializer, shape[::-1], "kernel", c.param_dtype, name="unembed")()
        x_BTD = embedded(c, jnp.take(embedding_VD, tokens_BT, axis=0))
        if routes is not None:
            x_BTD = jnp.where(routes.teaches_B[:, None, None] > 0, x_BTD, jax.lax.stop_gradient(x_BTD))
        x_BTD = sharding.constrain(x_BTD, ("lookup_batch", "length", "embed"))  # then rows change places with columns
        x_BTD = sharding.constrain(x_BTD, ("batch", "length", "residual"))
        x_BTD, _ = _stacked_block(c)(c, name="layers")(x_BTD, rope, visible, own, routes)
        scale = Scale(c, name="final_norm")(c.d_model)
        return rms_norm(c, x_BTD, scale if routes is None else routes.of_rest(scale, 1))


def _all_but_what_is_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy "none" under FSDP: kernels are gathered again for the backward pass, not kept whole."""
    return primitive.name != "sharding_constraint"


def _stacked_block(config: ModelConfig) -> Any:
    """`Block` scanned over a leading layers axis; unrolled to a plain loop when not `scan_layers`: same parameters."""
    scanned = Block
    if config.remat != remat.NONE or sharding.splits_parameters():
        policy = remat.policy(config.remat) or _all_but_what_is_gathered
        scanned = nn.remat(Block, policy=policy, prevent_cse=not config.scan_layers)
    return nn.scan(
        scanned,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
        length=config.num_layers,
        unroll=1 if config.scan_layers else config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _init_boxed(config: ModelConfig, key: jax.Array) -> Params:
    config = dataclasses.replace(config, attention="xla")
    tokens_BT = jnp.zeros((1, 1), dtype=jnp.int32)
    return Decoder(config).init(key, tokens_BT, *_around(config, tokens_BT, None, None))["params"]


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters (the same for scanned and unrolled layers, any remat and any sharding)."""
    return nn.meta.unbox(_init_boxed(config, key))


def abstract_params(config: ModelConfig) -> Params:
    """The parameters' shapes and dtypes, without computing anything."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def logical_axes(config: ModelConfig) -> Params:
    """For every parameter the tuple of its logical axis names: see `sharding.LOGICAL_AXES`."""
    boxed = jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=_is_box)


def _is_box(leaf: object) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[ArrayLike, "B T"],
    *,
    positions_BT: Int[ArrayLike, "B T"] | None = None,
    segment_ids_BT: Int[ArrayLike, "B T"] | None = None,
    branches_BT: Int[ArrayLike, "B T"] | None = None,
    layer: int | None = None,
    routes: Routes | None = None,
) -> Float[Array, "B T D"]:
    """The residual stream, in `config.dtype`.

    Args:
      positions_BT: of each token in its document; 0, 1, .. along the row when not given.
      segment_ids_BT: the document of each token (0 = padding); attention stays inside a document.
      branches_BT: in place of documents, the continuation that each token belongs to, of several of one beginning,
        whose tokens have 0 and are seen by all. For attention "xla" without windows; `positions_BT` say where each
        begins.
      layer: None for the last layer after the final norm (what `unembed` takes), else the stream after this many
        blocks, not normed (0 = the embeddings); the later blocks are not computed.
      routes: which parameters learn from which rows, of a model with designated units (`safelm.models.routing`).

    Raises ValueError for branches with other attention or windows, or of one layer.
    """
    if branches_BT is not None and (config.attention != "xla" or any(config.windows) or layer is not None):
        raise ValueError(f"branches_BT: not with attention={config.attention!r}, windows or layer={layer}")
    if layer is not None:
        (x_BTD,) = layer_states(
            config, params, tokens_BT, (layer,), positions_BT=positions_BT, segment_ids_BT=segment_ids_BT
        )
        return x_BTD
    rope, visible, own = _around(config, tokens_BT, positions_BT, segment_ids_BT)
    seen = rope, visible if branches_BT is None else attention.branching_mask(branches_BT), own
    return Decoder(config).apply({"params": params}, tokens_BT, *seen, routes)


def layer_states(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[ArrayLike, "B T"],
    layers: Sequence[int],
    *,
    positions_BT: Int[ArrayLike, "B T"] | None = None,
    segment_ids_BT: Int[ArrayLike, "B T"] | None = None,
    start: tuple[int, Float[ArrayLike, "B T D"]] | None = None,
) -> list[Float[Array, "B T D"]]:
    """The residual stream after each of these many blocks, not normed (0 = the embeddings); every block runs once.

    Blocks after the last one asked for are not computed, nor those before `start`: a number of blocks and the stream
    after them, which then takes the place of the tokens. Other arguments as in `hidden_states`; ValueError for a layer
    that the model does not have or that lies before the start.
    """
    before, x_BTD = start or (0, None)
    for layer in layers:
        if not before <= layer <= config.num_layers:
            raise ValueError(f"layer={layer}: the model has layers {before} to {config.num_layers}")
    rope, visible, own = _around(config, tokens_BT, positions_BT, segment_ids_BT)
    if x_BTD is None:
        x_BTD = embedded(config, jnp.take(params["embedder"]["embedding"], tokens_BT, axis=0))
    states = {before: x_BTD.astype(config.dtype)}
    for layer in sorted(set(layers) - {before}):
        part = config.part(before, layer)
        blocks, owned = jax.tree.map(functools.partial(_part, before, layer), (params["layers"], own))
        around = (rope, visible, owned, None)
        states[layer], _ = _stacked_block(part)(part).apply({"params": blocks}, states[before], *around)
        before = layer
    return [states[layer] for layer in layers]


def _part(start: int, stop: int, stacked: ArrayLike) -> ArrayLike:
    return stacked[start:stop]


def _around(config: ModelConfig, tokens_BT: Any, positions_BT: Any, segment_ids_BT: Any) -> tuple[Any, Any, Any]:
    """What blocks take beside the stream: rotary angles, what is visible, and arrays [L] of what is a layer's own."""
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    rope, own = attention.rope_angles(config, positions_BT), {}
    if config.rope_thetas:
        bases = sorted(set(config.rope_thetas))
        ropes = [attention.rope_angles(config, positions_BT, base) for base in bases]
        rope = jax.tree.map(lambda *angles: jnp.stack(angles), *ropes)
        own["rope"] = jnp.asarray([bases.index(base) for base in config.rope_thetas])
    if any(config.windows):
        own["window"] = jnp.asarray(config.windows)
    return rope, attention_kernels.what_is_visible(config.attention, tokens_BT.shape[1], segment_ids_BT), own


def unembed(config: ModelConfig, params: Params, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits over the padded vocabulary; those of padded ids are `MASKED_LOGIT`."""
    kernel_VD = unembedding(config, params).astype(config.dtype)
    if config.products == "native":
        return mask_padded_ids(config, project_by_rows(x_BTD, kernel_VD, jnp.float32, config.products))
    return mask_padded_ids(config, project(x_BTD, kernel_VD.T, jnp.float32))


def mask_padded_ids(config: ModelConfig, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The logits with `MASKED_LOGIT` for ids that only pad the vocabulary."""
    if config.padded_vocab_size == config.vocab_size:
        return logits
    return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits, MASKED_LOGIT)


def unembedding(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The kernel of the logits, in `param_dtype`: the embedding itself where it is tied."""
    return params["embedder"]["embedding"] if config.tie_embeddings else params["unembed"]["kernel"].T


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[ArrayLike, "B T"],
    *,
    positions_BT: Int[ArrayLike, "B T"] | None = None,
    segment_ids_BT: Int[ArrayLike, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits of the next token at every position, for inference; arguments as in `hidden_states`.

    Attention is xla's, which takes rows of any length on any device, whatever `config.attention` is.
    """
    config = dataclasses.replace(config, attention="xla")
    x_BTD = hidden_states(config, params, tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
    return unembed(config, params, x_BTD)
