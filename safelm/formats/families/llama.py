"""Llama 2 and 3, SmolLM2, SafeLM: the plain decoder, with Llama 3.1's scaled rotary frequencies as an option."""

import dataclasses
from typing import Any

from safelm.formats.family import Family
from safelm.formats.json_fields import JsonFields
from safelm.models.config import ModelConfig

LAYER_TENSORS = {
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
_WHOLE_HEAD = {"partial_rotary_factor": (None, 1, 1.0)}
EXPECTED = _WHOLE_HEAD | {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "original_max_position_embeddings": (None,),  # belongs to the rotary positions' object
    "sliding_window": (None,),
    "quantization_config": (None,),
}
# Of families whose configs name a window that has no effect without `use_sliding_window`.
EXPECTED_WITHOUT_WINDOW = {key: allowed for key, allowed in EXPECTED.items() if key != "sliding_window"} | {
    "use_sliding_window": (False, None)
}
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_SCALES = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


def read(fields: JsonFields, default_theta: float = 10_000.0) -> dict[str, Any]:
    """Base and scaling of the rotary positions, as written by transformers 5 (`rope_parameters`) or 4 (`rope_scaling`).

    If a config has both, `rope_scaling` decides, as in transformers 5.
    """
    rope = fields.inside("rope_scaling")
    if not rope.values:
        rope = fields.inside("rope_parameters")
    bases = [rope, fields.inside("rope_parameters"), fields]
    base = next((each for each in bases if each.values.get("rope_theta") is not None), fields)
    kind = "rope_type" if "rope_type" in rope.values else "type"
    rope.expect({kind: ("default", "llama3")} | _WHOLE_HEAD)
    is_scaled = rope.values.get(kind) == "llama3"
    rope.expect_no_others((*_ROPE_KEYS, *(_SCALES.values() if is_scaled else ())))
    return {"rope_theta": base.number("rope_theta", default_theta), "rope_scaling": _scaling(fields, rope, is_scaled)}


def check_full_attention(fields: JsonFields) -> None:
    """Raises ValueError for a config whose `layer_types` names a layer that doesn't see everything before it."""
    types = fields.values.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(each != "full_attention" for each in types)):
        raise ValueError(f"{fields.where}: layer_types = {str(types)[:200]} is not supported: only full_attention is")


def _scaling(fields: JsonFields, rope: JsonFields, is_scaled: bool) -> dict[str, float | int] | None:
    if not is_scaled:
        return None
    factors = {name: rope.number(key) for name, key in _SCALES.items() if name != "original_max_seq_len"}
    whole = fields.size("max_position_embeddings", 2048)
    return {**factors, "original_max_seq_len": rope.size(_SCALES["original_max_seq_len"], whole)}


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys for both versions of transformers that `read` reads back."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scales = dataclasses.asdict(config.rope_scaling)
        scaling = {"rope_type": "llama3"} | {key: scales[name] for name, key in _SCALES.items()}
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_scaling": None if config.rope_scaling is None else scaling,  # transformers 4
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},  # transformers 5
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer_tensors=LAYER_TENSORS,
    defaults={},
    expected=EXPECTED,
    options={},
    free=("rope_scaling",),
    read=read,
    write=lambda config: {**write(config), "mlp_bias": False},
)
