"""Short chunks of text packed into rows of one length: next to no padding, one compiled program for all lengths."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.data.packing import best_fit

LEAST_TOKENS = 8  # a shorter chunk takes as much room, so that a row has at most its length / 8 chunks


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of several chunks each.

    Attributes:
      values: token ids [B, T], or what stands for them [B, T, D].
      segments_BT: which of the row's chunks a token is of, from 1; 0 is padding.
      positions_BT: of a token in its chunk, from 0.
      chunk_BS: the index of each of a row's chunks; -1 where the row has fewer.
    """

    values: np.ndarray
    segments_BT: Int[np.ndarray, "B T"]
    positions_BT: Int[np.ndarray, "B T"]
    chunk_BS: Int[np.ndarray, "B S"]


def plan(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which chunks share a row: longest first, each into the fullest row that has room."""
    room_N = np.maximum(np.asarray(lengths, np.int64), min(LEAST_TOKENS, row_tokens))
    row_N, count = best_fit(room_N, row_tokens)
    rows: list[list[int]] = [[] for _ in range(count)]
    for chunk, row in enumerate(row_N.tolist()):
        rows[row].append(chunk)
    return rows


def filled(rows: Sequence[Sequence[int]], row_tokens: int, count: int, value_of: Callable[[int], np.ndarray]) -> Rows:
    """Rows with their chunks' values, and empty ones up to `count`.

    Args:
      value_of: the values of a chunk by its index: ids [tokens] or states [tokens, D].
    """
    segments_BT = np.zeros((count, row_tokens), np.int32)
    positions_BT = np.zeros((count, row_tokens), np.int32)
    chunk_BS = np.full((count, max(row_tokens // LEAST_TOKENS, 1)), -1, np.int32)
    first = value_of(rows[0][0])
    values = np.zeros((count, row_tokens, *first.shape[1:]), first.dtype)
    for b, chunks in enumerate(rows):
        at = 0
        for s, chunk in enumerate(chunks):
            value = value_of(chunk)
            here = slice(at, at + len(value))
            values[b, here], segments_BT[b, here], positions_BT[b, here] = value, s + 1, np.arange(len(value))
            chunk_BS[b, s] = chunk
            at += len(value)
    return Rows(values, segments_BT, positions_BT, chunk_BS)


def pool(kind: str, x_BTD: Float[Array, "B T D"], segments_BT: Int[Array, "B T"], count: int) -> Float[Array, "B S E"]:
    """`pooling.pool` of each of a row's `count` chunks; zeros where it has fewer."""
    if kind == "mean_last":
        parts = [pool(part, x_BTD, segments_BT, count) for part in ("mean", "last")]
        return jnp.concatenate(parts, axis=-1)
    x_BTD = x_BTD.astype(jnp.float32)
    is_of_BST = segments_BT[:, None] == jnp.arange(1, count + 1)[:, None]
    if kind == "max":
        largest_BSD = jax.lax.map(
            lambda row: jnp.where(row[0][..., None], row[1], -jnp.inf).max(axis=1), (is_of_BST, x_BTD)
        )
        return jnp.where(is_of_BST.any(axis=2)[..., None], largest_BSD, 0)
    if kind == "cls":
        is_of_BST &= is_of_BST.cumsum(axis=2) == 1
    elif kind == "last":
        is_of_BST &= is_of_BST.cumsum(axis=2) == is_of_BST.sum(axis=2, keepdims=True)
    weight_BST = is_of_BST / jnp.maximum(is_of_BST.sum(axis=2, keepdims=True), 1)
    return jnp.einsum("bst,btd->bsd", weight_BST.astype(jnp.float32), x_BTD)
