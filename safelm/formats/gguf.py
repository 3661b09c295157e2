"""Reads GGUF files (llama.cpp) of the Llama architecture, dequantised to float32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safelm.formats import decoder_tensors
from safelm.formats.json_fields import JsonFields, check_expected
from safelm.io.gguf_file import GGUFFile, dequantized, shape_of
from safelm.models import decoder as model

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "general.architecture": ("llama",),
    "llama.rope.scaling.type": ("none",),
    "llama.rope.scaling.factor": (0, 1),  # llama.cpp scales linearly where no type says otherwise
    "llama.rope.scale_linear": (0, 1),
    "llama.rope.scaling.attn_factor": (1,),
    "llama.attention.causal": (True,),
    "llama.expert_count": (0,),
}
_READ = (
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
)
_WITHOUT_EFFECT = (
    "llama.expert_used_count",  # without experts
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",  # without scaling
    "llama.tensor_data_layout",
    "llama.vocab_size",
)
_TENSORS = {
    "token_embd.weight": decoder_tensors.EMBEDDING,
    "output_norm.weight": decoder_tensors.FINAL_NORM,
    "output.weight": decoder_tensors.UNEMBED,
}
_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def read_file(path: Path) -> tuple[model.ModelConfig, model.Params]:
    """Reads the model in a GGUF file; parameters are numpy arrays in float32.

    Raises:
      ValueError: the file is cut short or of another architecture, or a field or tensor, which the message names, is
        missing or unsupported.
    """
    file = GGUFFile(path)
    names = {_huggingface_name(name): name for name in file.tensors}
    config = _read_config(file, names)

    def read(name: str) -> np.ndarray:
        values = dequantized(file, names[name])
        if name.endswith("q_proj.weight"):
            return unpermute(values, config.num_heads)
        return unpermute(values, config.num_kv_heads) if name.endswith("k_proj.weight") else values

    shapes = {name: shape_of(file, own) for name, own in names.items()}
    return config, decoder_tensors.params_from_tensors(config, shapes, read, where=str(path))


def read_config(path: Path) -> model.ModelConfig:
    """The config of the model in a GGUF file; errors as in `read_file`."""
    file = GGUFFile(path)
    return _read_config(file, {_huggingface_name(name): name for name in file.tensors})


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of query and key rows (rotary pairs side by side), giving pairs (i, i + H/2)."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def has_token(path: Path, token: str) -> bool:
    """Whether the file's own vocabulary has `token`."""
    return token in GGUFFile(path).array("tokenizer.ggml.tokens", str)


def _huggingface_name(name: str) -> str:
    """The Hugging Face name of a tensor; an unknown tensor keeps its name and is refused by it."""
    if name in _TENSORS:
        return _TENSORS[name]
    prefix, _, rest = name.partition(".")
    layer, _, suffix = rest.partition(".")
    if prefix == "blk" and layer.isdigit() and suffix in _LAYER_TENSORS:
        return decoder_tensors.tensor_name(int(layer), _LAYER_TENSORS[suffix])
    return name


def _read_config(file: GGUFFile, names: Mapping[str, str]) -> model.ModelConfig:
    check_expected(file.path, file.scalars(), _SUPPORTED)
    of_architecture = {key: file.value(key) for key in file.keys() if key.startswith("llama.")}
    JsonFields(file.path, of_architecture).expect_no_others((*_SUPPORTED, *_READ, *_WITHOUT_EFFECT))
    if decoder_tensors.EMBEDDING not in names:
        raise ValueError(f"{file.path}: tensor token_embd.weight is missing")
    table = shape_of(file, names[decoder_tensors.EMBEDDING])
    num_heads, d_model = file.integer("llama.attention.head_count"), file.integer("llama.embedding_length")
    head_dim = file.integer("llama.attention.key_length", max(1, d_model // num_heads))
    rotary = {"llama.rope.dimension_count": (head_dim,), "llama.attention.value_length": (head_dim,)}
    check_expected(file.path, file.scalars(), rotary)
    epsilon = file.number("llama.attention.layer_norm_rms_epsilon")
    return decoder_tensors.make_config(
        file.path,
        vocab_size=table[0],
        num_layers=file.integer("llama.block_count"),
        d_model=d_model,
        d_ff=file.integer("llama.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=file.integer("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_seq_len=file.integer("llama.context_length"),
        rope_theta=file.number("llama.rope.freq_base", 10_000.0),
        rms_norm_eps=float(f"{epsilon:.7g}"),  # stored as float32
        tie_embeddings=decoder_tensors.UNEMBED not in names,
        dtype="float32",
    )
