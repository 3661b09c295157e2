"""The cutoffs in the order of keys that meet a budget of tokens, cell by cell, in memory that rows don't fill.

A cell is one combination of the strata's values. Of the budget it gets the share that it has of its group's tokens,
rounded down (a group is a value of the mix; without a mix all cells are one). From a cell the rows with the lowest keys
are taken as long as their tokens fit. What is left of the group's budget goes to the cells' next rows, in the order of
keys, to each that still fits. So no group passes its budget, and it falls short by less than one row.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt64

from safelm.selection.keys import KEY_BITS

ALL = np.uint64(1 << KEY_BITS)
_BUCKET_BITS = 10

Draws = tuple[Int[np.ndarray, " N"], UInt64[np.ndarray, " N"], Int[np.ndarray, " N"]]  # cells, keys, tokens of rows


@dataclasses.dataclass
class Drawn:
    """What is taken of each cell.

    Attributes:
      limit_C: a row is taken if its key is below its cell's.
      tokens_C: how many tokens that are.
    """

    limit_C: UInt64[np.ndarray, " C"]
    tokens_C: Int[np.ndarray, " C"]


def tokens_by_bucket(draws: Iterator[Draws], cells: int) -> Int[np.ndarray, "C K"]:
    """The tokens of each cell, by the first bits of the rows' keys."""
    found_CK = np.zeros((cells, 1 << _BUCKET_BITS), np.int64)
    for cell_N, key_N, tokens_N in draws:
        np.add.at(found_CK, (cell_N, _bucket(key_N)), tokens_N)
    return found_CK


def draw(
    rows: Callable[[], Iterator[Draws]],
    tokens_CK: Int[np.ndarray, "C K"],
    group_C: Sequence[int],
    budgets: Mapping[int, int],
) -> Drawn:
    """Draws rows for a budget.

    Args:
      rows: gives all rows, in any order and parts.
      tokens_CK: what `tokens_by_bucket` gave for them.
      group_C: the group of each cell.
      budgets: tokens by group, no more than the group has.
    """
    quota_C = np.array(quotas(tokens_CK.sum(axis=1).tolist(), group_C, budgets), np.int64)
    cumulated_CK = np.cumsum(tokens_CK, axis=1)
    crosses_CK = cumulated_CK > quota_C[:, None]
    is_whole_C = ~crosses_CK[:, -1]
    bucket_C = np.where(is_whole_C, -1, crosses_CK.argmax(axis=1))
    before_C = np.where(bucket_C > 0, cumulated_CK[np.arange(len(bucket_C)), bucket_C - 1], 0)
    drawn = Drawn(np.full(len(quota_C), ALL, np.uint64), np.where(is_whole_C, cumulated_CK[:, -1], before_C))
    waiting = _cut(drawn, _rows_at_cutoff(rows(), bucket_C), quota_C)
    left = {group: budget - _of_group(drawn.tokens_C, group_C, group) for group, budget in budgets.items()}
    for key, cell, tokens in sorted(waiting):
        if tokens <= left.get(group_C[cell], 0):
            left[group_C[cell]] -= tokens
            drawn.limit_C[cell], drawn.tokens_C[cell] = key + 1, drawn.tokens_C[cell] + tokens
    return drawn


def quotas(available: Sequence[int], group_C: Sequence[int], budgets: Mapping[int, int]) -> list[int]:
    """The tokens to take of each cell: its share of the group's budget, rounded down."""
    totals = {group: _of_group(np.array(available, np.int64), group_C, group) for group in budgets}
    return [
        tokens * budgets.get(group, 0) // max(totals.get(group, 0), 1)
        for tokens, group in zip(available, group_C, strict=True)
    ]


def _of_group(tokens_C: Int[np.ndarray, " C"], group_C: Sequence[int], group: int) -> int:
    return int(tokens_C[np.array(group_C, np.int64) == group].sum())


def _rows_at_cutoff(rows: Iterator[Draws], bucket_C: Int[np.ndarray, " C"]) -> Draws:
    """The rows whose bucket is the one in which their cell's quota ends, by cell and key; those of a key are one."""
    found = []
    for cell_N, key_N, tokens_N in rows:
        is_near_N = _bucket(key_N) == bucket_C[cell_N]
        found.append((cell_N[is_near_N], key_N[is_near_N], tokens_N[is_near_N]))
    cell_M, key_M, tokens_M = (np.concatenate(each) for each in zip(*found, strict=True))
    order_M = np.lexsort((key_M, cell_M))
    cell_M, key_M, tokens_M = cell_M[order_M], key_M[order_M], tokens_M[order_M]
    is_new_M = np.ones(len(cell_M), np.bool_)
    is_new_M[1:] = (cell_M[1:] != cell_M[:-1]) | (key_M[1:] != key_M[:-1])
    summed = np.add.reduceat(tokens_M, np.flatnonzero(is_new_M)) if len(tokens_M) else tokens_M
    return cell_M[is_new_M], key_M[is_new_M], summed


def _cut(drawn: Drawn, near: Draws, quota_C: Int[np.ndarray, " C"]) -> list[tuple[int, int, int]]:
    """Takes the rows at the cutoff that fit; (key, cell, tokens) of the first of each cell that does not."""
    waiting = []
    cell_M, key_M, tokens_M = near
    edges = [*np.flatnonzero(np.diff(cell_M, prepend=-1)).tolist(), len(cell_M)]
    for start, stop in itertools.pairwise(edges):
        cell = int(cell_M[start])
        total_R = drawn.tokens_C[cell] + np.cumsum(tokens_M[start:stop])
        taken = int(np.searchsorted(total_R, quota_C[cell], side="right"))
        if taken:
            drawn.tokens_C[cell] = total_R[taken - 1]
        drawn.limit_C[cell] = key_M[start + taken]
        waiting.append((int(key_M[start + taken]), cell, int(tokens_M[start + taken])))
    return waiting


def _bucket(key_N: UInt64[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    return (key_N >> np.uint64(KEY_BITS - _BUCKET_BITS)).astype(np.int64)
