"""Qwen2 and Qwen2.5 (dense): Llama with biases of queries, keys and values."""

from typing import Any

from safelm.formats.families import llama
from safelm.formats.family import Family
from safelm.formats.json_fields import JsonFields

_OPTIONS = {"qkv_bias": True}


def _read(fields: JsonFields) -> dict[str, Any]:
    llama.check_full_attention(fields)
    return llama.read(fields) | _OPTIONS


def _write(config: Any) -> dict[str, Any]:
    """The biases have no key of their own."""
    values = {**llama.write(config), "use_sliding_window": False, "max_window_layers": config.num_layers}
    return {key: value for key, value in values.items() if key != "attention_bias"}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer_tensors=llama.LAYER_TENSORS
    | {
        "self_attn.q_proj.bias": ("attention", "query_bias"),
        "self_attn.k_proj.bias": ("attention", "key_bias"),
        "self_attn.v_proj.bias": ("attention", "value_bias"),
    },
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    expected={key: allowed for key, allowed in llama.EXPECTED_WITHOUT_WINDOW.items() if key != "attention_bias"}
    | {"use_mrope": (False, None)},
    options=_OPTIONS,
    free=("rope_scaling",),
    read=_read,
    write=_write,
)
