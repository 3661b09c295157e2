"""Log-probs of given continuations, used for multiple-choice tasks, targets of attacks and perplexity.

Rows are padded to few widths and scored at the continuation's positions only, so the vocabulary's logits are never
computed for the context. Pairs that differ only in their last token (answers "A" to "D" after one question) share a
row.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safelm.inference.prompts import bucket
from safelm.inference.tag_probability import LOGITS_AT_ONCE
from safelm.io.progress import Bar
from safelm.models import decoder as model
from safelm.models.config import ModelConfig

TOKENS_AT_ONCE = 4096  # rows times width of one batch
_WIDTHS = tuple(width for power in range(4, 24) for width in (2**power, 3 * 2 ** (power - 1)))
Pair = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class ContinuationScore:
    """log P(continuation | context) in nats, and whether greedy decoding would produce it."""

    logprob: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    """One input of the model; each token of `last` ends a pair that shares all other tokens."""

    tokens: tuple[int, ...]
    num_scored: int
    last: list[int]
    pairs: list[int]  # where each of `last` stands in the caller's list


def score_continuations(
    config: ModelConfig,
    params: model.Params,
    pairs: Sequence[Pair],
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    max_rows: int = 2**16,
    show_progress: bool = False,
) -> list[ContinuationScore]:
    """Scores (context, continuation) pairs of token ids, in their order.

    A pair longer than the model's context loses tokens on the left, as in lm-evaluation-harness: the last token is
    predicted and not read, so one more than `max_seq_len` fits.

    Args:
      tokens_at_once: the most tokens of a batch, including padding; a batch has at least one row.
      max_rows: the most rows of a batch.

    Raises:
      ValueError: a context or continuation is empty, a continuation is longer than the context, or an id is outside the
        vocabulary.
    """
    rows = _rows(config, pairs)
    scores: dict[int, ContinuationScore] = {}
    with Bar(total=len(pairs), unit="pair", disable=None if show_progress else True) as progress:
        for width, scored, batch in _batches(config, rows, tokens_at_once, max_rows):
            arrays = _pad(batch, width, scored, max_rows)
            log_probs_BK, is_greedy_BK = jax.device_get(_score(config, params, *arrays))
            for row, log_probs_K, is_greedy_K in zip(batch, log_probs_BK, is_greedy_BK, strict=False):
                for index, log_prob, is_greedy in zip(row.pairs, log_probs_K, is_greedy_K, strict=False):
                    scores[index] = ContinuationScore(float(log_prob), bool(is_greedy))
            progress.update(sum(len(row.pairs) for row in batch))
    return [scores[index] for index in range(len(pairs))]


def _rows(config: ModelConfig, pairs: Sequence[Pair]) -> list[_Row]:
    """The inputs to compute, longest first."""
    rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"pair {index}: {len(context)} tokens of context, {len(continuation)} of continuation")
        if len(continuation) > config.max_seq_len:
            raise ValueError(
                f"pair {index}: a continuation of {len(continuation)} tokens, the context is {config.max_seq_len}"
            )
        *tokens, last = (*context, *continuation)[-(config.max_seq_len + 1) :]
        if not 0 <= min(*tokens, last) <= max(*tokens, last) < config.vocab_size:
            raise ValueError(f"pair {index}: an id outside the vocabulary of {config.vocab_size}")
        row = rows.setdefault((tuple(tokens), len(continuation)), _Row(tuple(tokens), len(continuation), [], []))
        row.last.append(last)
        row.pairs.append(index)
    return sorted(rows.values(), key=lambda row: -len(row.tokens))


def _batches(
    config: ModelConfig, rows: Sequence[_Row], tokens_at_once: int, max_rows: int
) -> Iterator[tuple[int, int, list[_Row]]]:
    """(width, scored positions, rows) of each batch: rows of one shape together, in few shapes."""
    by_shape: dict[tuple[int, int], list[_Row]] = {}
    for row in rows:
        width = min(next(width for width in _WIDTHS if width >= len(row.tokens)), config.max_seq_len)
        by_shape.setdefault((width, bucket(row.num_scored, 1, width, factor=4)), []).append(row)
    for (width, scored), members in by_shape.items():
        most = min(max_rows, tokens_at_once // width, LOGITS_AT_ONCE // (config.padded_vocab_size * scored))
        for start in range(0, len(members), max(1, most)):
            yield width, scored, members[start : start + max(1, most)]


def _pad(batch: Sequence[_Row], width: int, scored: int, max_rows: int) -> tuple[np.ndarray, ...]:
    height = bucket(len(batch), 1, max_rows)
    num_last = bucket(max(len(row.last) for row in batch), 1, math.inf, factor=4)
    tokens_BT, last_BK = np.zeros((height, width), np.int32), np.zeros((height, num_last), np.int32)
    lengths_B, scored_B = np.ones(height, np.int32), np.ones(height, np.int32)
    for number, row in enumerate(batch):
        tokens_BT[number, : len(row.tokens)] = row.tokens
        last_BK[number, : len(row.last)] = row.last
        lengths_B[number], scored_B[number] = len(row.tokens), row.num_scored
    return tokens_BT, lengths_B, scored_B, last_BK, np.arange(scored, dtype=np.int32)


@functools.partial(jax.jit, static_argnames="config")
def _score(
    config: ModelConfig,
    params: model.Params,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    scored_B: Int[Array, " B"],
    last_BK: Int[Array, "B K"],
    steps_C: Int[Array, " C"],
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    """Sums over the `scored_B` positions that end at `lengths_B`; the token after the last one is each of `last_BK`."""
    config = dataclasses.replace(config, attention="xla")
    x_BTD = model.hidden_states(config, params, tokens_BT)
    position_BC = jnp.minimum((lengths_B - scored_B)[:, None] + steps_C, tokens_BT.shape[1] - 1)
    x_BCD = jnp.take_along_axis(x_BTD, position_BC[..., None], axis=1)
    log_probs_BCV = jax.nn.log_softmax(model.unembed(config, params, x_BCD))
    likeliest_BC = jnp.argmax(log_probs_BCV, axis=-1)

    next_BC = jnp.take_along_axis(tokens_BT, jnp.minimum(position_BC + 1, tokens_BT.shape[1] - 1), axis=1)
    in_row_BC = steps_C < scored_B[:, None] - 1
    chosen_BC = jnp.take_along_axis(log_probs_BCV, next_BC[..., None], axis=-1)[..., 0]
    log_prob_B = jnp.sum(jnp.where(in_row_BC, chosen_BC, 0.0), axis=1)
    is_greedy_B = jnp.all((likeliest_BC == next_BC) | ~in_row_BC, axis=1)

    end_B1 = scored_B[:, None] - 1
    end_log_probs_BV = jnp.take_along_axis(log_probs_BCV, end_B1[..., None], axis=1)[:, 0]
    end_likeliest_B1 = jnp.take_along_axis(likeliest_BC, end_B1, axis=1)
    log_prob_BK = log_prob_B[:, None] + jnp.take_along_axis(end_log_probs_BV, last_BK, axis=1)
    return log_prob_BK, is_greedy_B[:, None] & (last_BK == end_likeliest_B1)
