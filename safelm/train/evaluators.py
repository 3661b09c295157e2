"""Evaluators: measurements of a model while it trains, each with its own interval in steps."""

import math
from collections.abc import Callable, Collection
from typing import Protocol, runtime_checkable

import jax

from safelm.models.loss import LossSums
from safelm.train.data import TrainData
from safelm.train.types import Batch, Params


class Stopped(Exception):  # noqa: N818 (not an error)
    """Raised when a run stops during an evaluation, which is then repeated when the run is resumed."""


@runtime_checkable
class Evaluator(Protocol):
    """Measures parameters at some steps, the run's last one included.

    Attributes:
      name: in messages.
      every_steps: between two measurements; 0: none but those at `at_steps` and the last.
      at_steps: further steps.
    """

    name: str
    every_steps: int
    at_steps: Collection[int]

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """Named numbers for the step's line in the log. Raises `Stopped` when the run is to stop."""


class HeldOutLoss:
    """Nats per token on the held-out split of every source of `eval.sources`, as `eval_loss/SOURCE`."""

    name = "held-out loss"
    at_steps = ()

    def __init__(
        self,
        every_steps: int,
        evaluate: Callable[[Params, Batch], LossSums],
        data: TrainData,
        batch_sharding: jax.sharding.NamedSharding,
        should_stop: Callable[[], bool],
    ):
        """`evaluate`: (parameters, batch) -> LossSums; `should_stop` is asked before every batch."""
        self.every_steps = every_steps
        self._evaluate, self._data = evaluate, data
        self._batch_sharding, self._should_stop = batch_sharding, should_stop

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """Raises FloatingPointError naming the source whose loss isn't finite, and `Stopped`."""
        losses = {}
        for source in self._data.eval_stores:
            total = LossSums.zero()
            for batch in self._data.eval_batches(source, self._batch_sharding):
                if self._should_stop():
                    raise Stopped
                total += self._evaluate(params, batch)
            losses[f"eval_loss/{source}"] = float(total.mean_cross_entropy())
            if not math.isfinite(losses[f"eval_loss/{source}"]):
                raise FloatingPointError(f"step {step}: evaluation loss on {source} is not finite")
        return losses
