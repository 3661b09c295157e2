"""Log-probs of given continuations, used for multiple-choice tasks, targets of attacks and perplexity.

A context is read once for all of its continuations: they stand behind it in one row, and each sees the context and
itself. Pairs that differ only in their last token (answers "A" to "D" after one question) share all the others. Rows
are padded to few widths, and the vocabulary's logits are computed at the continuations' positions only.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safelm.inference.prompts import bucket
from safelm.inference.tag_probability import LOGITS_AT_ONCE
from safelm.io.progress import Bar
from safelm.models import decoder as model
from safelm.models import product_kernels
from safelm.models.config import ModelConfig

TOKENS_AT_ONCE = 4096  # rows times width of one batch
_LONGEST, _MOST_BRANCHES = 3, 16  # of a row with several continuations: times its context; how many
_WIDTHS = tuple(width for power in range(4, 24) for width in (2**power, 3 * 2 ** (power - 1)))
Pair = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class ContinuationScore:
    """log P(continuation | context) in nats, and whether greedy decoding would produce it."""

    logprob: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class _Branch:
    """Continuations of one context that share all tokens but the last; each token of `last` ends one."""

    tokens: tuple[int, ...]
    last: list[int]
    pairs: list[int]  # where each of `last` stands in the caller's list

    @property
    def num_scored(self) -> int:
        return len(self.tokens) + 1


@dataclasses.dataclass(frozen=True)
class _Row:
    """One input of the model: a context and continuations behind it."""

    context: tuple[int, ...]
    branches: list[_Branch]

    @property
    def num_tokens(self) -> int:
        return len(self.context) + sum(len(branch.tokens) for branch in self.branches)

    @property
    def num_scored(self) -> int:
        return max(branch.num_scored for branch in self.branches)

    def has_room(self, config: ModelConfig, branch: _Branch) -> bool:
        """Whether another branch is to stand in it: what it adds is read beside the context, not in place of it."""
        tokens = self.num_tokens + len(branch.tokens)
        most = min(config.max_seq_len, _LONGEST * len(self.context))
        return not any(config.windows) and len(self.branches) < _MOST_BRANCHES and tokens <= most


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
    rows, config = _rows(config, pairs), product_kernels.settled(config, params)
    scores: dict[int, ContinuationScore] = {}
    with Bar(total=len(pairs), unit="pair", disable=None if show_progress else True) as progress:
        for width, scored, batch in _batches(config, rows, tokens_at_once, max_rows):
            branches = [branch for row in batch for branch in row.branches]
            found = jax.device_get(_score(config, params, **_pad(batch, width, scored, max_rows)))
            for branch, log_probs_K, is_greedy_K in zip(branches, *found, strict=False):
                for index, log_prob, is_greedy in zip(branch.pairs, log_probs_K, is_greedy_K, strict=False):
                    scores[index] = ContinuationScore(float(log_prob), bool(is_greedy))
            progress.update(sum(len(branch.pairs) for branch in branches))
    return [scores[index] for index in range(len(pairs))]


def _rows(config: ModelConfig, pairs: Sequence[Pair]) -> list[_Row]:
    """The inputs to compute, longest first."""
    branches: dict[tuple[int, ...], dict[tuple[int, ...], _Branch]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"pair {index}: {len(context)} tokens of context, {len(continuation)} of continuation")
        if len(continuation) > config.max_seq_len:
            raise ValueError(
                f"pair {index}: a continuation of {len(continuation)} tokens, the context is {config.max_seq_len}"
            )
        tokens = (*context, *continuation)[-(config.max_seq_len + 1) :]
        if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            raise ValueError(f"pair {index}: an id outside the vocabulary of {config.vocab_size}")
        before, (*own, last) = tokens[: -len(continuation)], continuation
        branch = branches.setdefault(before, {}).setdefault(tuple(own), _Branch(tuple(own), [], []))
        branch.last.append(last)
        branch.pairs.append(index)
    rows: list[_Row] = []
    for context, of_context in branches.items():
        row = None
        for branch in sorted(of_context.values(), key=lambda branch: len(branch.tokens)):
            if row is None or not row.has_room(config, branch):
                rows.append(row := _Row(context, []))
            row.branches.append(branch)
    return sorted(rows, key=lambda row: -row.num_tokens)


def _batches(
    config: ModelConfig, rows: Sequence[_Row], tokens_at_once: int, max_rows: int
) -> Iterator[tuple[int, int, list[_Row]]]:
    """(width, scored positions, rows) of each batch: rows of one shape together, in few shapes."""
    by_shape: dict[tuple[int, int], list[_Row]] = {}
    for row in rows:
        width = min(next(width for width in _WIDTHS if width >= row.num_tokens), config.max_seq_len)
        by_shape.setdefault((width, bucket(row.num_scored, 1, width, factor=4)), []).append(row)
    for (width, scored), members in by_shape.items():
        most_rows = max(1, min(max_rows, tokens_at_once // width))
        most_branches = LOGITS_AT_ONCE // (config.padded_vocab_size * scored)
        batch: list[_Row] = []
        for row in members:
            if len(batch) == most_rows or sum(len(each.branches) for each in [*batch, row]) > most_branches:
                yield from [(width, scored, batch)] * bool(batch)
                batch = []
            batch.append(row)
        yield width, scored, batch


def _pad(batch: Sequence[_Row], width: int, scored: int, max_rows: int) -> dict[str, np.ndarray]:
    """The arguments of `_score`; Q branches, of all rows one after the other."""
    branches = [branch for row in batch for branch in row.branches]
    height, count = bucket(len(batch), 1, max_rows), bucket(len(branches), 1, math.inf)
    num_last = bucket(max(len(branch.last) for branch in branches), 1, math.inf, factor=4)
    arrays = {name: np.zeros((height, width), np.int32) for name in ("tokens_BT", "positions_BT", "branches_BT")}
    arrays |= {name: np.zeros((count, scored), np.int32) for name in ("places_QC", "next_QC")}
    arrays |= {"rows_Q": np.zeros(count, np.int32), "scored_Q": np.ones(count, np.int32)}
    arrays["last_QK"] = np.zeros((count, num_last), np.int32)
    arrays["branches_BT"] -= 1  # of padding
    at = 0
    for number, row in enumerate(batch):
        _put(arrays, number, 0, row.context, 0, 0)
        begin = len(row.context)
        for index, branch in enumerate(row.branches):
            own = slice(begin, begin + len(branch.tokens))
            _put(arrays, number, begin, branch.tokens, len(row.context), index + 1)
            arrays["rows_Q"][at], arrays["scored_Q"][at] = number, branch.num_scored
            arrays["places_QC"][at, : branch.num_scored] = [len(row.context) - 1, *range(own.start, own.stop)]
            arrays["next_QC"][at, : len(branch.tokens)] = branch.tokens
            arrays["last_QK"][at, : len(branch.last)] = branch.last
            begin, at = own.stop, at + 1
    return arrays


def _put(
    arrays: Mapping[str, np.ndarray], row: int, begin: int, tokens: Sequence[int], position: int, branch: int
) -> None:
    own = slice(begin, begin + len(tokens))
    arrays["tokens_BT"][row, own] = tokens
    arrays["positions_BT"][row, own] = np.arange(position, position + len(tokens))
    arrays["branches_BT"][row, own] = branch


@functools.partial(jax.jit, static_argnames="config")
def _score(
    config: ModelConfig,
    params: model.Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"],
    rows_Q: Int[Array, " Q"],
    places_QC: Int[Array, "Q C"],
    next_QC: Int[Array, "Q C"],
    scored_Q: Int[Array, " Q"],
    last_QK: Int[Array, "Q K"],
) -> tuple[Float[Array, "Q K"], Bool[Array, "Q K"]]:
    """Sums over each branch's first `scored_Q` places; the token after the last one is each of `last_QK`."""
    config = dataclasses.replace(config, attention="xla")
    around = {"positions_BT": positions_BT, "branches_BT": branches_BT} if not any(config.windows) else {}
    x_BTD = model.hidden_states(config, params, tokens_BT, **around)
    log_probs_QCV = jax.nn.log_softmax(model.unembed(config, params, x_BTD[rows_Q[:, None], places_QC]))
    likeliest_QC = jnp.argmax(log_probs_QCV, axis=-1)

    is_inside_QC = jnp.arange(places_QC.shape[1]) < scored_Q[:, None] - 1
    chosen_QC = jnp.take_along_axis(log_probs_QCV, next_QC[..., None], axis=-1)[..., 0]
    log_prob_Q = jnp.sum(jnp.where(is_inside_QC, chosen_QC, 0.0), axis=1)
    is_greedy_Q = jnp.all((likeliest_QC == next_QC) | ~is_inside_QC, axis=1)

    end_Q1 = scored_Q[:, None] - 1
    end_log_probs_QV = jnp.take_along_axis(log_probs_QCV, end_Q1[..., None], axis=1)[:, 0]
    end_likeliest_Q1 = jnp.take_along_axis(likeliest_QC, end_Q1, axis=1)
    log_prob_QK = log_prob_Q[:, None] + jnp.take_along_axis(end_log_probs_QV, last_QK, axis=1)
    return log_prob_QK, is_greedy_Q[:, None] & (last_QK == end_likeliest_Q1)
