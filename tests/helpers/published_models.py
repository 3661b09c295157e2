"""config.json of models as published, but for sizes: of an original context of 8192 in 131,072 here 32 in 512."""

import tiny_runs

VOCAB_SIZE = tiny_runs.tokenizer().vocab_size
_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
}
PUBLISHED = {
    "llama": _COMMON  # Llama-3.1-8B
    | _LLAMA
    | {
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
    },
    "qwen2": _COMMON  # Qwen2.5-0.5B
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": _COMMON  # Qwen3-0.6B
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "olmo2": _COMMON  # OLMo-2-0425-1B
    | {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "model_type": "olmo2",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "smollm3": _COMMON  # SmolLM3-3B
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_types": ["full_attention"] * 4,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "num_hidden_layers": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "gemma3_text": _COMMON  # gemma-3-1b-pt, whose tie_word_embeddings is absent
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 12,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "intermediate_size": 48,
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 16,  # as in the 27B, not the width of a head
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 8,
        "sliding_window_pattern": 6,
    },
}
# More models of the same families, read alike.
RELATED = {
    "Llama-2-7b": _COMMON | _LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "Llama-3.2-1B": PUBLISHED["llama"]
    | {"tie_word_embeddings": True, "rope_scaling": PUBLISHED["llama"]["rope_scaling"] | {"factor": 32.0}},
    "SmolLM2-135M": _COMMON
    | _LLAMA
    | {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 72,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "SmolLM2-1.7B, SafeLM-1.7B": _COMMON
    | _LLAMA
    | {"num_key_value_heads": 4, "rope_theta": 130000, "tie_word_embeddings": True},
}
