"""Converts the tensors of an encoder's checkpoint from Hugging Face names to our encoder's parameters.

A Hugging Face linear layer is [out, in]; ours is [in, out], with query, key and value in one array and separate axes
for heads.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from safelm.formats import huggingface
from safelm.safety.embedding.encoder_config import EncoderConfig

# In front of the names in checkpoints of a model with a head on the encoder.
_PREFIXES = ("", "bert.", "roberta.", "deberta.", "new.", "model.", "0.auto_model.")


@dataclasses.dataclass(frozen=True)
class _Names:
    """The names of a checkpoint's tensors, of a layer's behind `layer` and its number.

    Attributes:
      qkv: one packed tensor or three.
      up: into the MLP; where it is gated both halves in one tensor, the activated one first if `is_gate_first`.
    """

    words: str = "embeddings.word_embeddings.weight"
    embeddings_norm: str = "embeddings.LayerNorm"
    layer: str = "encoder.layer"
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    is_gate_first: bool = False


_BERT = _Names()
_DEBERTA = _Names(qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"))
_GTE = _Names(
    qkv=("attention.qkv_proj",),
    output="attention.o_proj",
    attention_norm="attn_ln",
    up="mlp.up_gate_proj",
    down="mlp.down_proj",
    mlp_norm="mlp_ln",
)
_MODERNBERT = _Names(
    words="embeddings.tok_embeddings.weight",
    embeddings_norm="embeddings.norm",
    layer="layers",
    qkv=("attn.Wqkv",),
    output="attn.Wo",
    attention_norm="attn_norm",
    up="mlp.Wi",
    down="mlp.Wo",
    mlp_norm="mlp_norm",
    is_gate_first=True,
)


class TensorReader:
    """Tensors of a folder in float32, by name behind the checkpoint's prefix, with checked shapes."""

    def __init__(self, folder: Path, words: str):
        self._folder, self._files = folder, huggingface.tensor_files(folder)
        found = [prefix for prefix in _PREFIXES if prefix + words in self._files]
        if not found:
            raise ValueError(f"{folder}: tensor {words} is missing")
        self._prefix = found[0]

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        full = self._prefix + name
        if full not in self._files:
            raise ValueError(f"{self._folder}: tensor {full} is missing")
        tensor = huggingface.read_tensor(self._files[full], full)
        if tensor.shape != shape:
            raise ValueError(f"{self._folder}: tensor {full} has shape {tensor.shape}, the config asks for {shape}")
        return tensor

    def norm(self, name: str, c: EncoderConfig) -> dict[str, np.ndarray]:
        """A norm's scale, and its bias where the model has biases."""
        norm = {"scale": self(f"{name}.weight", c.d_model)}
        return norm | ({"bias": self(f"{name}.bias", c.d_model)} if c.has_biases else {})

    def kernel(self, name: str, shape: tuple[int, ...], *, axes_in: int | None = None) -> np.ndarray:
        """A linear kernel as [in, out], reshaped; the first `axes_in` axes are the input (None: all but the last)."""
        axes_in = len(shape) - 1 if axes_in is None else axes_in
        size_in, size_out = int(np.prod(shape[:axes_in])), int(np.prod(shape[axes_in:]))
        return np.ascontiguousarray(self(f"{name}.weight", size_out, size_in).T).reshape(shape)


def read_params(folder: Path, config: EncoderConfig) -> dict[str, Any]:
    """The parameters in a Hugging Face folder (whole or sharded safetensors), numpy, float32.

    Raises:
      FileNotFoundError: no safetensors, or a shard named in the index is missing.
      ValueError: a tensor is missing or of another shape than the config says; the message names it.
    """
    c, names = config, _names(config)
    read = TensorReader(folder, names.words)
    embeddings: dict[str, Any] = {"words": read(names.words, c.vocab_size, c.d_model)}
    if c.has_position_table:
        embeddings["positions"] = read("embeddings.position_embeddings.weight", c.max_positions, c.d_model)
    if c.type_vocab_size:
        embeddings["types"] = read("embeddings.token_type_embeddings.weight", c.type_vocab_size, c.d_model)
    embeddings["norm"] = read.norm(names.embeddings_norm, c)
    params = {"embeddings": embeddings} | {f"layer_{i}": _layer(read, c, names, i) for i in range(c.num_layers)}
    if c.relative_buckets:
        rows_RD = read("encoder.rel_embeddings.weight", 2 * c.relative_buckets, c.d_model)
        params["relative"] = {"rows": rows_RD, "norm": read.norm("encoder.LayerNorm", c)}
    if c.has_final_norm:
        params["final_norm"] = read.norm("final_norm", c)
    return params


def _names(c: EncoderConfig) -> _Names:
    if c.norms_first:
        return _MODERNBERT
    if c.is_gated:
        return _GTE
    return _DEBERTA if c.relative_buckets else _BERT


def _layer(read: TensorReader, c: EncoderConfig, names: _Names, index: int) -> dict[str, Any]:
    D, F, N, H = c.d_model, c.d_ff, c.num_heads, c.head_dim
    at = f"{names.layer}.{index}."
    qkv, output, up, down = tuple(at + name for name in names.qkv), at + names.output, at + names.up, at + names.down
    parts = 3 // len(qkv)
    kernels = [read.kernel(name, (D, parts, N, H), axes_in=1) for name in qkv]
    layer = {"qkv": np.concatenate(kernels, axis=1), "output": read.kernel(output, (N, H, D))}
    if index or not c.norms_first:
        layer["attention_norm"] = read.norm(at + names.attention_norm, c)
    if c.is_gated:
        up_gate_D2F = read.kernel(up, (D, 2, F), axes_in=1)
        layer["up_gate"] = np.ascontiguousarray(up_gate_D2F[:, ::-1]) if names.is_gate_first else up_gate_D2F
    else:
        layer["up"] = read.kernel(up, (D, F))
    layer |= {"down": read.kernel(down, (F, D)), "mlp_norm": read.norm(at + names.mlp_norm, c)}
    if c.has_biases:
        biases = [read(f"{name}.bias", parts * D).reshape(parts, N, H) for name in qkv]
        layer |= {"qkv_bias": np.concatenate(biases), "output_bias": read(f"{output}.bias", D)}
        layer |= {"down_bias": read(f"{down}.bias", D)} | ({} if c.is_gated else {"up_bias": read(f"{up}.bias", F)})
    return layer
