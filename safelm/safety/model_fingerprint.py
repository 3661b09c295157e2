"""One hash over a model with everything that its answers depend on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from safelm.models import decoder as model
from safelm.models.config import ModelConfig
from safelm.text.tokenizer import Tokenizer


def model_fingerprint(
    config: ModelConfig, params: model.Params, tokenizer: Tokenizer, *, text: str, settings: Mapping[str, Any]
) -> str:
    """sha256 (hex) over weights, vocabulary, config, a text (such as a prompt's frame) and settings."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for part in (repr(config), tokenizer.hash, text):
        digest.update(part.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
