"""OLMo 2: norms behind attention and MLP, and RMSNorms over all queries and all keys of a token together."""

from safelm.formats.families import llama
from safelm.formats.family import Family

_OPTIONS = {"norms": "after", "qk_norm": True, "qk_norm_width": True}

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    layer_tensors={name: place for name, place in llama.LAYER_TENSORS.items() if "layernorm" not in name}
    | {
        "post_attention_layernorm.weight": ("attention_norm", "scale"),
        "post_feedforward_layernorm.weight": ("mlp_norm", "scale"),
        "self_attn.q_norm.weight": ("query_norm", "scale"),
        "self_attn.k_norm.weight": ("key_norm", "scale"),
    },
    defaults={"rms_norm_eps": 1e-5},
    expected=llama.EXPECTED | {"clip_qkv": (None,)},
    options=_OPTIONS,
    free=("rope_scaling",),
    read=lambda fields: llama.read(fields) | _OPTIONS,
    write=llama.write,
)
