"""The sizes and numerics of an encoder, read from a Hugging Face `config.json`.

| model_type | models | what is special |
|---|---|---|
| bert | BERT, MiniLM, E5, arctic-embed xs to l, BGE | learned absolute positions |
| roberta, xlm-roberta, camembert | multilingual E5, arctic-embed-l-v2.0 | positions begin behind the padding id |
| new, gte | GTE v1.5, gte-multilingual, arctic-embed-m-v2.0 | rotary positions, packed qkv, gated MLP |

Not supported: nomic_bert (arctic-embed-m-long), modernbert, mpnet, distilbert, deberta.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safelm.formats import families, huggingface
from safelm.formats.json_fields import JsonFields, read_json

BERT_TYPES = ("bert",)
ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert")
GTE_TYPES = ("new", "gte")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
_POOLING_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
# What the encoder can represent; a key that is absent or null has the first value.
_SUPPORTED_BERT: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "embedding_size": (None,),
}
_SUPPORTED_GTE: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "layer_norm_type": ("layer_norm",),
    "logn_attention_scale": (False,),
    "pack_qkv": (True,),
    "embedding_size": (None,),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and numerics of a bidirectional encoder with normalisation behind each residual sum.

    Attributes:
      type_vocab_size: rows of the token-type table, of which only row 0 is used; 0 for no table.
      position_offset: index of the first token's row in the table of positions.
      rope_theta: base of the rotary positions; None for a learned table of positions.
      rope_factor, rope_mixed_b: NTK scaling of the rotary frequencies, fixed or mixed; factor 1 for none.
      is_gated: whether the MLP is gated, without a bias before the gate, as in GTE v1.5.
      dtype: of the computation; norms and softmax are always float32.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    max_positions: int
    type_vocab_size: int = 2
    position_offset: int = 0
    norm_eps: float = 1e-12
    activation: str = "gelu"
    rope_theta: float | None = None
    rope_factor: float = 1.0
    rope_mixed_b: float | None = None
    is_gated: bool = False
    dtype: str = "float32"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def max_tokens(self) -> int:
        """The longest row that has positions."""
        return self.max_positions - self.position_offset


def model_type(folder: Path) -> str | None:
    """The `model_type` that a folder's config.json names."""
    return read_json(folder / huggingface.CONFIG_FILE).get("model_type")


def read_config(folder: Path) -> EncoderConfig:
    """Reads the config of the encoder in a Hugging Face folder.

    Raises:
      ValueError: config.json is not JSON, lacks a size, or has an unsupported model type or feature; the message names
        the key and its value.
    """
    path = folder / huggingface.CONFIG_FILE
    values = read_json(path)
    kind = values.get("model_type")
    if kind not in BERT_TYPES + ROBERTA_TYPES + GTE_TYPES:
        known = ", ".join((*BERT_TYPES, *ROBERTA_TYPES, *GTE_TYPES, *families.FAMILIES))
        raise ValueError(f"{path}: model_type = {kind!r} is not an embedding model known here ({known})")
    is_gte = kind in GTE_TYPES
    fields = JsonFields(str(path), values)
    fields.expect(_SUPPORTED_GTE if is_gte else _SUPPORTED_BERT)
    activation = values.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act = {activation!r} is not supported (one of {', '.join(ACTIVATIONS)})")
    config = EncoderConfig(
        vocab_size=fields.size("vocab_size"),
        num_layers=fields.size("num_hidden_layers"),
        d_model=fields.size("hidden_size"),
        d_ff=fields.size("intermediate_size"),
        num_heads=fields.size("num_attention_heads"),
        max_positions=fields.size("max_position_embeddings"),
        type_vocab_size=fields.size("type_vocab_size", least=0),
        position_offset=fields.size("pad_token_id", 1, least=0) + 1 if kind in ROBERTA_TYPES else 0,
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        activation=activation,
        **(_rope(path, values) | {"is_gated": True} if is_gte else {}),
    )
    if config.d_model % config.num_heads:
        raise ValueError(f"{path}: hidden_size = {config.d_model} is not a multiple of {config.num_heads} heads")
    return config


def read_modules(folder: Path) -> dict[str, Any]:
    """Reads sentence-transformers' files: "pooling", "normalize" and "max_tokens", as far as the folder has them.

    Raises ValueError for an unknown pooling or module (such as a Dense layer).
    """
    found: dict[str, Any] = {}
    modules_file = folder / "modules.json"
    pooling_folder = "1_Pooling"
    if modules_file.exists():
        types = {str(entry["type"]).rsplit(".", 1)[-1]: entry["path"] for entry in _read_modules(modules_file)}
        if unknown := sorted(set(types) - {"Transformer", "Pooling", "Normalize"}):
            raise ValueError(f"{modules_file}: module {unknown[0]} is not supported")
        found["normalize"] = "Normalize" in types
        pooling_folder = types.get("Pooling", pooling_folder)
    pooling_file = folder / pooling_folder / "config.json"
    if pooling_file.exists():
        values = read_json(pooling_file)
        modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        if len(modes) != 1 or modes[0] not in _POOLING_MODES:
            raise ValueError(f"{pooling_file}: {', '.join(modes) or 'no pooling'} is not supported")
        found["pooling"] = _POOLING_MODES[modes[0]]
    limits_file = folder / "sentence_bert_config.json"
    if limits_file.exists() and isinstance(limit := read_json(limits_file).get("max_seq_length"), int):
        found["max_tokens"] = limit
    return found


def _read_modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(modules, list) or not all(isinstance(m, dict) and {"type", "path"} <= m.keys() for m in modules):
        raise ValueError(f"{path}: not a list of modules, each with a type and a path")
    return modules


def _rope(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    scaling = values.get("rope_scaling")
    theta = {"rope_theta": JsonFields(str(path), values).number("rope_theta", 10_000.0)}
    if scaling is None:
        return theta
    is_ntk = isinstance(scaling, dict) and scaling.get("type", scaling.get("rope_type")) == "ntk"
    if not is_ntk or not isinstance(scaling.get("factor"), int | float):
        raise ValueError(f"{path}: rope_scaling = {scaling!r} is not supported (type ntk with a factor is)")
    return theta | {"rope_factor": float(scaling["factor"]), "rope_mixed_b": scaling.get("mixed_b")}
