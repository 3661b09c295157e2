"""Our parameters <-> the tensors of a Llama checkpoint under their Hugging Face names.

A Hugging Face linear layer is [out, in], one tensor per layer, heads flattened; ours is [in, out] with heads apart and
layers stacked. No rows are permuted: both rotate pairs (i, i + H/2).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from safelm import model

EMBEDDING = "model.embed_tokens.weight"
UNEMBED = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
# Hugging Face name inside a layer -> our path inside `layers`.
_LAYER_TENSORS = {
    "input_layernorm.weight": ("attention_norm", "scale"),
    "self_attn.q_proj.weight": ("attention", "query"),
    "self_attn.k_proj.weight": ("attention", "key"),
    "self_attn.v_proj.weight": ("attention", "value"),
    "self_attn.o_proj.weight": ("attention", "output"),
    "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    "mlp.gate_proj.weight": ("mlp", "gate"),
    "mlp.up_proj.weight": ("mlp", "up"),
    "mlp.down_proj.weight": ("mlp", "down"),
}
_INTO_RESIDUAL = ("output", "down")  # kernels whose last axis is the residual stream
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # a buffer that older exports hold; it follows from rope_theta


def tensor_name(layer: int, suffix: str) -> str:
    return f"model.layers.{layer}.{suffix}"


def _expected_names(config: model.ModelConfig) -> list[str]:
    names = [EMBEDDING, FINAL_NORM] + ([] if config.tie_embeddings else [UNEMBED])
    return names + [tensor_name(i, suffix) for i in range(config.num_layers) for suffix in _LAYER_TENSORS]


def params_from_tensors(
    config: model.ModelConfig, names: Iterable[str], read: Callable[[str], np.ndarray], *, where: str
) -> model.Params:
    """Our parameters (numpy, `param_dtype`) from the tensors of a checkpoint.

    Args:
      names: every tensor the checkpoint holds.
      read: gives a tensor by name; called once for each, one after the other, so that only ours are held whole.
      where: the checkpoint's path, for errors.

    Raises:
      ValueError: a tensor is missing, not known (a bias, say), or of another shape; the message names it.
    """
    names = {name for name in names if not name.endswith(_IGNORED_SUFFIXES)}
    expected = _expected_names(config)
    for name in expected:
        if name not in names:
            raise ValueError(f"{where}: tensor {name} is missing")
    extra = sorted(names - set(expected) - ({UNEMBED} if config.tie_embeddings else set()))
    if extra:
        raise ValueError(f"{where}: tensor {extra[0]} has no place in a Llama without biases")

    def read_as(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> np.ndarray:
        tensor = read(name)
        if tensor.shape != theirs:
            raise ValueError(f"{where}: tensor {name} has shape {tensor.shape}, the config asks for {theirs}")
        return tensor.T.reshape(ours)

    dtype = np.dtype(config.param_dtype)
    shapes = model.abstract_params(config)
    params: model.Params = {"layers": {}}
    for suffix, (module, leaf) in _LAYER_TENSORS.items():
        shape = shapes["layers"][module][leaf].shape
        stacked = np.empty(shape, dtype)
        for i in range(config.num_layers):
            stacked[i] = read_as(tensor_name(i, suffix), shape[1:], _their_shape(leaf, shape[1:]))
        params["layers"].setdefault(module, {})[leaf] = stacked
    params["final_norm"] = {"scale": read_as(FINAL_NORM, (config.d_model,), (config.d_model,)).astype(dtype)}
    table = (config.vocab_size, config.d_model)
    params["embedder"] = {"embedding": _padded(config, read_as(EMBEDDING, table[::-1], table).T.astype(dtype), axis=0)}
    if not config.tie_embeddings:
        params["unembed"] = {"kernel": _padded(config, read_as(UNEMBED, table[::-1], table).astype(dtype), axis=1)}
    elif UNEMBED in names and not np.array_equal(read(UNEMBED), read(EMBEDDING)):
        raise ValueError(f"{where}: tie_word_embeddings is true, but {UNEMBED} is not {EMBEDDING}")
    return params


def tensors_from_params(config: model.ModelConfig, params: model.Params) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face Llama; rows that only pad the vocabulary are left out."""
    host = jax.tree.map(np.asarray, params)
    tensors = {
        EMBEDDING: host["embedder"]["embedding"][: config.vocab_size],
        FINAL_NORM: host["final_norm"]["scale"],
    }
    if not config.tie_embeddings:
        tensors[UNEMBED] = host["unembed"]["kernel"][:, : config.vocab_size].T
    for suffix, (module, leaf) in _LAYER_TENSORS.items():
        for i, ours in enumerate(host["layers"][module][leaf]):
            tensors[tensor_name(i, suffix)] = ours.reshape(_their_shape(leaf, ours.shape)[::-1]).T
    return tensors


def resize_vocabulary(
    config: model.ModelConfig, params: model.Params, vocab_size: int, *, num_trained: int
) -> tuple[model.ModelConfig, model.Params]:
    """The same model over `vocab_size` ids: ids from `num_trained` on start as the mean of the trained ones."""
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
    """The [out, in] shape of a kernel that is `ours` without the layers axis; norms stay as they are."""
    if len(ours) == 1:
        return ours
    if leaf in _INTO_RESIDUAL:
        return ours[-1], int(np.prod(ours[:-1]))
    return int(np.prod(ours[1:])), ours[0]


def _padded(config: model.ModelConfig, table: np.ndarray, *, axis: int) -> np.ndarray:
    missing = config.padded_vocab_size - table.shape[axis]
    return np.pad(table, [(0, missing if i == axis else 0) for i in range(2)])


def check_expected(where: str, values: Mapping[str, object], expected: Mapping[str, tuple[object, ...]]) -> None:
    """Raises ValueError naming the first key whose value is there and not one that this model can represent."""
    for key, allowed in expected.items():
        if key in values and values[key] not in allowed:
            spelled = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"{where}: {key} = {values[key]!r} is not supported; it must be {spelled}")
