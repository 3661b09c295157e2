"""Divides the rows of every step among sources at fixed rates; each stays within a row of its plan.

Rows are apportioned step by step with the error carried over, by earliest deadline (Tijdeman 1980, the "chairman
assignment"). A source's next row may be given once its plan has begun it and must be given when its plan completes
it; among those begun, the ones due first go first, then those further on. This never misses a deadline, so after every
step each source has had its planned number of rows rounded down or up. All integers: the same on every platform.

Whether a source is ahead at a step depends on the steps before only while its plan grows by less than a row a step. If
every source in the mixture gets a row or more, any step is computed by itself; else one pass over the steps is made.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

_BLOCK_STEPS = 1024


class Apportionment:
    """Rows by source after any number of steps, source i being planned `batch_size * weights[i] / sum(weights)`."""

    def __init__(self, weights: Sequence[int], batch_size: int):
        """Weights are non-negative; their sum times the number of steps asked for must stay below 2^63."""
        rows_N, units = np.array(weights, np.int64) * batch_size, int(sum(weights))
        divisor = int(np.gcd.reduce([units, *rows_N.tolist()]))
        self._rows_N, self._units = rows_N // divisor, units // divisor
        self._whole_N, self._part_N = np.divmod(self._rows_N, self._units)
        self._has_memory = bool(((self._rows_N > 0) & (self._rows_N < self._units)).any())
        self._ahead_KN: Bool[np.ndarray, "K N"] = np.zeros((1, len(weights)), bool)  # after 0, 1, .. steps

    def given(self, start: int, stop: int) -> Int[np.ndarray, "K N"]:
        """Rows of every source in the first `start`, `start` + 1, .. `stop` - 1 steps."""
        steps_K1 = np.arange(start, stop, dtype=np.int64)[:, None]
        return steps_K1 * self._whole_N + steps_K1 * self._part_N // self._units + self._ahead(steps_K1)

    def _ahead(self, steps_K1: Int[np.ndarray, "K 1"]) -> Bool[np.ndarray, "K N"]:
        if not self._has_memory:
            return self._serve(steps_K1 * self._part_N % self._units)
        steps_K1 = steps_K1 % self._units  # the plan is in whole rows after every `_units` steps: it begins anew
        if (needed := int(steps_K1.max(initial=0)) + 1) > len(self._ahead_KN):
            # Half as many again: a run that goes on block by block makes few passes.
            self._ahead_KN = self._one_pass(min(max(needed, len(self._ahead_KN) * 3 // 2), self._units))
        return self._ahead_KN[steps_K1[:, 0]]

    def _serve(
        self, part_PN: Int[np.ndarray, "P N"], held_PN: Bool[np.ndarray, "P N"] | None = None
    ) -> Bool[np.ndarray, "P N"]:
        """Which sources have the row that their plan has only begun: `held` had it before, the others due first.

        `part` is what the plans have begun, in units of a row / `_units`; it adds up to the rows there are to give.
        """
        left_P = part_PN.sum(axis=1) // self._units
        is_open_PN = part_PN > 0
        if held_PN is not None:
            left_P, is_open_PN = left_P - held_PN.sum(axis=1), is_open_PN & ~held_PN
        missing_PN = self._units - part_PN
        due_in_PN = -(-missing_PN // np.maximum(self._rows_N, 1))
        key_PN = np.where(is_open_PN, due_in_PN * self._units + missing_PN, np.iinfo(np.int64).max)
        order_PN = np.argsort(key_PN, axis=1, kind="stable")
        is_served_PN = np.empty_like(is_open_PN)
        np.put_along_axis(is_served_PN, order_PN, np.arange(key_PN.shape[1]) < left_P[:, None], axis=1)
        return is_served_PN if held_PN is None else is_served_PN | held_PN

    def _one_pass(self, num_steps: int) -> Bool[np.ndarray, "K N"]:
        """`_ahead_KN` for the first steps, many blocks at a time.

        Where a block begins is a guess at first. A block that began with another state than the block before it ends
        with runs again, until there is none: the states meet soon, since a row given too early is not given again.
        """
        block_steps = min(_BLOCK_STEPS, num_steps)
        num_blocks = -(-num_steps // block_steps)
        first_P1 = np.arange(num_blocks, dtype=np.int64)[:, None] * block_steps
        ahead_PKN = np.empty((num_blocks, block_steps, len(self._rows_N)), bool)
        begin_PN = self._serve((first_P1 - 1) * self._part_N % self._units)
        begin_PN[0] = False
        todo = np.arange(num_blocks)
        while todo.size:
            ahead_PN, steps_P1 = begin_PN[todo], first_P1[todo]
            for i in range(block_steps):
                part_PN = (steps_P1 + i) * self._part_N % self._units
                # A plan that has gone past a whole row since the last step has caught up with the row given early.
                ahead_PN = self._serve(part_PN, ahead_PN & (self._whole_N == 0) & (part_PN >= self._part_N))
                ahead_PKN[todo, i] = ahead_PN
            ends_PN = np.concatenate([begin_PN[:1], ahead_PKN[:-1, -1]])
            todo = np.flatnonzero((ends_PN != begin_PN).any(axis=1))
            begin_PN = ends_PN
        return ahead_PKN.reshape(-1, len(self._rows_N))[:num_steps]
