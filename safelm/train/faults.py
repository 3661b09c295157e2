"""The policy for bad updates: a loss or gradient that isn't finite, or a spike.

The compiled step applies no update whose loss or gradient norm isn't finite or exceeds its limits
(`safelm.train.step.Controls`). This module sets the limits and decides what the run does next, by `config.faults`:

- `halt`: FloatingPointError; nothing of that state was saved, the checkpoints before it stay.
- `skip`: the run goes on with the next batch as if this one had not been there.
- `rollback`: the parameters and the optimizer's state become the newest checkpoint's again, and the run goes on with
  the batch after the bad one. Steps count on: the data position, the learning rate and the token ledger are functions
  of the step whether or not its update stayed, so nothing is fed twice. What is undone is recorded.

A spike is a loss above `spike_loss_ratio`, or a gradient norm above `spike_grad_norm_ratio`, times the median over the
last `spike_window` applied updates; there is no limit before so many were applied. The limits of step n come from the
steps up to n - 2, never n - 1, which is still running when n is started: so no step waits for the host, and the
limits don't depend on when the numbers were read. The window is kept in checkpoints, so a resumed run decides the same.
"""

import collections
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from safelm.train.clock import Clock
from safelm.train.metrics import LossWindow
from safelm.train.step import StepMetrics

ON_NONFINITE = ("halt", "skip", "rollback")
ON_SPIKE = ("ignore", "skip", "rollback")


class Verdict(NamedTuple):
    """The action after an update, and its reason."""

    action: Literal["none", "skip", "rollback"]
    reason: str = ""


def check_config(faults: ConfigDict) -> None:
    """Raises ValueError naming the field and its value."""
    for name, known in (("on_nonfinite", ON_NONFINITE), ("on_spike", ON_SPIKE)):
        if faults[name] not in known:
            raise ValueError(f"faults.{name} is {faults[name]!r}: known are {', '.join(known)}")
    for name in ("spike_loss_ratio", "spike_grad_norm_ratio"):
        if faults[name] and not faults[name] > 1:
            raise ValueError(f"faults.{name} is {faults[name]}: it must be above 1, or 0 for no limit")
    for name, least in (("spike_window", 1), ("max_skips", 0), ("max_rollbacks", 0)):
        if faults[name] < least:
            raise ValueError(f"faults.{name} is {faults[name]}: it must be at least {least}")
    if not faults.grace_s > 0:
        raise ValueError(f"faults.grace_s is {faults.grace_s}: it must be positive")


class Faults:
    """The policy, and what it decides by: a deterministic function of the updates' numbers so far."""

    def __init__(self, config: ConfigDict):
        self._config = config
        # One more than the window: the newest may be the step that a limit must not know of.
        self._updates: collections.deque[tuple[int, float, float]] = collections.deque(maxlen=config.spike_window + 1)
        self._skips: list[int] = []  # steps skipped within the last spike_window
        self.rollbacks: list[dict[str, int]] = []  # {"step": the bad one, "to": the checkpoint's}
        self.steps_not_applied = 0

    def limits(self, step: int) -> tuple[float, float]:
        """The greatest loss and gradient norm with which the update of a step is applied; inf: any finite one."""
        known = [update for update in self._updates if update[0] <= step - 2][-self._config.spike_window :]
        if self._config.on_spike == "ignore" or len(known) < self._config.spike_window:
            return math.inf, math.inf
        ratios = self._config.spike_loss_ratio, self._config.spike_grad_norm_ratio
        medians = (statistics.median(update[i] for update in known) for i in (1, 2))
        return tuple(ratio * median if ratio else math.inf for ratio, median in zip(ratios, medians, strict=True))

    def read(
        self,
        unread: collections.deque[tuple[int, StepMetrics]],
        keep: int,
        window: LossWindow,
        clock: Clock,
        tell: Callable[..., None],
    ) -> int | None:
        """Judges all updates but the last `keep`; returns the step to roll back from, or None.

        Raises FloatingPointError as `judge` does; `tell` is called with what happened, the step and why.
        """
        while len(unread) > keep:
            step, update = unread.popleft()
            loss, grad_norm, applied = window.add(update)
            verdict = self.judge(step, loss, grad_norm, applied=applied)
            if verdict.action != "none":
                tell(verdict.action, step, reason=verdict.reason)
            if verdict.action == "skip":
                clock.skipped()
            if verdict.action == "rollback":
                unread.clear()
                return step
        return None

    def judge(self, step: int, loss: float, grad_norm: float, *, applied: bool) -> Verdict:
        """Decides the action after an update; updates come in order of their steps.

        Args:
          loss: nats per token.
          grad_norm: before the clip.

        Raises FloatingPointError naming the step where the run must not go on.
        """
        if applied:
            self._updates.append((step, loss, grad_norm))
            return Verdict("none")
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        action = self._config.on_spike if finite else self._config.on_nonfinite
        what = f"step {step}: the loss is {loss} and the gradients' norm {grad_norm}"
        if action == "halt":
            raise FloatingPointError(f"{what}: halted; nothing of this state was saved")
        if action == "rollback":
            if len(self.rollbacks) >= self._config.max_rollbacks:
                limit = f"faults.max_rollbacks {self._config.max_rollbacks}"
                raise FloatingPointError(f"{what}: halted after {len(self.rollbacks)} rollbacks ({limit})")
            return Verdict("rollback", what)
        window = self._config.spike_window
        self._skips = [skipped for skipped in self._skips if skipped > step - window] + [step]
        self.steps_not_applied += 1
        if len(self._skips) > self._config.max_skips:
            limit = f"faults.max_skips {self._config.max_skips}"
            raise FloatingPointError(f"{what}: halted after {len(self._skips)} skips in {window} steps ({limit})")
        return Verdict("skip", what)

    def roll_back(self, step: int, meta: Mapping[str, Any]) -> None:
        """Records a rollback from a bad step to a checkpoint with the record `meta` ({}: to the run's beginning)."""
        to = meta.get("step", 0)
        rollbacks = [*self.rollbacks, {"step": step, "to": to}]
        self.load(meta.get("faults"))
        self.rollbacks = rollbacks
        self.steps_not_applied += step - to

    def record(self) -> dict[str, Any]:
        """The state as JSON, for a checkpoint."""
        return {
            "updates": [list(update) for update in self._updates],
            "skips": self._skips,
            "rollbacks": self.rollbacks,
            "steps_not_applied": self.steps_not_applied,
        }

    def load(self, record: Mapping[str, Any] | None) -> None:
        """Goes on from a checkpoint's record; None: from the beginning."""
        record = record or {}
        self._updates.clear()
        self._updates.extend((int(step), loss, norm) for step, loss, norm in record.get("updates", ()))
        self._skips = list(record.get("skips", ()))
        self.rollbacks = list(record.get("rollbacks", ()))
        self.steps_not_applied = record.get("steps_not_applied", 0)
