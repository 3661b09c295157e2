"""The compiled programs of a judge: a cached rubric, a batch of documents behind it, and masked steps of the answer.

Axes beside `safelm.models.decoder`'s: P the rubric's tokens, W words of 32 ids in a mask, six score tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.inference import forward
from safelm.inference.forward import Cache
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig


@functools.partial(jax.jit, static_argnames="config")
def read_rubric(config: ModelConfig, weights: Weights, tokens_P: Int[Array, " P"]) -> Cache:
    """Keys and values of the tokens in front of every document, for one row."""
    return forward.read_prompts(config, weights, tokens_P[None], jnp.asarray([len(tokens_P)]))[0]


@functools.partial(jax.jit, static_argnames=("config", "room"))
def read_documents(
    config: ModelConfig,
    weights: Weights,
    rubric: Cache,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    score_ids_6: Int[Array, " six"],
    *,
    room: int,
) -> tuple[Cache, Float[Array, "B six"]]:
    """Reads right-padded rows behind the rubric.

    Returns a cache of rubric, rows and `room` free positions, and log P(score) of the token after each row, over the
    whole vocabulary: the six don't sum to 1.
    """
    height = len(tokens_BT)
    shared = jax.tree.map(lambda kv: jnp.broadcast_to(kv, (height, *kv.shape[1:])), rubric)
    starts_B = jnp.full(height, rubric.max_len, jnp.int32)
    x_BTD, new_kv = forward.read_behind(config, weights, tokens_BT, shared, starts_B)
    free = jax.tree.map(lambda kv: jnp.zeros((*kv.shape[:2], room, kv.shape[3]), kv.dtype), new_kv)
    cache = jax.tree.map(lambda *kv: jnp.concatenate(kv, axis=2), shared, new_kv, free)
    logits_BV = forward.logits_of(config, weights, forward.at_last(x_BTD, lengths_B))
    return cache, jax.nn.log_softmax(logits_BV, axis=-1)[:, score_ids_6]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def step(
    config: ModelConfig,
    weights: Weights,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    mask_BW: Int[Array, "B W"],
) -> tuple[Cache, Int[Array, " B"]]:
    """Puts T tokens behind each row's first `lengths_B` and takes the likeliest next one that its mask allows."""
    x_BTD, new_kv = forward.read_behind(config, weights, tokens_BT, cache, lengths_B)
    ids_V = np.arange(config.padded_vocab_size)
    is_allowed_BV = (mask_BW[:, ids_V // 32] >> (ids_V % 32)) & 1
    logits_BV = forward.logits_of(config, weights, x_BTD[:, -1])
    next_B = jnp.argmax(jnp.where(is_allowed_BV == 1, logits_BV, -jnp.inf), axis=-1)
    return forward.write_behind(cache, new_kv, lengths_B), next_B
