"""DeBERTa's disentangled attention: what relative positions add to the scores (He et al. 2021, section 3.1).

Distances are counted one by one when near and in buckets of growing width when far; every bucket has a vector, which
the layer's own query and key projections turn into a query and a key.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TERMS = 3  # content to content, content to position, position to content: scores are divided by sqrt(3 head_dim)


@dataclasses.dataclass(frozen=True, eq=False)
class RelativeTerms:
    """Queries and keys of the relative positions that occur, and which one a pair of tokens has."""

    query_RNH: Float[Array, "R N H"]
    key_RNH: Float[Array, "R N H"]
    index_TS: Int[np.ndarray, "T S"]

    def scores(self, q_NTH: Float[Array, "N T H"], k_NSH: Float[Array, "N S H"]) -> Float[Array, "N T S"]:
        """Content to position plus position to content, float32; queries and keys come scaled."""
        to_position_NTR = jnp.einsum("nth,rnh->ntr", q_NTH, self.key_RNH, preferred_element_type=jnp.float32)
        to_content_NSR = jnp.einsum("nsh,rnh->nsr", k_NSH, self.query_RNH, preferred_element_type=jnp.float32)
        to_position_NTS = jnp.take_along_axis(to_position_NTR, self.index_TS[None], axis=2)
        to_content_NST = jnp.take_along_axis(to_content_NSR, self.index_TS.T[None], axis=2)
        return to_position_NTS + jax.lax.transpose(to_content_NST, (0, 2, 1))


@functools.lru_cache(maxsize=64)
def rows_of(length: int, buckets: int, reach: int) -> tuple[int, Int[np.ndarray, "T S"]]:
    """The first row of the table (2 buckets rows) that occurs in a row of tokens, and each pair's row behind it."""
    at_T = np.arange(length)
    bucket_TS = _buckets(at_T[:, None] - at_T, buckets, reach)
    row_TS = np.clip(bucket_TS + buckets, 0, 2 * buckets - 1)
    return int(row_TS.min()), (row_TS - row_TS.min()).astype(np.int32)


def _buckets(distance: np.ndarray, buckets: int, reach: int) -> np.ndarray:
    """Distances as signed buckets: themselves up to half of the buckets, from there on by logarithm up to `reach`.

    In float32, as the published models were trained: a distance at the edge of two buckets goes where it went there.
    """
    near = buckets // 2
    far = np.where(abs(distance) < near, near - 1, abs(distance)).astype(np.float32)
    steps = np.log(far / np.float32(near)) / np.log(np.float32((reach - 1) / near)) * np.float32(near - 1)
    bucket = np.where(far <= near, distance, (np.ceil(steps) + near) * np.sign(distance))
    return bucket.astype(np.int64)
