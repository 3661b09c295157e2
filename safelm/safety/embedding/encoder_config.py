"""The sizes and numerics of an encoder, read from a Hugging Face `config.json`.

| model_type | models | what is special |
|---|---|---|
| bert | BERT, MiniLM, E5, arctic-embed xs to l, BGE | learned absolute positions |
| roberta, xlm-roberta, camembert | multilingual E5, arctic-embed-l-v2.0 | positions begin behind the padding id |
| deberta-v2 | DeBERTa v2 and v3, mDeBERTa | positions only relative, in logarithmic buckets, in every attention |
| modernbert | ModernBERT, mmBERT | rotary, windows in most layers, norms before, gated MLP, no biases |
| new, gte | GTE v1.5, gte-multilingual, arctic-embed-m-v2.0 | rotary positions, packed qkv, gated MLP |

Not supported: nomic_bert (arctic-embed-m-long), mpnet, distilbert, electra, deberta (the first version).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safelm.formats import families, huggingface
from safelm.formats.json_fields import JsonFields, read_json

CLS_TYPES = ("new", "gte")  # models whose embedding is the first token's, where no file says otherwise
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and numerics of a bidirectional encoder.

    Attributes:
      type_vocab_size: rows of the token-type table, of which only row 0 is used; 0 for no table.
      position_offset: index of the first token's row in the table of positions.
      rope_theta: base of the rotary positions; None for other positions.
      rope_factor, rope_mixed_b: NTK scaling of the rotary frequencies, fixed or mixed; factor 1 for none.
      windows: of each layer how far its tokens see to either side, 0 for the whole row; empty where all do.
      window_rope_theta: base of the rotary positions in layers with a window.
      relative_buckets: buckets to either side of DeBERTa's relative positions; 0 for none.
      relative_reach: distance at which those buckets end.
      is_gated: whether the MLP is gated, without a bias before the gate, as in GTE v1.5.
      norms_first: whether norms stand before attention and MLP instead of behind each sum; the first layer's attention
        then has none, since the embeddings are normalised.
      has_final_norm: whether there is a norm behind the last layer.
      has_biases: whether linear layers and norms have biases.
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
    windows: tuple[int, ...] = ()
    window_rope_theta: float | None = None
    relative_buckets: int = 0
    relative_reach: int = 0
    is_gated: bool = False
    norms_first: bool = False
    has_final_norm: bool = False
    has_biases: bool = True
    dtype: str = "float32"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def has_position_table(self) -> bool:
        """Whether learned positions are added to the embeddings."""
        return self.rope_theta is None and not self.relative_buckets

    @property
    def max_tokens(self) -> int:
        """The longest row that has positions."""
        return self.max_positions - self.position_offset

    def first_layers(self, count: int) -> "EncoderConfig":
        """The same up to a layer that isn't the last: without the final norm."""
        return dataclasses.replace(self, num_layers=count, has_final_norm=False)


@dataclasses.dataclass(frozen=True)
class _Family:
    """How the config of some model types is read.

    Attributes:
      expected: what the encoder can represent; a key that is absent or null has the first value.
      read: further fields of `EncoderConfig`.
      activation, norm_eps: names of these keys.
    """

    expected: Mapping[str, tuple[Any, ...]]
    read: Callable[[JsonFields], dict[str, Any]]
    activation: str = "hidden_act"
    norm_eps: str = "layer_norm_eps"


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
    if kind not in FAMILIES:
        known = ", ".join((*FAMILIES, *families.FAMILIES))
        raise ValueError(f"{path}: model_type = {kind!r} is not an embedding model known here ({known})")
    family = FAMILIES[kind]
    fields = JsonFields(str(path), values)
    fields.expect(family.expected)
    activation = values.get(family.activation, "gelu")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{path}: {family.activation} = {activation!r} is not supported (one of {known})")
    config = EncoderConfig(
        vocab_size=fields.size("vocab_size"),
        num_layers=fields.size("num_hidden_layers"),
        d_model=fields.size("hidden_size"),
        d_ff=fields.size("intermediate_size"),
        num_heads=fields.size("num_attention_heads"),
        max_positions=fields.size("max_position_embeddings"),
        norm_eps=fields.number(family.norm_eps, 1e-12),
        activation=activation,
        **family.read(fields),
    )
    if config.d_model % config.num_heads:
        raise ValueError(f"{path}: hidden_size = {config.d_model} is not a multiple of {config.num_heads} heads")
    return config


def _bert(fields: JsonFields) -> dict[str, Any]:
    return {"type_vocab_size": fields.size("type_vocab_size", least=0)}


def _roberta(fields: JsonFields) -> dict[str, Any]:
    return _bert(fields) | {"position_offset": fields.size("pad_token_id", 1, least=0) + 1}


def _gte(fields: JsonFields) -> dict[str, Any]:
    scaling = fields.values.get("rope_scaling")
    found = _bert(fields) | {"rope_theta": fields.number("rope_theta", 10_000.0), "is_gated": True}
    if scaling is None:
        return found
    is_ntk = isinstance(scaling, dict) and scaling.get("type", scaling.get("rope_type")) == "ntk"
    if not is_ntk or not isinstance(scaling.get("factor"), int | float):
        raise ValueError(f"{fields.where}: rope_scaling = {scaling!r} is not supported (type ntk with a factor is)")
    return found | {"rope_factor": float(scaling["factor"]), "rope_mixed_b": scaling.get("mixed_b")}


def _deberta(fields: JsonFields) -> dict[str, Any]:
    terms = fields.values.get("pos_att_type") or ()
    if set(terms.split("|") if isinstance(terms, str) else terms) != {"c2p", "p2c"}:
        raise ValueError(f"{fields.where}: pos_att_type = {terms!r} is not supported; it must be c2p and p2c")
    reach = fields.values.get("max_relative_positions", -1)
    has_reach = isinstance(reach, int) and reach > 0
    return {
        "type_vocab_size": fields.size("type_vocab_size", 0, least=0),
        "relative_buckets": fields.size("position_buckets", least=4),
        "relative_reach": fields.size("max_relative_positions" if has_reach else "max_position_embeddings"),
    }


def _modernbert(fields: JsonFields) -> dict[str, Any]:
    layers, every = fields.size("num_hidden_layers"), fields.size("global_attn_every_n_layers", 3)
    reach = fields.size("local_attention", 128) // 2
    kinds = fields.values.get("layer_types")  # of transformers 5; before, every so many layers see the whole row
    if kinds is None:
        kinds = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"{fields.where}: layer_types = {kinds!r}: want {layers} of full_ or sliding_attention")
    ropes = fields.inside("rope_parameters")
    whole, window = ropes.inside("full_attention"), ropes.inside("sliding_attention")
    for rope in (fields.inside("rope_scaling"), whole, window):
        rope.expect({"rope_type": ("default",), "type": ("default",)})
    theta = whole.number("rope_theta", fields.number("global_rope_theta", 160_000.0))
    local = fields.values.get("local_rope_theta", 10_000.0) or theta
    return {
        "type_vocab_size": 0,
        "rope_theta": theta,
        "window_rope_theta": window.number("rope_theta", local),
        "windows": tuple(reach if kind == "sliding_attention" else 0 for kind in kinds),
        "is_gated": True,
        "norms_first": True,
        "has_final_norm": True,
        "has_biases": False,
    }


_NO_DECODER = {"is_decoder": (False,), "add_cross_attention": (False,)}
_SUPPORTED_BERT = {"position_embedding_type": ("absolute",), "embedding_size": (None,), **_NO_DECODER}
_SUPPORTED_DEBERTA = {
    "relative_attention": (True,),
    "share_att_key": (True,),
    "norm_rel_ebd": ("layer_norm",),
    "position_biased_input": (False,),
    "conv_kernel_size": (0, None),
    "embedding_size": (None,),
    "attention_head_size": (None,),
    **_NO_DECODER,
}
_SUPPORTED_MODERNBERT = {"attention_bias": (False,), "mlp_bias": (False,), "norm_bias": (False,)}
_SUPPORTED_GTE = {
    "position_embedding_type": ("rope",),
    "layer_norm_type": ("layer_norm",),
    "logn_attention_scale": (False,),
    "pack_qkv": (True,),
    "embedding_size": (None,),
}
_ROBERTA = _Family(_SUPPORTED_BERT, _roberta)
_GTE = _Family(_SUPPORTED_GTE, _gte)
FAMILIES: dict[str, _Family] = {
    "bert": _Family(_SUPPORTED_BERT, _bert),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "deberta-v2": _Family(_SUPPORTED_DEBERTA, _deberta),
    "modernbert": _Family(_SUPPORTED_MODERNBERT, _modernbert, "hidden_activation", "norm_eps"),
    "new": _GTE,
    "gte": _GTE,
}
