"""The levels of a monitor along given texts."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from safelm.inference import forward, kv_cache
from safelm.inference.monitors.monitor import Monitor, check_monitor
from safelm.inference.prompts import batches
from safelm.inference.tag_probability import LOGITS_AT_ONCE
from safelm.inference.weights import Weights, prepare
from safelm.models import decoder as model
from safelm.models.config import ModelConfig


def levels(
    config: ModelConfig, params: model.Params, monitor: Monitor, token_lists: Sequence[Sequence[int]]
) -> list[Float32[np.ndarray, " T"]]:
    """The level at every token of every list, from 0 to 1.

    One forward over each list, which ends after the layer that is read; with a header as many more over the header as
    there are readings.

    Raises:
      ValueError: the monitor is another model's, or a list (and the header behind it) is longer than the context, or
        has an id outside the vocabulary.
    """
    for index, tokens in enumerate(token_lists):
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            raise ValueError(
                f"token list {index}: ids {min(tokens)} to {max(tokens)}, the vocabulary has {config.vocab_size}"
            )
    longest = max((len(tokens) for tokens in token_lists), default=1)
    check_monitor(monitor, config, num_tokens=longest)
    config = dataclasses.replace(config, attention="xla")
    max_rows = max(1, LOGITS_AT_ONCE // (config.padded_vocab_size * max(1, longest)))
    weights = prepare(config, params) if monitor.header_ids else None
    found: dict[int, Float32[np.ndarray, " T"]] = {}
    for batch in batches(token_lists, max_rows=max_rows, max_len=config.max_seq_len):
        if weights is None:
            levels_PT = np.asarray(_levels(config, monitor, params, batch.tokens_PT))
        else:
            levels_PT = np.asarray(_levels_behind_headers(config, monitor, weights, batch.tokens_PT))
        for row, index in enumerate(batch.indices):
            found[index] = levels_PT[row, : len(token_lists[index])]
    return [found[index] for index in range(len(token_lists))]


@functools.partial(jax.jit, static_argnames=("config", "monitor"))
def _levels(
    config: ModelConfig, monitor: Monitor, params: model.Params, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    if monitor.layer is None:
        values_BTX = model.apply(config, params, tokens_BT)
    else:
        (values_BTX,) = model.layer_states(config, params, tokens_BT, (monitor.layer,))
    return _held(jnp.exp(monitor.log_level(values_BTX)), monitor.every)


@functools.partial(jax.jit, static_argnames=("config", "monitor"))
def _levels_behind_headers(
    config: ModelConfig, monitor: Monitor, weights: Weights, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The header is read behind every `every`-th token, by all rows at once."""
    height, width = tokens_BT.shape
    cache, _ = forward.read_prompts(config, weights, tokens_BT, jnp.full(height, width))

    def level_behind(place: Array) -> Array:
        return log_level_behind(config, weights, monitor, cache, jnp.full(height, place + 1))

    log_levels_NB = jax.lax.map(level_behind, jnp.arange(0, width, monitor.every))
    return jnp.repeat(jnp.exp(log_levels_NB.T), monitor.every, axis=1)[:, :width]


def log_level_behind(
    config: ModelConfig, weights: Weights, monitor: Monitor, cache: kv_cache.Cache, lengths_R: Int[Array, " R"]
) -> Float[Array, " R"]:
    """The log of the level at the header behind each row's first `lengths_R` cached tokens, which stay as they are."""
    header_RT = jnp.broadcast_to(jnp.array(monitor.header_ids, jnp.int32), (len(lengths_R), len(monitor.header_ids)))
    x_RTD, _, read_RTD = forward.read_behind_tapped(config, weights, header_RT, cache, lengths_R, monitor.layer)
    if monitor.layer is None:
        return monitor.log_level(forward.logits_of(config, weights, x_RTD[:, -1]))
    return monitor.log_level(read_RTD[:, -1])


def candidate_log_levels(
    config: ModelConfig,
    weights: Weights,
    monitor: Monitor,
    cache: kv_cache.Cache,
    new_kv: kv_cache.Cache,
    lengths_R: Int[Array, " R"],
) -> Float[Array, " N"]:
    """The log of the level at the header behind each of a step's R x C candidates.

    Args:
      cache: of the rows, `lengths_R` tokens each.
      new_kv: keys and values of the candidates, which see their row's cache and themselves (S = C).
    """
    num_candidates = new_kv.max_len
    rows_N = jnp.repeat(jnp.arange(len(lengths_R)), num_candidates)
    lengths_N = lengths_R[rows_N]

    def apart(kv_RKCH: Array) -> Array:
        return kv_RKCH.swapaxes(1, 2).reshape(-1, kv_RKCH.shape[1], 1, kv_RKCH.shape[3])

    copies = kv_cache.take_rows(cache, rows_N)
    first_N, candidates = jnp.zeros_like(lengths_N), jax.tree.map(apart, new_kv)
    copies = kv_cache.write_next(copies, candidates, first_N, lengths_N, is_native=weights.is_packed)
    return log_level_behind(config, weights, monitor, copies, lengths_N + 1)


def _held(levels_BT: Float[Array, "B T"], every: int) -> Float[Array, "B T"]:
    """The level of the last reading."""
    width = levels_BT.shape[1]
    return levels_BT if every == 1 else jnp.repeat(levels_BT[:, ::every], every, axis=1)[:, :width]
