"""Converts the tensors of a BERT-family checkpoint from Hugging Face names to our encoder's parameters.

A Hugging Face linear layer is [out, in]; ours is [in, out], with query, key and value in one array and separate axes
for heads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from safelm.formats import huggingface
from safelm.safety.embedding.encoder_config import EncoderConfig

# In front of the names in checkpoints of a model with a head on the encoder.
_PREFIXES = ("", "bert.", "roberta.", "new.", "model.", "0.auto_model.")
_WORDS = "embeddings.word_embeddings.weight"


class _Reader:
    """Tensors in float32, by name without the checkpoint's prefix."""

    def __init__(self, folder: Path):
        self._folder, self._files = folder, huggingface.tensor_files(folder)
        found = [prefix for prefix in _PREFIXES if prefix + _WORDS in self._files]
        if not found:
            raise ValueError(f"{folder}: tensor {_WORDS} is missing")
        self._prefix = found[0]

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        full = self._prefix + name
        if full not in self._files:
            raise ValueError(f"{self._folder}: tensor {full} is missing")
        tensor = huggingface.read_tensor(self._files[full], full)
        if tensor.shape != shape:
            raise ValueError(f"{self._folder}: tensor {full} has shape {tensor.shape}, the config asks for {shape}")
        return tensor

    def norm(self, name: str, d_model: int) -> dict[str, np.ndarray]:
        return {"scale": self(f"{name}.weight", d_model), "bias": self(f"{name}.bias", d_model)}


def read_params(folder: Path, config: EncoderConfig) -> dict[str, Any]:
    """The parameters in a Hugging Face folder (whole or sharded safetensors), numpy, float32.

    Raises:
      FileNotFoundError: no safetensors, or a shard named in the index is missing.
      ValueError: a tensor is missing or of another shape than the config says; the message names it.
    """
    read, c = _Reader(folder), config
    embeddings: dict[str, Any] = {"words": read(_WORDS, c.vocab_size, c.d_model)}
    if c.rope_theta is None:
        embeddings["positions"] = read("embeddings.position_embeddings.weight", c.max_positions, c.d_model)
    if c.type_vocab_size:
        embeddings["types"] = read("embeddings.token_type_embeddings.weight", c.type_vocab_size, c.d_model)
    embeddings["norm"] = read.norm("embeddings.LayerNorm", c.d_model)
    layer: Callable[..., dict[str, Any]] = _gte_layer if c.is_gated else _bert_layer
    layers = {f"layer_{i}": layer(read, c, f"encoder.layer.{i}.") for i in range(c.num_layers)}
    return {"embeddings": embeddings, **layers}


def _bert_layer(read: _Reader, c: EncoderConfig, prefix: str) -> dict[str, Any]:
    D, F, N, H = c.d_model, c.d_ff, c.num_heads, c.head_dim
    names = [f"{prefix}attention.self.{name}" for name in ("query", "key", "value")]
    kernels = [read(f"{name}.weight", D, D).T.reshape(D, N, H) for name in names]
    biases = [read(f"{name}.bias", D).reshape(N, H) for name in names]
    return {
        "qkv": np.stack(kernels, axis=1),
        "qkv_bias": np.stack(biases),
        "output": _kernel(read, f"{prefix}attention.output.dense", (N, H, D)),
        "output_bias": read(f"{prefix}attention.output.dense.bias", D),
        "attention_norm": read.norm(f"{prefix}attention.output.LayerNorm", D),
        "up": _kernel(read, f"{prefix}intermediate.dense", (D, F)),
        "up_bias": read(f"{prefix}intermediate.dense.bias", F),
        "down": _kernel(read, f"{prefix}output.dense", (F, D)),
        "down_bias": read(f"{prefix}output.dense.bias", D),
        "mlp_norm": read.norm(f"{prefix}output.LayerNorm", D),
    }


def _gte_layer(read: _Reader, c: EncoderConfig, prefix: str) -> dict[str, Any]:
    D, F, N, H = c.d_model, c.d_ff, c.num_heads, c.head_dim
    return {
        "qkv": _kernel(read, f"{prefix}attention.qkv_proj", (D, 3, N, H), rows=1),
        "qkv_bias": read(f"{prefix}attention.qkv_proj.bias", 3 * D).reshape(3, N, H),
        "output": _kernel(read, f"{prefix}attention.o_proj", (N, H, D)),
        "output_bias": read(f"{prefix}attention.o_proj.bias", D),
        "attention_norm": read.norm(f"{prefix}attn_ln", D),
        "up_gate": _kernel(read, f"{prefix}mlp.up_gate_proj", (D, 2, F), rows=1),
        "down": _kernel(read, f"{prefix}mlp.down_proj", (F, D)),
        "down_bias": read(f"{prefix}mlp.down_proj.bias", D),
        "mlp_norm": read.norm(f"{prefix}mlp_ln", D),
    }


def _kernel(read: _Reader, name: str, shape: tuple[int, ...], *, rows: int | None = None) -> np.ndarray:
    """A linear kernel as [in, out], reshaped to `shape`.

    The first `rows` axes are the input (None: all but the last).
    """
    rows = len(shape) - 1 if rows is None else rows
    size_in, size_out = int(np.prod(shape[:rows])), int(np.prod(shape[rows:]))
    return np.ascontiguousarray(read(f"{name}.weight", size_out, size_in).T).reshape(shape)
