"""The harm tag's probability along given texts, a harm detector that comes free with the model."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from safelm.inference.prompts import batches
from safelm.models import decoder as model
from safelm.models.config import ModelConfig

LOGITS_AT_ONCE = 2**26  # float32: 256 MiB


def tag_probability(
    config: ModelConfig, params: model.Params, token_lists: Sequence[Sequence[int]], *, harm_tag_id: int
) -> list[Float32[np.ndarray, " T"]]:
    """P(tag | tokens[: t + 1]) for every position t of every list, which is SafeBeam's lookahead there.

    Raises:
      ValueError: a list is longer than the context, or an id or the tag is outside the vocabulary.
    """
    if not 0 <= harm_tag_id < config.vocab_size:
        raise ValueError(f"harm_tag_id={harm_tag_id} is not in the model's vocabulary of {config.vocab_size}")
    for index, tokens in enumerate(token_lists):
        if len(tokens) > config.max_seq_len:
            raise ValueError(f"token list {index}: {len(tokens)} tokens, the model's context is {config.max_seq_len}")
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            raise ValueError(
                f"token list {index}: ids {min(tokens)} to {max(tokens)}, the vocabulary has {config.vocab_size}"
            )
    longest = max((len(tokens) for tokens in token_lists), default=1)
    max_rows = max(1, LOGITS_AT_ONCE // (config.padded_vocab_size * max(1, longest)))
    found: dict[int, Float32[np.ndarray, " T"]] = {}
    for batch in batches(token_lists, max_rows=max_rows, max_len=config.max_seq_len):
        probs_PT = np.asarray(_tag_probability(config, params, batch.tokens_PT, harm_tag_id=harm_tag_id))
        for row, index in enumerate(batch.indices):
            found[index] = probs_PT[row, : len(token_lists[index])]
    return [found[index] for index in range(len(token_lists))]


@functools.partial(jax.jit, static_argnames=("config", "harm_tag_id"))
def _tag_probability(
    config: ModelConfig, params: model.Params, tokens_BT: Int[Array, "B T"], *, harm_tag_id: int
) -> Float[Array, "B T"]:
    logits_BTV = model.apply(config, params, tokens_BT)
    return jnp.exp(logits_BTV[..., harm_tag_id] - jax.nn.logsumexp(logits_BTV, axis=-1))
