"""Gemma 3, text alone: norms around attention and MLP; most layers see a window only and have a rotary base of theirs.

Norms multiply by 1 + their weight, embeddings by sqrt(d_model); scores are divided by sqrt(query_pre_attn_scalar), and
queries and keys normed by head. Soft caps, which Gemma 2 has, are null in all published models and refused else.
"""

from typing import Any

from safelm.formats.families import llama
from safelm.formats.family import Family
from safelm.formats.json_fields import JsonFields
from safelm.models.config import ModelConfig

_FULL, _SLIDING = "full_attention", "sliding_attention"
_OPTIONS = {
    "qk_norm": True,
    "norms": "around",
    "norm_offset": True,
    "activation": "gelu",
    "scale_embeddings": True,
}
_ACTIVATIONS = ("gelu_pytorch_tanh",)
_ROPE_KEYS = ("rope_type", "type", "rope_theta")


def _read(fields: JsonFields) -> dict[str, Any]:
    kinds, window = _kinds(fields), fields.size("sliding_window", 4096)
    bases = {
        _FULL: _base(fields, _FULL, "rope_theta", 1_000_000.0),
        _SLIDING: _base(fields, _SLIDING, "rope_local_base_freq", 10_000.0),
    }
    differs = _SLIDING in kinds
    return _OPTIONS | {
        "query_pre_attn_scalar": fields.number("query_pre_attn_scalar", 256.0),
        "rope_theta": bases[_FULL],
        "rope_thetas": tuple(bases[kind] for kind in kinds) if differs else (),
        "windows": tuple(window * (kind == _SLIDING) for kind in kinds) if differs else (),
    }


def _kinds(fields: JsonFields) -> list[str]:
    """Which kind every layer is of: as listed, or every sixth sees everything."""
    num_layers, kinds = fields.size("num_hidden_layers"), fields.values.get("layer_types")
    if kinds is None:
        pattern = fields.size("sliding_window_pattern", fields.size("_sliding_window_pattern", 6))
        return [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        wanted = f"want {_FULL} or {_SLIDING} for each of {num_layers} layers"
        raise ValueError(f"{fields.where}: layer_types = {str(kinds)[:200]} is not supported: {wanted}")
    return kinds


def _base(fields: JsonFields, kind: str, key: str, default: float) -> float:
    """The rotary base of a kind of layers: as transformers 5 has it (`rope_parameters` by kind) or 4."""
    by_kind = fields.inside("rope_parameters")
    if kind in by_kind.values:
        rope = by_kind.inside(kind)
        rope.expect({"rope_type": ("default",), "type": ("default",)})
        rope.expect_no_others(_ROPE_KEYS)
        return rope.number("rope_theta", default)
    by_kind.expect_no_others((_FULL, _SLIDING))
    return fields.number(key, default)


def _write(config: ModelConfig) -> dict[str, Any]:
    """The same back, for both versions of transformers."""
    windows = config.windows or (0,) * config.num_layers
    kinds = [_SLIDING if window else _FULL for window in windows]
    thetas = config.rope_thetas or (config.rope_theta,) * config.num_layers
    found = {kind: {theta for theta, each in zip(thetas, kinds, strict=True) if each == kind} for kind in set(kinds)}
    if len(set(windows) - {0}) > 1 or any(len(bases) > 1 for bases in found.values()):
        raise ValueError(
            f"model.windows={windows}, model.rope_thetas={thetas}: Gemma 3 has one window and a base by kind"
        )
    bases = {_FULL: config.rope_theta, _SLIDING: 10_000.0} | {kind: min(values) for kind, values in found.items()}
    return {
        "hidden_activation": _ACTIVATIONS[0],
        "attention_bias": False,
        "query_pre_attn_scalar": _whole(config.query_pre_attn_scalar or config.head_dim),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": max(windows) or 4096,
        "layer_types": kinds,
        "rope_theta": bases[_FULL],  # transformers 4
        "rope_local_base_freq": bases[_SLIDING],  # transformers 4
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
    }


def _whole(number: float) -> float | int:
    """An integer where it is one: transformers takes no other."""
    return int(number) if number == int(number) else number


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    layer_tensors=llama.LAYER_TENSORS
    | {
        "post_attention_layernorm.weight": ("attention_post_norm", "scale"),
        "pre_feedforward_layernorm.weight": ("mlp_norm", "scale"),
        "post_feedforward_layernorm.weight": ("mlp_post_norm", "scale"),
        "self_attn.q_norm.weight": ("query_norm", "scale"),
        "self_attn.k_norm.weight": ("key_norm", "scale"),
    },
    defaults={
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    expected={
        "hidden_activation": _ACTIVATIONS,
        "hidden_act": _ACTIVATIONS,
        "attention_bias": (False, None),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
        "rope_scaling": (None,),
        "partial_rotary_factor": (None, 1, 1.0),
        "quantization_config": (None,),
    },
    options=_OPTIONS,
    free=("rope_thetas", "windows", "query_pre_attn_scalar"),
    read=_read,
    write=_write,
)
