"""The pseudo-random order of rows: a 63-bit key by seed, file and row number alone.

Neither the number of workers, nor how files are cut into shards, nor their order or place changes a key. A file counts
by its name, size and content (`documents.describe`), so a moved copy has the same keys.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from safelm.io.hashed import mixed

KEY_BITS = 63
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def file_base(seed: int, facts: Mapping[str, Any]) -> int:
    """What the keys of a file's rows begin from; `facts` as `documents.without_place` gives them."""
    text = json.dumps([seed, dict(facts)], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"safelm select").digest(), "little")


def row_keys(base: int, rows: Int64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """The keys of rows by their numbers in a file, uniform in [0, 2^63)."""
    return mixed(rows.astype(np.uint64) * _GOLDEN + np.uint64(base)) >> np.uint64(1)


def second_keys(keys: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """Keys that are independent of the first ones, to draw again among rows that those chose."""
    return mixed(keys ^ np.uint64(0xD1B54A32D192ED03)) >> np.uint64(1)
