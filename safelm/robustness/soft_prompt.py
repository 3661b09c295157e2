"""A soft prompt: vectors behind the prompts, found by gradient, that make harmful answers likely.

Lester et al. 2021 (arXiv 2104.08691) tune such vectors to a task; Schwinn et al. 2024 (arXiv 2402.09063) attack open
models with them: whoever has the weights need not send text. They stand in place of token embeddings, one sequence for
all prompts, and Adam moves them to lower the loss of the beginnings of harmful answers. It bounds what a suffix of text
could do with as many tokens, since every token's embedding is such a vector.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from safelm.models import decoder
from safelm.models.block import embedded
from safelm.robustness.suffix_rows import Objective, attacked_rows, initial_suffix, objective_of, placed, with_suffix
from safelm.robustness.target import Target, Tokens


@dataclasses.dataclass(frozen=True)
class SoftPromptSearch:
    """Settings of the search.

    Attributes:
      tokens: vectors, each in a token's place.
      learning_rate: of Adam, in units of the embeddings' root mean square.
    """

    tokens: int = 8
    steps: int = 64
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.steps < 0 or not self.learning_rate > 0:
            raise ValueError(
                f"soft prompt: tokens={self.tokens}, steps={self.steps}, learning_rate={self.learning_rate}: want at "
                "least 1, 0 or more, above 0"
            )


@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """The vectors at a step.

    Attributes:
      vectors_SD: as rows of the embedding table.
      loss: mean over the prompts of the mean loss of their answers' tokens, nats.
      forward_passes: of one (prompt, vectors) each, so far; a gradient counts as three.
    """

    step: int
    vectors_SD: Float[np.ndarray, "S D"] = dataclasses.field(repr=False)
    loss: float
    forward_passes: int


def find_soft_prompt(
    target: Target,
    prompts: Sequence[str],
    answers: Sequence[str],
    search: SoftPromptSearch,
    on_step: Callable[[SoftPrompt], object] = lambda found: None,
) -> SoftPrompt:
    """The vectors after `search.steps` steps.

    Args:
      prompts, answers: harmful prompts and the beginnings of their harmful answers, to choose by.
      on_step: told the vectors at step 0 and after every step.

    Raises ValueError if a prompt with vectors and answer is longer than the model's context.
    """
    begin_S = initial_suffix(target, search.tokens)
    rows = attacked_rows(target, prompts, answers, begin_S)
    table_VD = jnp.asarray(target.params["embedder"]["embedding"], jnp.float32)
    optimizer = optax.adam(search.learning_rate * float(jnp.sqrt(jnp.mean(jnp.square(table_VD)))))
    vectors_SD = table_VD[begin_S]
    state, objective = optimizer.init(vectors_SD), objective_of(target, 0.0)
    arrays = (rows.tokens_BT, rows.start_B, rows.answer_BT)
    for step in range(search.steps + 1):
        loss, gradient_SD = _loss_and_gradient(objective, target.params, vectors_SD, *arrays)
        found = SoftPrompt(step, np.asarray(vectors_SD), float(loss), (3 * step + 1) * len(prompts))
        on_step(found)
        updates_SD, state = optimizer.update(gradient_SD, state)
        vectors_SD = optax.apply_updates(vectors_SD, updates_SD)
    return found


def with_vectors(target: Target, vectors_SD: Float[np.ndarray, "S D"]) -> tuple[Target, Int[np.ndarray, " S"]]:
    """The model with further tokens whose embeddings are the vectors, and their ids; it never writes them.

    Everything else is as it was: their logits are 0, which the other tokens' log-probs share the mass with, so take the
    answers and not the probabilities.
    """
    config, params = target.config, target.params
    first, count = config.vocab_size, len(vectors_SD)
    ids_S = np.arange(first, first + count, dtype=np.int32)
    banned = (*config.banned_ids, *ids_S.tolist())
    wider = dataclasses.replace(config, vocab_size=first + count, tie_embeddings=False, banned_ids=banned)
    table_VD = jnp.asarray(params["embedder"]["embedding"])
    kernel_DV = jnp.asarray(decoder.unembedding(config, params)).T
    more = wider.padded_vocab_size - len(table_VD)
    longer_VD = jnp.pad(table_VD, ((0, more), (0, 0))).at[ids_S].set(jnp.asarray(vectors_SD, table_VD.dtype))
    edited: decoder.Params = {
        **params,
        "embedder": {"embedding": longer_VD},
        "unembed": {"kernel": jnp.pad(kernel_DV, ((0, 0), (0, more))).at[:, ids_S].set(0.0)},
    }
    return dataclasses.replace(target, config=wider, params=edited), ids_S


def soft_contexts(target: Target, prompts: Sequence[str], ids_S: Int[np.ndarray, " S"]) -> list[Tokens]:
    """Every prompt as ids with the vectors' ids behind it, where text would be read."""
    return [placed(target, prompt, ids_S)[0] for prompt in prompts]


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradient(
    objective: Objective,
    params: decoder.Params,
    vectors_SD: Float[Array, "S D"],
    tokens_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    answer_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, "S D"]]:
    table_VD = params["embedder"]["embedding"]

    def loss(vectors_SD: Array) -> Array:
        x_BTD = embedded(objective.config, jnp.take(table_VD, tokens_BT, axis=0))
        placed_SD = embedded(objective.config, vectors_SD.astype(table_VD.dtype))
        placed_BSD = jnp.broadcast_to(placed_SD, (len(tokens_BT), *placed_SD.shape))
        return objective.of_stream(params, with_suffix(x_BTD, start_B, placed_BSD), tokens_BT, answer_BT).mean()

    return jax.value_and_grad(loss)(vectors_SD)
