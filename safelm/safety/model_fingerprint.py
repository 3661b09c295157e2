"""A hash of a model and everything else that its answers depend on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from safelm.models.arrays import Params


def model_fingerprint(
    config: Any, params: Params, vocabulary_hash: str, *, text: str = "", settings: Mapping[str, Any]
) -> str:
    """SHA-256 (hex) over weights, vocabulary, config, a text (such as a prompt's frame) and settings."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for part in (repr(config), vocabulary_hash, text):
        digest.update(part.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
