"""A language model of ours that judges or writes: reading it, and one hash over what its answers depend on."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from safelm.formats.sources import Model, read_model
from safelm.models import decoder as model
from safelm.safety.embedding import installed_path
from safelm.text.tokenizer import Tokenizer


def read_engine_model(source: str, dtype: str, *, where: str) -> tuple[str, Model]:
    """The path or URL of a model, and the model.

    Args:
      source: a checkpoint of ours, a Hugging Face folder, a GGUF file, or "smollm2" (installed weights).
      dtype: of the computation, float32 or bfloat16; the model's own when empty.
      where: who asks, for messages.

    Raises FileNotFoundError if it isn't there, ValueError for a model or a dtype that can't be.
    """
    if dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"{where}: dtype={dtype!r}: one of float32, bfloat16")
    place = str(installed_path(source)) if source == "smollm2" else source
    config, params, tokenizer = read_model(place)
    return place, (dataclasses.replace(config, dtype=dtype or config.dtype), params, tokenizer)


def model_fingerprint(
    config: model.ModelConfig, params: model.Params, tokenizer: Tokenizer, *, text: str, settings: Mapping[str, Any]
) -> str:
    """sha256 (hex) over weights, vocabulary, config, a text (such as a prompt's frame) and settings."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for part in (repr(config), tokenizer.hash, text):
        digest.update(part.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
