"""The model's two calls that decoding is made of, and the cache they share. Pure functions under `jit`.

A cache has R rows of S positions; every prompt has one row per beam. Axes: see `safelm.inference.asked`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm import model
from safelm.model_config import ModelConfig


def read_prompts(
    config: ModelConfig, params: model.Params, tokens_PT: Int[Array, "P T"], lengths_P: Int[Array, " P"]
) -> tuple[model.KVCache, Float[Array, "P V"]]:
    """Keys and values of every prompt's tokens (and of padding after them), and the logits of the token after it."""
    num_prompts, width = tokens_PT.shape
    nothing_P = jnp.zeros(num_prompts, jnp.int32)
    _, new_kv = model.apply_cached(
        config,
        params,
        tokens_PT,
        model.init_cache(config, num_prompts, 0),
        lengths_B=nothing_P,
        positions_BT=jnp.broadcast_to(jnp.arange(width), tokens_PT.shape),
    )
    last_P = jnp.maximum(lengths_P - 1, 0)
    last_tokens_P1 = jnp.take_along_axis(tokens_PT, last_P[:, None], axis=1)
    logits_P1V, _ = try_next(config, params, last_tokens_P1, new_kv, last_P)
    return new_kv, logits_P1V[:, 0]


def try_next(
    config: ModelConfig,
    params: model.Params,
    tokens_RC: Int[Array, "R C"],
    cache: model.KVCache,
    lengths_R: Int[Array, " R"],
) -> tuple[Float[Array, "R C V"], model.KVCache]:
    """One forward over C alternatives for every row's next token: each sees its row's cache and itself, no other.

    Returns float32 logits of the token after each alternative, and the alternatives' keys and values.
    """
    num_candidates = tokens_RC.shape[1]
    return model.apply_cached(
        config,
        params,
        tokens_RC,
        cache,
        lengths_B=lengths_R,
        positions_BT=jnp.broadcast_to(lengths_R[:, None], tokens_RC.shape),
        new_mask_BTT=jnp.eye(num_candidates, dtype=bool)[None],
    )


def log_normaliser(logits: Float[Array, "*A V"]) -> Float[Array, "*A"]:
    """What log-probs are less than logits by."""
    return jax.nn.logsumexp(logits, axis=-1)


def keep_one(
    cache: model.KVCache, new_kv: model.KVCache, choice_R: Int[Array, " R"], lengths_R: Int[Array, " R"]
) -> model.KVCache:
    """Writes each row's chosen alternative into its cache."""
    pick = lambda kv: jnp.take_along_axis(kv, choice_R[None, :, None, None, None], axis=2)  # noqa: E731
    return model.write_cache(cache, jax.tree.map(pick, new_kv), lengths_R)


def take_rows(cache: model.KVCache, rows: Int[Array, " R"], max_len: int | None = None) -> model.KVCache:
    """These rows of a cache, cut or filled up to `max_len` positions; rows past the end are zeros."""

    def take(kv: jax.Array) -> jax.Array:
        missing = max(0, (max_len or 0) - kv.shape[2])
        kv = jnp.take(kv[:, :, :max_len], rows, axis=1, mode="fill", fill_value=0)
        return jnp.pad(kv, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0))) if missing else kv

    return jax.tree.map(take, cache)


def put_rows(cache: model.KVCache, rows: Int[Array, " N"], new_kv: model.KVCache) -> model.KVCache:
    """New rows' keys and values from position 0 on; rows past the end of the cache are dropped."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new[:, :, : old.shape[2]].astype(old.dtype)
        return old.at[:, rows, : new.shape[2]].set(new, mode="drop")

    return jax.tree.map(put, cache, new_kv)
