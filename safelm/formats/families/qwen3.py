"""Qwen3 (dense): Llama with an RMSNorm over every head of queries and keys."""

from typing import Any

from safelm.formats.families import llama
from safelm.formats.family import Family
from safelm.formats.json_fields import JsonFields

_OPTIONS = {"qk_norm": True}


def _read(fields: JsonFields) -> dict[str, Any]:
    llama.check_full_attention(fields)
    return llama.read(fields) | _OPTIONS


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer_tensors=llama.LAYER_TENSORS
    | {
        "self_attn.q_norm.weight": ("query_norm", "scale"),
        "self_attn.k_norm.weight": ("key_norm", "scale"),
    },
    defaults={"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32_768},
    expected=llama.EXPECTED_WITHOUT_WINDOW,
    options=_OPTIONS,
    free=("rope_scaling",),
    read=_read,
    write=lambda config: {**llama.write(config), "use_sliding_window": False, "max_window_layers": config.num_layers},
)
