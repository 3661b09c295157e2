"""The protocol of a measurement: everything that decides its numbers, frozen and stored beside them."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What was asked of which model, how it decoded, who judged. Two results compare if only `model` fields differ."""

    suite: str
    prompts_sha256: str
    num_prompts: int
    judge_version: str
    checkpoint_sha256: str
    vocab_hash: str
    validation: str  # which token store perplexity is taken on ("" = none) and its checksum
    method: str  # "" for what needs no decoding
    method_settings: dict[str, Any]
    max_new_tokens: int
    seed: int

    @property
    def hash(self) -> str:
        """SHA-256 of all fields: a stored result is used again only if this is equal."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def hash_params(params: Any) -> str:
    """SHA-256 over the names, shapes, types and bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
