"""SmolLM3: Llama with layers that have no rotary positions, every fourth one by default."""

from typing import Any

from safelm.formats.families import llama
from safelm.formats.family import Family
from safelm.formats.json_fields import JsonFields
from safelm.models.config import ModelConfig


def _read(fields: JsonFields) -> dict[str, Any]:
    llama.check_full_attention(fields)
    rope, num_layers = llama.read(fields, default_theta=2_000_000.0), fields.size("num_hidden_layers")
    has_rope = fields.values.get("no_rope_layers")  # 1: a layer with them, whatever the key's name says
    if has_rope is None:
        interval = fields.size("no_rope_layer_interval", 4)
        has_rope = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    is_right = isinstance(has_rope, list) and all(each in (0, 1) for each in has_rope)
    if not is_right or len(has_rope) < num_layers:
        raise ValueError(f"{fields.where}: no_rope_layers = {str(has_rope)[:200]}: want 0 or 1 for each layer")
    thetas = tuple(rope["rope_theta"] * each for each in has_rope[:num_layers])
    return rope | ({} if all(thetas) else {"rope_thetas": thetas})


def _write(config: ModelConfig) -> dict[str, Any]:
    thetas = config.rope_thetas or (config.rope_theta,) * config.num_layers
    if others := set(thetas) - {0.0, config.rope_theta}:
        raise ValueError(
            f"model.rope_thetas has {max(others)}: SmolLM3 has one base, {config.rope_theta}, and layers without"
        )
    return {
        **llama.write(config),
        "mlp_bias": False,
        "no_rope_layers": [int(theta > 0) for theta in thetas],
        "use_sliding_window": False,
    }


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    layer_tensors=llama.LAYER_TENSORS,
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32_768, "tie_word_embeddings": True},
    expected=llama.EXPECTED_WITHOUT_WINDOW,
    options={},
    free=("rope_scaling", "rope_thetas"),
    read=_read,
    write=_write,
)
