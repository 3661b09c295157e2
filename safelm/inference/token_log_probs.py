"""The log-prob of every token of a text given those before it, and of the likeliest tokens in its place."""

import dataclasses
import functools
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from safelm.inference.prompts import SMALLEST_BUCKET, bucket
from safelm.inference.tag_probability import LOGITS_AT_ONCE
from safelm.models import decoder as model
from safelm.models import product_kernels
from safelm.models.config import ModelConfig

MOST_ALTERNATIVES = 20
_compiling, _compiled = threading.Lock(), set[tuple[ModelConfig, int]]()


@dataclasses.dataclass(frozen=True)
class TokenLogProbs:
    """Log-probs (nats, over the whole vocabulary) at every token but the first, which nothing predicts.

    Attributes:
      chosen_T: of the text's own tokens; entry t belongs to token t + 1, here and below.
      ids_TK, likeliest_TK: the likeliest ids at this place and their log-probs, likeliest first; of equally likely ones
        the smaller id first.
    """

    chosen_T: Float32[np.ndarray, " T"]
    ids_TK: Int32[np.ndarray, "T K"]
    likeliest_TK: Float32[np.ndarray, "T K"]


def token_log_probs(config: ModelConfig, params: model.Params, tokens: Sequence[int]) -> TokenLogProbs:
    """One forward over the text; few widths are compiled, and the logits of few positions exist at once.

    The text may be longer than the context by its last token, which is predicted and not read.

    Raises:
      ValueError: the text is empty or longer, or an id is outside the vocabulary.
    """
    if not 1 <= len(tokens) <= config.max_seq_len + 1:
        raise ValueError(f"{len(tokens)} tokens, the model's context is {config.max_seq_len}")
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        raise ValueError(f"ids {min(tokens)} to {max(tokens)}, the vocabulary has {config.vocab_size}")
    num_read, width = len(tokens) - 1, _width(config, len(tokens))
    tokens_T, next_T = np.zeros(width, np.int32), np.zeros(width, np.int32)
    tokens_T[:num_read], next_T[:num_read] = tokens[:-1], tokens[1:]
    found = jax.device_get(_log_probs(product_kernels.settled(config, params), params, tokens_T, next_T))
    return TokenLogProbs(*(array[:num_read] for array in found))


def compile_log_probs(config: ModelConfig, params: model.Params, num_tokens: int) -> None:
    """Compiles what a text of so many tokens needs, once, in the calling thread; the text is then scored at once."""
    width = _width(config, num_tokens)
    with _compiling:
        if (config, width) not in _compiled:
            tokens_T = jax.ShapeDtypeStruct((width,), np.int32)
            _log_probs.lower(product_kernels.settled(config, params), params, tokens_T, tokens_T).compile()
            _compiled.add((config, width))


def _width(config: ModelConfig, num_tokens: int) -> int:
    return bucket(num_tokens - 1, SMALLEST_BUCKET, config.max_seq_len)


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(
    config: ModelConfig, params: model.Params, tokens_T: Int[Array, " T"], next_T: Int[Array, " T"]
) -> tuple[Float[Array, " T"], Int[Array, "T K"], Float[Array, "T K"]]:
    config = dataclasses.replace(config, attention="xla")
    x_TD = model.hidden_states(config, params, tokens_T[None])[0]
    width = len(tokens_T)
    most = max(1, LOGITS_AT_ONCE // config.padded_vocab_size)
    num_blocks = -(-width // most)
    pad = -width % num_blocks
    x_NBD = jnp.pad(x_TD, ((0, pad), (0, 0))).reshape(num_blocks, -1, x_TD.shape[1])
    next_NB = jnp.pad(next_T, (0, pad)).reshape(num_blocks, -1)

    def block(operands: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        x_BD, next_B = operands
        log_probs_BV = jax.nn.log_softmax(model.unembed(config, params, x_BD))
        chosen_B = jnp.take_along_axis(log_probs_BV, next_B[:, None], axis=1)[:, 0]
        likeliest_BK, ids_BK = jax.lax.top_k(log_probs_BV, min(MOST_ALTERNATIVES, config.vocab_size))
        return chosen_B, ids_BK, likeliest_BK

    found = jax.lax.map(block, (x_NBD, next_NB))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:width], found)
