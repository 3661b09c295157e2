"""Converts between our parameters and the tensors of a checkpoint under its family's Hugging Face names.

A Hugging Face linear layer is [out, in], one tensor per layer, with flattened heads; ours is [in, out] with a heads
axis and stacked layers. No rows are permuted, since both rotate pairs (i, i + H/2).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from safelm.formats import families
from safelm.models import decoder as model

EMBEDDING = "model.embed_tokens.weight"
UNEMBED = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
_INTO_RESIDUAL = ("output", "down")  # kernels whose last axis is the residual stream
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # a buffer that older exports hold; it follows from rope_theta


def tensor_name(layer: int, suffix: str) -> str:
    return f"model.layers.{layer}.{suffix}"


def make_config(where: str, **fields: Any) -> model.ModelConfig:
    """A config from the sizes that were read. Raises ValueError naming `where` they come from."""
    try:
        return model.ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def params_from_tensors(
    config: model.ModelConfig,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], np.ndarray],
    *,
    where: str,
) -> model.Params:
    """Our parameters (numpy, `param_dtype`) from the tensors of a checkpoint.

    Args:
      shapes: shape of every tensor in the checkpoint by name; checked before anything is read or allocated.
      read: returns a tensor by name; called once for each in turn, so that only our arrays are held whole.
      where: the checkpoint's path, named in errors.

    Raises:
      ValueError: a tensor is missing, unknown (such as a bias) or of another shape; the message names it.
    """
    _check_tensors(config, shapes, where)
    dtype = np.dtype(config.param_dtype)
    ours = model.abstract_params(config)
    params: model.Params = {"layers": {}}
    for suffix, (module, leaf) in families.family_of(config).layer_tensors.items():
        shape = ours["layers"][module][leaf].shape
        stacked = np.empty(shape, dtype)
        for i in range(config.num_layers):
            stacked[i] = read(tensor_name(i, suffix)).T.reshape(shape[1:])
        params["layers"].setdefault(module, {})[leaf] = stacked
    params["final_norm"] = {"scale": read(FINAL_NORM).astype(dtype)}
    params["embedder"] = {"embedding": _padded(config, read(EMBEDDING).astype(dtype), axis=0)}
    if not config.tie_embeddings:
        params["unembed"] = {"kernel": _padded(config, read(UNEMBED).T.astype(dtype), axis=1)}
    elif UNEMBED in shapes and not np.array_equal(read(UNEMBED), read(EMBEDDING)):
        raise ValueError(f"{where}: tie_word_embeddings is true, but {UNEMBED} is not {EMBEDDING}")
    return params


def _check_tensors(config: model.ModelConfig, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises ValueError unless the tensors match the config, without allocating memory for absurd sizes."""
    found = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(_IGNORED_SUFFIXES)}
    table = (config.vocab_size, config.d_model)
    wanted = {EMBEDDING: table, FINAL_NORM: (config.d_model,)}
    if not config.tie_embeddings or UNEMBED in found:
        wanted[UNEMBED] = table
    in_layer = _layer_shapes(config)
    num_known = 0
    for name, shape in _with_layers(wanted, config.num_layers, in_layer):
        if name not in found:
            raise ValueError(f"{where}: tensor {name} is missing")
        if found[name] != shape:
            raise ValueError(f"{where}: tensor {name} has shape {found[name]}, the config asks for {shape}")
        num_known += 1
    if num_known < len(found):
        known = {name for name, _ in _with_layers(wanted, config.num_layers, in_layer)}
        extra, family = min(found.keys() - known), families.family_of(config).model_type
        raise ValueError(f"{where}: tensor {extra} has no place in the {family} family")


def _with_layers(
    wanted: Mapping[str, tuple[int, ...]], num_layers: int, in_layer: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from wanted.items()
    for layer in range(num_layers):
        for suffix, shape in in_layer.items():
            yield tensor_name(layer, suffix), shape


def _layer_shapes(config: model.ModelConfig) -> dict[str, tuple[int, ...]]:
    """The Hugging Face shapes [out, in] of a layer's tensors by suffix."""
    ours, table = config.block_shapes, families.family_of(config).layer_tensors
    return {suffix: _their_shape(name, ours[part][name]) for suffix, (part, name) in table.items()}


def tensors_from_params(config: model.ModelConfig, params: model.Params) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder, without rows that only pad the vocabulary."""
    host = jax.tree.map(np.asarray, params)
    tensors = {
        EMBEDDING: host["embedder"]["embedding"][: config.vocab_size],
        FINAL_NORM: host["final_norm"]["scale"],
    }
    if not config.tie_embeddings:
        tensors[UNEMBED] = host["unembed"]["kernel"][:, : config.vocab_size].T
    for suffix, (module, leaf) in families.family_of(config).layer_tensors.items():
        for i, ours in enumerate(host["layers"][module][leaf]):
            tensors[tensor_name(i, suffix)] = ours.reshape(_their_shape(leaf, ours.shape)[::-1]).T
    return tensors


def resize_vocabulary(
    config: model.ModelConfig, params: model.Params, vocab_size: int, *, num_trained: int
) -> tuple[model.ModelConfig, model.Params]:
    """The same model over `vocab_size` ids; ids from `num_trained` on start as the mean of the trained ones."""
    resized = dataclasses.replace(config, vocab_size=vocab_size)

    def resize(table: np.ndarray) -> np.ndarray:
        table = np.asarray(table)[: min(num_trained, vocab_size)]
        rows = np.zeros((vocab_size, table.shape[1]), table.dtype)
        rows[: len(table)] = table
        rows[len(table) :] = table.mean(axis=0, dtype=np.float64)
        return _padded(resized, rows, axis=0)

    params = {**params, "embedder": {"embedding": resize(params["embedder"]["embedding"])}}
    if not config.tie_embeddings:
        params["unembed"] = {"kernel": np.ascontiguousarray(resize(params["unembed"]["kernel"].T).T)}
    return resized, params


def _their_shape(leaf: str, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The Hugging Face shape, [out, in] or [out], of a kernel or bias with our shape `ours` (without the layers axis).

    Norms keep theirs.
    """
    if len(ours) == 1:
        return ours
    if leaf.endswith("_bias"):
        return (math.prod(ours),)
    if leaf in _INTO_RESIDUAL:
        return ours[-1], math.prod(ours[:-1])
    return math.prod(ours[1:]), ours[0]


def _padded(config: model.ModelConfig, table: np.ndarray, *, axis: int) -> np.ndarray:
    missing = config.padded_vocab_size - table.shape[axis]
    return np.pad(table, [(0, missing if i == axis else 0) for i in range(2)])
