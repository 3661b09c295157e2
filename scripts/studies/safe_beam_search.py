"""The programs of `safe_beam_rules`: SafeBeam's step with other scores and other rules of dropping.

Axes beside `safelm.inference.asked`'s: N what a beam carries, its level and its sum of rises.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from safelm.inference import asked as asked_lib
from safelm.inference import beams, forward, kv_cache
from safelm.inference.asked import NEVER, RUNNING, Asked
from safelm.inference.beams import BeamState
from safelm.inference.kv_cache import Cache
from safelm.inference.safe_beam import undropped
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig


@functools.partial(jax.jit, static_argnames=("config", "num_beams"), donate_argnames=("state", "cache"))
def search_step(
    config: ModelConfig,
    num_beams: int,
    weights: Weights,
    settings: Float[Array, " settings"],
    state: BeamState,
    carried_PWN: Float[Array, "P W N"],
    cache: Cache,
    is_gap_V: Bool[Array, " V"],
) -> tuple[BeamState, Float[Array, "P W N"], Cache]:
    """A step of `safelm.inference.safe_beam` with another score and another rule of dropping.

    Args:
      carried_PWN: every beam's level and sum of rises.
      is_gap_V: tokens before which a word has ended. A candidate ends a word if they have half of what comes next.
    """
    drop_above, anchor, budget, beyond, penalty, rise_penalty, smooth, within, is_carried, by_class = settings
    candidates = beams.expand(state)
    shape = candidates.tokens_PWC.shape
    lengths_R = jnp.repeat(state.asked.prompt_lengths_P + state.step_P, num_beams)
    tokens_RC = candidates.tokens_PWC.reshape(-1, shape[2])
    logits_RCV, new_kv = forward.try_next(config, weights, tokens_RC, cache, lengths_R)
    log_probs_PWCV = (logits_RCV - forward.log_normaliser(logits_RCV)[..., None]).reshape(*shape, -1)
    is_running_PWC = candidates.ends_PWC == RUNNING
    own_PWC = state.asked.tag_log_prob(log_probs_PWCV)
    tag_PWC = jnp.where(is_running_PWC, own_PWC, state.tag_log_prob_PW[..., None])
    before_PW1 = carried_PWN[..., :1]
    is_within_PWC = is_running_PWC & (jnp.where(is_gap_V, jnp.exp(log_probs_PWCV), 0).sum(axis=-1) < 0.5)
    level_PWC = jnp.exp(own_PWC) * jnp.where(is_within_PWC, within, 1)
    level_PWC = jnp.where(is_within_PWC & (is_carried > 0), before_PW1, level_PWC)
    level_PWC = jnp.where(is_running_PWC, smooth * before_PW1 + (1 - smooth) * level_PWC, before_PW1)
    rise_PWC = jnp.where(is_running_PWC, jnp.maximum(level_PWC - jnp.maximum(before_PW1, drop_above), 0), 0)
    spent_PWC = carried_PWN[..., 1:] + rise_PWC
    is_candidate_PWC = candidates.log_prob_PWC > NEVER
    is_ranked_apart_PWC = is_within_PWC & (by_class > 0)
    is_kept_PWC = undropped(is_candidate_PWC & ~is_ranked_apart_PWC, jnp.log(level_PWC), state.asked.drop_counts_PM)
    is_kept_PWC |= undropped(is_candidate_PWC & is_ranked_apart_PWC, jnp.log(level_PWC), state.asked.drop_counts_PM)
    is_kept_PWC |= is_candidate_PWC & ((level_PWC <= drop_above) | (spent_PWC <= budget) | (rise_PWC <= beyond))
    gain_PWC = state.next_log_probs_PWC - anchor * state.next_log_probs_PWC[..., :1]
    gain_PWC -= penalty * level_PWC + rise_penalty * rise_PWC
    score_PWC = state.score_PW[..., None] + jnp.where(candidates.is_held_PWC, 0, gain_PWC)
    score_PW, place_PW = beams.select(jnp.where(is_kept_PWC, score_PWC, NEVER), num_beams)
    rows_R, choice_R = beams.rows_of(place_PW // shape[2]), (place_PW % shape[2]).reshape(-1)
    new = beams.with_lookahead(
        config,
        beams.survive(state, candidates, score_PW, place_PW),
        is_held_PW=beams.pick(candidates.is_held_PWC, place_PW),
        tag_log_prob_PW=beams.pick(tag_PWC, place_PW),
        next_log_probs_PWV=beams.pick(log_probs_PWCV, place_PW),
    )
    cache = kv_cache.write_next(
        kv_cache.take_rows(cache, rows_R), kv_cache.take_rows(new_kv, rows_R), choice_R, lengths_R
    )
    carried_PWN = beams.pick(jnp.stack([level_PWC, spent_PWC], axis=-1), place_PW)
    return asked_lib.keep(~state.is_running_PW.any(axis=1), state, new), carried_PWN, cache


@functools.partial(jax.jit, static_argnames=("config", "num_beams", "num_candidates", "max_len"))
def begin(
    config: ModelConfig,
    num_beams: int,
    num_candidates: int,
    max_len: int,
    weights: Weights,
    asked: Asked,
    tokens_PT: Int[Array, "P T"],
) -> tuple[BeamState, Cache]:
    """The state after the prompts."""
    cache, logits_PV = forward.read_prompts(config, weights, tokens_PT, asked.prompt_lengths_P)
    sizes = {"num_beams": num_beams, "num_candidates": num_candidates, "max_len": max_len}
    with_room = ((0, 0), (0, 0), (0, max_len), (0, 0))
    cache = jax.tree.map(lambda kv: jnp.repeat(jnp.pad(kv, with_room), num_beams, axis=0), cache)
    return beams.start(config, asked, logits_PV, **sizes), cache
