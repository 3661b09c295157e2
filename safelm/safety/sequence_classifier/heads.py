"""The classification heads that stand on encoders: their tensors by published name, and what they compute.

| model_type | the token vectors become | then |
|---|---|---|
| bert, new, gte | the first one | dense, tanh, linear |
| roberta, xlm-roberta, camembert | the first one | dense, tanh, linear |
| deberta-v2 | the first one | dense, `pooler_hidden_act`, linear |
| modernbert | the first one or the mean (`classifier_pooling`) | dense, `classifier_activation`, norm, linear |
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from safelm.formats import huggingface
from safelm.formats.json_fields import JsonFields, read_json
from safelm.safety.embedding.encoder import ACTIVATIONS

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Form:
    """Where a model type's head is found and how it differs.

    Attributes:
      architecture: what `architectures` in config.json says of a sequence classifier of this type.
      dense, out: names of the two linear layers; norm: of the norm between them.
      activation: between them, and the config's key that changes it.
      has_dense_bias: False where the config's `classifier_bias` says whether it has one.
    """

    architecture: str
    dense: str
    out: str = "classifier"
    activation: str = "tanh"
    activation_key: str = ""
    norm: str = ""
    has_dense_bias: bool = True


_ROBERTA = {"dense": "classifier.dense", "out": "classifier.out_proj"}
_FORMS = {
    "bert": _Form("BertForSequenceClassification", "bert.pooler.dense"),
    "roberta": _Form("RobertaForSequenceClassification", **_ROBERTA),
    "xlm-roberta": _Form("XLMRobertaForSequenceClassification", **_ROBERTA),
    "camembert": _Form("CamembertForSequenceClassification", **_ROBERTA),
    "deberta-v2": _Form(
        "DebertaV2ForSequenceClassification", "pooler.dense", activation="gelu", activation_key="pooler_hidden_act"
    ),
    "modernbert": _Form(
        "ModernBertForSequenceClassification",
        "head.dense",
        activation="gelu",
        activation_key="classifier_activation",
        norm="head.norm",
        has_dense_bias=False,
    ),
    "new": _Form("NewForSequenceClassification", "new.pooler.dense"),
    "gte": _Form("GteForSequenceClassification", "new.pooler.dense"),
}
_ACTIVATIONS = ACTIVATIONS | {"tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True)
class Head:
    """What turns a pooled vector into logits.

    Attributes:
      pooling: of token vectors, "cls" or "mean".
      activation: a key of the encoder's activations, or "tanh".
      norm_eps: of the norm, where `params` has one.
    """

    pooling: str
    activation: str
    norm_eps: float

    def logits(self, params: Params, x_BD: Float[Array, "B D"]) -> Float[Array, "B L"]:
        """Logits in float32, of pooled vectors. Pure; the same object is the same function."""
        h_BD = _ACTIVATIONS[self.activation](x_BD @ params["dense"] + params["dense_bias"])
        if "norm_scale" in params:
            centred = h_BD - h_BD.mean(axis=-1, keepdims=True)
            variance = jnp.square(centred).mean(axis=-1, keepdims=True)
            h_BD = centred * jax.lax.rsqrt(variance + self.norm_eps) * params["norm_scale"]
        return h_BD @ params["out"] + params["out_bias"]


def check_architecture(folder: Path) -> str:
    """The model type of a folder. Raises ValueError, naming the field, for one that is no sequence classifier here."""
    path = folder / huggingface.CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {huggingface.CONFIG_FILE}: not a Hugging Face folder")
    values = read_json(path)
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    if kind not in _FORMS:
        raise ValueError(f"{path}: model_type = {kind!r} is no sequence classifier known here ({', '.join(_FORMS)})")
    wanted = {_FORMS[kind].architecture, *(["NewForSequenceClassification"] if kind == "gte" else [])}
    if architectures and not wanted & set(architectures):
        raise ValueError(f"{path}: architectures = {architectures!r}: want {_FORMS[kind].architecture}")
    return kind


def read_head(folder: Path, d_model: int) -> tuple[Head, Params, int]:
    """The head of a folder, its parameters (numpy, float32) and the number of its labels.

    Raises ValueError for a missing tensor, one of another shape, or an activation or pooling that isn't known.
    """
    form = _FORMS[check_architecture(folder)]
    fields = JsonFields(str(folder / huggingface.CONFIG_FILE), read_json(folder / huggingface.CONFIG_FILE))
    activation = fields.values.get(form.activation_key) or form.activation
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{fields.where}: {form.activation_key} = {activation!r} is not supported (one of {known})")
    pooling = fields.values.get("classifier_pooling") or "cls" if form.norm else "cls"
    if pooling not in ("cls", "mean"):
        raise ValueError(f"{fields.where}: classifier_pooling = {pooling!r} is not supported (one of cls, mean)")
    files = huggingface.tensor_files(folder)

    def read(name: str, *shape: int | None) -> np.ndarray:
        if name not in files:
            raise ValueError(f"{folder}: tensor {name} is missing: not a sequence classifier's weights")
        tensor = huggingface.read_tensor(files[name], name)
        if len(tensor.shape) != len(shape) or any(w not in (None, f) for w, f in zip(shape, tensor.shape, strict=True)):
            raise ValueError(f"{folder}: tensor {name} has shape {tensor.shape}, the config asks for {shape}")
        return tensor

    out = read(f"{form.out}.weight", None, d_model)
    has_dense_bias = form.has_dense_bias or fields.flag("classifier_bias", False)
    params: Params = {
        "dense": np.ascontiguousarray(read(f"{form.dense}.weight", d_model, d_model).T),
        "dense_bias": read(f"{form.dense}.bias", d_model) if has_dense_bias else np.zeros(d_model, np.float32),
        "out": np.ascontiguousarray(out.T),
        "out_bias": read(f"{form.out}.bias", len(out)),
    }
    if form.norm:
        params["norm_scale"] = read(f"{form.norm}.weight", d_model)
    return Head(pooling, activation, fields.number("norm_eps", 1e-5)), params, len(out)
