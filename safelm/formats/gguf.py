"""Llama-architecture GGUF files (llama.cpp), dequantised to float32."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from safelm import model
from safelm.formats import llama_tensors

MAGIC = b"GGUF"
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "general.architecture": ("llama",),
    "llama.rope.scaling.type": ("none",),
    "llama.expert_count": (0,),
}
_TENSORS = {
    "token_embd.weight": llama_tensors.EMBEDDING,
    "output_norm.weight": llama_tensors.FINAL_NORM,
    "output.weight": llama_tensors.UNEMBED,
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
    """The model in a GGUF file; parameters in float32 as numpy arrays.

    Raises:
      ValueError: not a whole GGUF file, another architecture, a field or a tensor missing or not supported (named).
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error})") from error
    tensors = {_huggingface_name(tensor.name): tensor for tensor in reader.tensors}
    config = _read_config(path, reader, tensors)

    def read(name: str) -> np.ndarray:
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            return unpermute(values, config.num_heads)
        return unpermute(values, config.num_kv_heads) if name.endswith("k_proj.weight") else values

    return config, llama_tensors.params_from_tensors(config, tensors, read, where=str(path))


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of query and key rows (rotary pairs side by side): back to pairs (i, i + H/2)."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def has_token(path: Path, token: str) -> bool:
    """Whether the file's own vocabulary has `token`."""
    field = gguf.GGUFReader(path).fields.get("tokenizer.ggml.tokens")
    return field is not None and token in field.contents()


def _huggingface_name(name: str) -> str:
    """The Hugging Face name of a tensor; one we do not know keeps its own and is refused by that."""
    if name in _TENSORS:
        return _TENSORS[name]
    prefix, _, rest = name.partition(".")
    layer, _, suffix = rest.partition(".")
    if prefix == "blk" and layer.isdigit() and suffix in _LAYER_TENSORS:
        return llama_tensors.tensor_name(int(layer), _LAYER_TENSORS[suffix])
    return name


def _read_config(path: Path, reader: gguf.GGUFReader, tensors: dict[str, Any]) -> model.ModelConfig:
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    llama_tensors.check_expected(str(path), values, _SUPPORTED)

    def field(key: str) -> Any:
        if key not in values:
            raise ValueError(f"{path}: field {key} is missing")
        return values[key]

    if llama_tensors.EMBEDDING not in tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing")
    num_heads, d_model = field("llama.attention.head_count"), field("llama.embedding_length")
    head_dim = values.get("llama.attention.key_length", d_model // num_heads)
    rotary = {"llama.rope.dimension_count": (head_dim,), "llama.attention.value_length": (head_dim,)}
    llama_tensors.check_expected(str(path), values, rotary)
    return model.ModelConfig(
        vocab_size=int(tensors[llama_tensors.EMBEDDING].shape[1]),
        num_layers=field("llama.block_count"),
        d_model=d_model,
        d_ff=field("llama.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=values.get("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_seq_len=field("llama.context_length"),
        rope_theta=float(values.get("llama.rope.freq_base", 10_000.0)),
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.7g}"),  # stored as float32
        tie_embeddings=llama_tensors.UNEMBED not in tensors,
        dtype="float32",
    )
