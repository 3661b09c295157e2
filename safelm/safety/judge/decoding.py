"""The compiled programs of a judge: a cached rubric, a batch of documents behind it, and masked steps of the answer.

Axes beside `safelm.models.decoder`'s: P the rubric's tokens, W words of 32 ids in a mask, six score tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.models import decoder as model
from safelm.models.config import ModelConfig


@functools.partial(jax.jit, static_argnames="config")
def read_rubric(config: ModelConfig, params: model.Params, tokens_P: Int[Array, " P"]) -> model.KVCache:
    """Keys and values of the tokens in front of every document, for one row."""
    tokens_1P = tokens_P[None]
    _, cache = model.apply_cached(
        config,
        params,
        tokens_1P,
        model.init_cache(config, 1, 0),
        lengths_B=jnp.zeros(1, jnp.int32),
        positions_BT=jnp.arange(tokens_1P.shape[1])[None],
    )
    return cache


@functools.partial(jax.jit, static_argnames=("config", "room"))
def read_documents(
    config: ModelConfig,
    params: model.Params,
    rubric: model.KVCache,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    score_ids_6: Int[Array, " six"],
    *,
    room: int,
) -> tuple[model.KVCache, Float[Array, "B six"]]:
    """Reads right-padded rows behind the rubric.

    Returns a cache of rubric, rows and `room` free positions, and log P(score) of the token after each row, over the
    whole vocabulary: the six don't sum to 1. Only the last token's logits are computed: as it is its own row's last
    one, it goes through again alone.
    """
    height, width = tokens_BT.shape
    num_rubric = rubric.k_LBSKH.shape[2]
    shared = jax.tree.map(lambda kv: jnp.broadcast_to(kv, (kv.shape[0], height, *kv.shape[2:])), rubric)
    starts_B = jnp.full(height, num_rubric, jnp.int32)
    positions_BT = jnp.broadcast_to(num_rubric + jnp.arange(width), tokens_BT.shape)
    _, new_kv = model.apply_cached(config, params, tokens_BT, shared, lengths_B=starts_B, positions_BT=positions_BT)
    free = jax.tree.map(lambda kv: jnp.zeros((*kv.shape[:2], room, *kv.shape[3:]), kv.dtype), new_kv)
    cache = jax.tree.map(lambda *kv: jnp.concatenate(kv, axis=2), shared, new_kv, free)
    last_B = jnp.maximum(lengths_B - 1, 0)
    last_tokens_B1 = jnp.take_along_axis(tokens_BT, last_B[:, None], axis=1)
    logits_B1V, _ = model.apply_cached(
        config, params, last_tokens_B1, cache, lengths_B=starts_B + last_B, positions_BT=(starts_B + last_B)[:, None]
    )
    return cache, jax.nn.log_softmax(logits_B1V[:, 0], axis=-1)[:, score_ids_6]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def step(
    config: ModelConfig,
    params: model.Params,
    cache: model.KVCache,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    mask_BW: Int[Array, "B W"],
) -> tuple[model.KVCache, Int[Array, " B"]]:
    """Puts T tokens behind each row's first `lengths_B` and takes the likeliest next one that its mask allows."""
    positions_BT = lengths_B[:, None] + jnp.arange(tokens_BT.shape[1])
    logits_BTV, new_kv = model.apply_cached(
        config, params, tokens_BT, cache, lengths_B=lengths_B, positions_BT=positions_BT
    )
    ids_V = np.arange(config.padded_vocab_size)
    is_allowed_BV = (mask_BW[:, ids_V // 32] >> (ids_V % 32)) & 1
    next_B = jnp.argmax(jnp.where(is_allowed_BV == 1, logits_BTV[:, -1], -jnp.inf), axis=-1)
    return model.write_cache(cache, new_kv, lengths_B), next_B
