"""Prompts with room for what an attacker puts behind them, and the loss of the answers it wants, by the weights.

Both searches of a suffix share it, the one over tokens (`gradient_suffix`) and the one over vectors (`soft_prompt`).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safelm.models import decoder
from safelm.models.block import rms_norm
from safelm.models.config import ModelConfig
from safelm.robustness.target import NotTriedError, Target, Tokens

INITIAL = " !"  # what a suffix begins as, again and again
AT_ONCE = 64  # rows of a forward pass


@dataclasses.dataclass(frozen=True)
class AttackedRows:
    """Prompts with room for the suffix and their answers, one a row, padded behind.

    Attributes:
      start_B: the suffix's first place.
      answer_BT: whether a position's next token is one of the answer's.
    """

    tokens_BT: Int[np.ndarray, "B T"]
    start_B: Int[np.ndarray, " B"]
    answer_BT: Bool[np.ndarray, "B T"]


def initial_suffix(target: Target, count: int) -> Int[np.ndarray, " S"]:
    """The `count` ids that a search begins with."""
    tokens = target.tokenizer.encode(INITIAL * count)
    while len(tokens) < count:
        tokens += target.tokenizer.encode(INITIAL)
    return np.asarray(tokens[:count], np.int32)


def attacked_rows(target: Target, prompts: Sequence[str], answers: Sequence[str], suffix_S: np.ndarray) -> AttackedRows:
    """Every prompt with the suffix and the beginning of its harmful answer.

    Raises NotTriedError if one is longer than the model's context.
    """
    built: list[tuple[Tokens, int, int]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        context, start = placed(target, prompt, suffix_S)
        words = target.tokenizer.encode(answer if target.is_chat else f" {answer}")
        built.append(([*context, *words], start, len(context)))
    longest = max(len(tokens) for tokens, _, _ in built)
    if longest > target.config.max_seq_len:
        where = f"context {target.config.max_seq_len}"
        raise NotTriedError(f"a prompt with suffix and answer has {longest} tokens, {where}")
    tokens_BT, answer_BT = np.zeros((len(built), longest), np.int32), np.zeros((len(built), longest), bool)
    for row, (tokens, _, answer_start) in enumerate(built):
        tokens_BT[row, : len(tokens)] = tokens
        answer_BT[row, answer_start - 1 : len(tokens) - 1] = True
    return AttackedRows(tokens_BT, np.asarray([start for _, start, _ in built], np.int32), answer_BT)


def placed(target: Target, prompt: str, suffix_S: np.ndarray) -> tuple[Tokens, int]:
    """A prompt's context with the suffix behind the prompt, and the suffix's first place."""
    plain, longer = target.context(prompt), target.context(f"{prompt}{INITIAL}")
    start = next((i for i, (a, b) in enumerate(zip(plain, longer, strict=False)) if a != b), len(plain))
    return [*plain[:start], *suffix_S.tolist(), *plain[start:]], start


def objective_of(target: Target, tag_weight: float) -> "Objective":
    """The objective for a model's weights."""
    return Objective(target.config, target.tokenizer.harm_tag_id, tag_weight)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is made small: the answers' loss and, so many times, the mean log P(tag) along them."""

    config: ModelConfig
    tag: int
    tag_weight: float

    def of_stream(
        self,
        params: decoder.Params,
        x_BTD: Float[Array, "B T D"],
        tokens_BT: Int[Array, "B T"],
        answer_BT: Bool[Array, "B T"],
    ) -> Float[Array, " B"]:
        """Each row's loss, from what its stream begins with."""
        config = self.config
        (stream_BTD,) = decoder.layer_states(config, params, tokens_BT, (config.num_layers,), start=(0, x_BTD))
        logits_BTV = decoder.unembed(config, params, rms_norm(config, stream_BTD, params["final_norm"]["scale"]))
        log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
        next_BT = jnp.roll(tokens_BT, -1, axis=1)
        nats_BT = -jnp.take_along_axis(log_probs_BTV, next_BT[..., None], axis=-1)[..., 0]
        if self.tag_weight:
            nats_BT += self.tag_weight * log_probs_BTV[..., self.tag]
        return jnp.where(answer_BT, nats_BT, 0).sum(1) / answer_BT.sum(1)


def parts(count: int) -> list[slice]:
    """Rows of one forward pass each."""
    return [slice(start, start + AT_ONCE) for start in range(0, count, AT_ONCE)]


def with_suffix(array: Array, start_B: Int[Array, " B"], suffix: Array) -> Array:
    """Rows of tokens, or of their vectors, with each row's suffix at its place."""
    rows_B1 = jnp.arange(len(array))[:, None]
    return array.at[rows_B1, start_B[:, None] + jnp.arange(suffix.shape[1])].set(suffix)
