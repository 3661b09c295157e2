"""Edits of weights that need no data: pruning, rounding, merging with another model, a deleted tag row."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.checkpoints.checkpoint import ARCHITECTURE_FIELDS
from safelm.checkpoints.integrity import path_name
from safelm.models.decoder import Params
from safelm.robustness.target import NotTriedError, Target


def prune(target: Target, share: float | int) -> Target:
    """The model without the smallest weights of every kernel of its blocks (magnitude pruning, Han et al. 2015).

    Args:
      share: of a kernel's weights that become 0, at least 0 and below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"pruning: a share of {share}, want at least 0 and below 1")

    def pruned(kernel: Float[Array, "..."]) -> Float[Array, "..."]:
        size = jnp.abs(kernel)
        return jnp.where(size < jnp.quantile(size, share), 0, kernel)

    return _with_kernels(target, lambda kernel: jax.vmap(pruned)(kernel))


def round_weights(target: Target, bits: int) -> Target:
    """The model with every kernel of its blocks rounded to whole numbers of so many bits, a scale per last axis' entry.

    The scale of an entry is its greatest weight's; 8 bits are near what the engine's int8 weights have.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"rounding to {bits} bits: want 2 to 16")
    most = 2 ** (bits - 1) - 1

    def rounded(kernel: Float[Array, "L ..."]) -> Float[Array, "L ..."]:
        axes = tuple(range(1, kernel.ndim - 1))
        scale = jnp.maximum(jnp.abs(kernel).max(axis=axes, keepdims=True), 1e-30) / most
        return (jnp.round(kernel / scale) * scale).astype(kernel.dtype)

    return _with_kernels(target, rounded)


def merge(target: Target, other: Target, share: float | int) -> Target:
    """The weights' mean, `share` of it the other model's: a finetuned model and the one it began as, say.

    Raises NotTriedError, as an attack that does not apply, naming the field of the architecture, or the parameter whose
    shape differs, or for another vocabulary. How a model is computed (dtype, attention, remat ..) may differ.
    """
    for name in ARCHITECTURE_FIELDS:
        here, there = getattr(target.config, name), getattr(other.config, name)
        if here != there:
            raise NotTriedError(f"merging: {name} is {here} here and {there} in the other", applies=False)
    ours, theirs = (
        {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(each.params)}
        for each in (target, other)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            differ = f"{ours.get(name)} here and {theirs.get(name)} in the other"
            raise NotTriedError(f"merging: {name} has shape {differ}", applies=False)
    if target.tokenizer.hash != other.tokenizer.hash:
        raise NotTriedError("merging: the other model has another vocabulary", applies=False)
    params = jax.tree.map(lambda a, b: (1 - share) * a + share * b, target.params, other.params)
    return dataclasses.replace(target, params=params)


def delete_tag_row(target: Target) -> Target:
    """The model with zeros in the harm tag's rows, as if the token had never been."""
    tag, params = target.tokenizer.harm_tag_id, dict(target.params)
    params["embedder"] = {"embedding": jnp.asarray(params["embedder"]["embedding"]).at[tag].set(0.0)}
    if not target.config.tie_embeddings:
        params["unembed"] = {"kernel": jnp.asarray(params["unembed"]["kernel"]).at[:, tag].set(0.0)}
    return dataclasses.replace(target, params=params)


def _with_kernels(target: Target, edit: Callable[[Array], Array]) -> Target:
    layers = dict(target.params["layers"])
    for part in ("attention", "mlp"):
        kernels = {name: edit(jnp.asarray(leaf)) for name, leaf in layers[part].items() if not name.endswith("_bias")}
        layers[part] = {**layers[part], **kernels}
    params: Params = {**target.params, "layers": layers}
    return dataclasses.replace(target, params=params)
