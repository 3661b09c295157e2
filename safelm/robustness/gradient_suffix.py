"""A suffix that makes harmful answers likely, found by greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043).

One suffix is sought for several prompts at once, each with the beginning of its harmful answer: every step takes the
gradient of the loss by the suffix's one-hot tokens, draws candidates that exchange one token for one of the `top_k`
that the gradient likes best at its place, computes the exact loss of each, and goes on with the best of them, even if
it is worse than the suffix before (Algorithm 1 of the paper, and its code). The best suffix of all steps is what was
found. The paper draws 512 candidates a step with `top_k` 256, for 500 steps; the gate's profiles draw 32 to
128 with 64. With `tag_weight` the loss counts the mean log P(tag) along the answers too: the attack on SafeBeam, which
drops what looks harmful by it.

Only suffixes that come back when their text is tokenized again are tried, since an attacker sends text. Everything is
computed from the weights, by attackers who have them; the suffix then holds for any decoding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safelm.models import decoder
from safelm.models.block import embedded
from safelm.robustness.suffix_rows import (
    AT_ONCE,
    AttackedRows,
    Objective,
    attacked_rows,
    initial_suffix,
    objective_of,
    parts,
    placed,
    with_suffix,
)
from safelm.robustness.target import NotTriedError, Target


@dataclasses.dataclass(frozen=True)
class SuffixSearch:
    """Settings of the search.

    Attributes:
      tokens: of the suffix.
      top_k: tokens that the gradient proposes at every place.
      candidates: exchanges whose loss is computed in a step, the paper's batch size.
      tag_weight: weight of the mean log P(tag) along the answers, beside the mean loss of their tokens (nats).
    """

    tokens: int = 12
    steps: int = 20
    top_k: int = 64
    candidates: int = 64
    tag_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "top_k", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.steps < 0 or self.tag_weight < 0:
            raise ValueError(f"steps={self.steps}, tag_weight={self.tag_weight}: can't be negative")


@dataclasses.dataclass(frozen=True)
class FoundSuffix:
    """The best suffix at a step.

    Attributes:
      text: to be put behind a prompt.
      loss: mean over the prompts, see `SuffixSearch`.
      forward_passes: of one (prompt, suffix) each, so far; a gradient counts as three.
    """

    step: int
    text: str
    loss: float
    forward_passes: int


def find_suffix(
    target: Target,
    prompts: Sequence[str],
    answers: Sequence[str],
    search: SuffixSearch,
    on_step: Callable[[FoundSuffix], object] = lambda found: None,
) -> FoundSuffix:
    """The best suffix after `search.steps` steps.

    Args:
      prompts, answers: harmful prompts and the beginnings of their harmful answers, to choose by.
      on_step: told the best suffix so far at step 0 and after every step.

    Raises NotTriedError if a prompt with suffix and answer is longer than the model's context, or no token can be used.
    """
    rng = np.random.default_rng(search.seed)
    suffix_S = initial_suffix(target, search.tokens)
    rows = attacked_rows(target, prompts, answers, suffix_S)
    usable_V = usable_tokens(target)
    loss = functools.partial(_losses, objective_of(target, search.tag_weight), target.params)
    best = FoundSuffix(
        0, target.tokenizer.decode(suffix_S.tolist()), float(loss(rows, suffix_S[None])[0]), len(prompts)
    )
    on_step(best)
    for step in range(1, search.steps + 1):
        gradient_SV = suffix_gradient(target, rows, suffix_S, search.tag_weight)
        gradient_SV = np.where(usable_V, gradient_SV, np.inf)
        candidates_CS = _candidates(functools.partial(_survives, target, prompts), suffix_S, gradient_SV, search, rng)
        losses_C = loss(rows, candidates_CS)
        passes = best.forward_passes + len(prompts) * (3 + len(candidates_CS))
        best = dataclasses.replace(best, step=step, forward_passes=passes)
        chosen = int(losses_C.argmin())
        suffix_S = candidates_CS[chosen]
        if losses_C[chosen] < best.loss:
            text = target.tokenizer.decode(suffix_S.tolist())
            best = dataclasses.replace(best, text=text, loss=float(losses_C[chosen]))
        on_step(best)
    return best


def usable_tokens(target: Target) -> Bool[np.ndarray, " V"]:
    """Ids of plain text: none that control a chat, end a text or are the harm tag, and that stand alone as text."""
    tokenizer, usable_V = target.tokenizer, np.zeros(target.config.padded_vocab_size, bool)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        usable_V[token] = bool(text) and tokenizer.encode(text) == [token]
    usable_V[[tokenizer.harm_tag_id, tokenizer.eos_id]] = False
    if not usable_V.any():
        raise NotTriedError("the vocabulary has no token that stands for text by itself")
    return usable_V


def suffix_gradient(
    target: Target, rows: AttackedRows, suffix_S: Int[np.ndarray, " S"], tag_weight: float
) -> Float[np.ndarray, "S V"]:
    """The gradient of the mean loss over rows by the suffix's one-hot tokens; exact, in the model's dtype."""
    objective = objective_of(target, tag_weight)
    total = np.zeros((len(suffix_S), target.config.padded_vocab_size), np.float32)
    for part in parts(len(rows.tokens_BT)):
        arrays = (rows.tokens_BT[part], rows.start_B[part], rows.answer_BT[part])
        total += np.asarray(_gradient(objective, target.params, suffix_S, *arrays))
    return total / len(rows.tokens_BT)


def _survives(target: Target, prompts: Sequence[str], suffix_S: np.ndarray) -> bool:
    """Whether the text of every prompt with the suffix has the tokens that are computed with."""
    text = target.tokenizer.decode(suffix_S.tolist())
    return all(target.context(prompt + text) == placed(target, prompt, suffix_S)[0] for prompt in prompts)


def _candidates(
    survives: Callable[[np.ndarray], bool],
    suffix_S: np.ndarray,
    gradient_SV: Float[np.ndarray, "S V"],
    search: SuffixSearch,
    rng: np.random.Generator,
) -> Int[np.ndarray, "C S"]:
    """Different suffixes that differ in one token and survive being text; at least the suffix itself."""
    top_SK = np.argsort(gradient_SV, axis=1)[:, : search.top_k]
    tried: dict[tuple[int, int], np.ndarray | None] = {}
    for _ in range(4 * search.candidates):
        place = int(rng.integers(len(suffix_S)))
        token = int(rng.choice(top_SK[place]))
        if np.isfinite(gradient_SV[place, token]) and token != suffix_S[place] and (place, token) not in tried:
            candidate = suffix_S.copy()
            candidate[place] = token
            tried[place, token] = candidate if survives(candidate) else None
    found = [candidate for candidate in tried.values() if candidate is not None]
    return np.stack(found[: search.candidates] or [suffix_S])


def _losses(
    objective: Objective, params: decoder.Params, rows: AttackedRows, suffixes_CS: Int[np.ndarray, "C S"]
) -> Float[np.ndarray, " C"]:
    """The mean loss over rows of every suffix."""
    count, total = len(rows.tokens_BT), []
    pairs = [(suffix, row) for suffix in range(len(suffixes_CS)) for row in range(count)]
    for part in parts(len(pairs)):
        chosen = pairs[part]
        padded = chosen + [chosen[-1]] * (min(AT_ONCE, len(pairs)) - len(chosen))
        suffix_B, row_B = np.asarray(padded).T
        arrays = (rows.tokens_BT[row_B], rows.start_B[row_B], rows.answer_BT[row_B])
        found_B = _row_losses(objective, params, suffixes_CS[suffix_B], *arrays)
        total.append(np.asarray(found_B)[: len(chosen)])
    return np.concatenate(total).reshape(len(suffixes_CS), count).mean(1)


@functools.partial(jax.jit, static_argnums=0)
def _row_losses(
    objective: Objective,
    params: decoder.Params,
    suffix_BS: Int[Array, "B S"],
    tokens_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    answer_BT: Bool[Array, "B T"],
) -> Float[Array, " B"]:
    tokens_BT = with_suffix(tokens_BT, start_B, suffix_BS)
    x_BTD = embedded(objective.config, jnp.take(params["embedder"]["embedding"], tokens_BT, axis=0))
    return objective.of_stream(params, x_BTD, tokens_BT, answer_BT)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(
    objective: Objective,
    params: decoder.Params,
    suffix_S: Int[Array, " S"],
    tokens_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    answer_BT: Bool[Array, "B T"],
) -> Float[Array, "S V"]:
    """Of the rows' summed loss, by the one-hot suffix that all of them share."""
    config, table_VD = objective.config, params["embedder"]["embedding"]
    tokens_BT = with_suffix(tokens_BT, start_B, jnp.broadcast_to(suffix_S, (len(tokens_BT), len(suffix_S))))

    def loss(one_hot_SV: Array) -> Array:
        x_BTD = embedded(config, jnp.take(table_VD, tokens_BT, axis=0))
        suffix_SD = embedded(config, one_hot_SV @ table_VD)
        suffix_BSD = jnp.broadcast_to(suffix_SD, (len(tokens_BT), *suffix_SD.shape))
        return objective.of_stream(params, with_suffix(x_BTD, start_B, suffix_BSD), tokens_BT, answer_BT).sum()

    return jax.grad(loss)(jax.nn.one_hot(suffix_S, len(table_VD), dtype=table_VD.dtype))
