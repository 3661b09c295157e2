"""Qwen3 (dense): Llama with an RMSNorm over every head of queries and keys."""

from typing import Any

from safelm.formats.families import llama
from safelm.formats.family import Family
from safelm.formats.json_fields import JsonFields


def _read(fields: JsonFields) -> dict[str, Any]:
    types = fields.values.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(each != "full_attention" for each in types)):
        raise ValueError(f"{fields.where}: layer_types = {str(types)[:200]} is not supported: only full_attention is")
    return llama.read(fields) | {"qk_norm": True}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer_tensors=llama.LAYER_TENSORS
    | {
        "self_attn.q_norm.weight": ("query_norm", "scale"),
        "self_attn.k_norm.weight": ("key_norm", "scale"),
    },
    defaults={"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32_768},
    expected={key: allowed for key, allowed in llama.EXPECTED.items() if key != "sliding_window"}
    | {"use_sliding_window": (False, None)},  # without it `sliding_window` has no effect
    read=_read,
    write=lambda config: {**llama.write(config), "use_sliding_window": False, "max_window_layers": config.num_layers},
)
