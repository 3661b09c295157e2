"""OpenAI's `logit_bias` and its penalties on what was said before: what is added to scores before the choice.

A token's score is its log-prob + its bias - frequency_penalty * (times it is in the new text so far) - presence_penalty
* (whether it is there). Temperature, top-k and top-p come after. The prompt counts nothing, and reported log-probs stay
the model's own. All are operands of the compiled programs.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.inference.methods import Beam, Method, SafeBeam
from safelm.models.arrays import Leaf

MOST_BIASED = 64  # ids of one request


@dataclasses.dataclass(frozen=True)
class Adjustment:
    """One request's.

    Attributes:
      logit_bias: (id, nats added to its score); each id once.
      presence_penalty, frequency_penalty: nats.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def is_neutral(self) -> bool:
        """Whether it changes nothing."""
        return not (self.logit_bias or self.presence_penalty or self.frequency_penalty)


NEUTRAL = Adjustment()


def takes_adjustments(method: Method) -> bool:
    """Whether a method chooses token by token; beam search and SafeBeam compare whole texts by their log-probs."""
    return not isinstance(method, Beam | SafeBeam)


def check_adjustment(adjustment: Adjustment, method: Method, vocab_size: int) -> None:
    """Raises ValueError for an adjustment that the method can't take, or that is no finite number or unknown id."""
    if adjustment.is_neutral:
        return
    if not takes_adjustments(method):
        raise ValueError(f"logit_bias and penalties go with one sequence, not with {type(method).__name__}")
    ids = [token for token, _ in adjustment.logit_bias]
    if len(ids) > MOST_BIASED or len(set(ids)) < len(ids):
        raise ValueError(f"logit_bias: {len(ids)} ids, want at most {MOST_BIASED} different ones")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"logit_bias: id {token} is not in the model's vocabulary of {vocab_size}")
    numbers = [bias for _, bias in adjustment.logit_bias]
    for number in (*numbers, adjustment.presence_penalty, adjustment.frequency_penalty):
        if not math.isfinite(number):
            raise ValueError(f"logit_bias and penalties: {number} is not a finite number")


@flax.struct.dataclass
class Adjustments:
    """Adjustments as arrays, one entry per prompt."""

    biased_ids_PN: Leaf
    biases_PN: Leaf  # 0: of no id
    presence_P: Leaf
    frequency_P: Leaf

    def apply(
        self, scores_PV: Float[Array, "P V"], tokens_PT: Int[Array, "P T"], step_P: Int[Array, " P"]
    ) -> Float[Array, "P V"]:
        """The scores after the first `step_P` of each prompt's new tokens; nothing is computed if all are neutral."""
        biases_PN, presence_P1 = jnp.asarray(self.biases_PN), jnp.asarray(self.presence_P)[:, None]
        frequency_P1 = jnp.asarray(self.frequency_P)[:, None]
        rows_P1 = jnp.arange(len(scores_PV))[:, None]

        def penalised(scores_PV: Array) -> Array:
            is_said_PT = jnp.arange(tokens_PT.shape[1]) < step_P[:, None]
            counts_PV = jnp.zeros_like(scores_PV).at[rows_P1, tokens_PT].add(is_said_PT.astype(scores_PV.dtype))
            return scores_PV - frequency_P1 * counts_PV - presence_P1 * (counts_PV > 0)

        def biased(scores_PV: Array) -> Array:
            return scores_PV.at[rows_P1, self.biased_ids_PN].add(biases_PN)

        has_penalty = (presence_P1 != 0).any() | (frequency_P1 != 0).any()
        scores_PV = jax.lax.cond(has_penalty, penalised, lambda same: same, scores_PV)
        return jax.lax.cond((biases_PN != 0).any(), biased, lambda same: same, scores_PV)


def stacked(adjustments: Sequence[Adjustment]) -> Adjustments:
    """Arrays of these, as numpy."""
    ids_PN = np.zeros((len(adjustments), MOST_BIASED), np.int32)
    biases_PN = np.zeros((len(adjustments), MOST_BIASED), np.float32)
    for row, adjustment in enumerate(adjustments):
        for place, (token, bias) in enumerate(adjustment.logit_bias):
            ids_PN[row, place], biases_PN[row, place] = token, bias
    return Adjustments(
        biased_ids_PN=ids_PN,
        biases_PN=biases_PN,
        presence_P=np.array([each.presence_penalty for each in adjustments], np.float32),
        frequency_P=np.array([each.frequency_penalty for each in adjustments], np.float32),
    )
