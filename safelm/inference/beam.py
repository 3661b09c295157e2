"""Beam search; `safelm.inference.methods.Beam` defines its score.

A search starts from one beam, the prompt. A beam that chooses EOS (or the tag, with tag_candidate="stop") has ended: it
keeps its log-prob, stays a beam while its score is among the best, and is not expanded. The search ends when no beam
runs, when no running beam can still beat the best ended one, or at `max_new_tokens`.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.inference import asked as asked_lib
from safelm.inference import beams, forward, kv_cache
from safelm.inference.asked import Asked
from safelm.inference.beams import BeamState
from safelm.inference.kv_cache import Cache
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Beams:
    """The shape of a beam search's step."""

    num_rows: int  # beams per prompt
    num_dropped_from: int = 0

    def start(self, config: ModelConfig, asked: Asked, logits_PV: Float[Array, "P V"], *, max_len: int) -> BeamState:
        """The state after the prompts, with room for `max_len` tokens."""
        k = self.num_rows
        return beams.start(config, asked, logits_PV, num_beams=k, num_candidates=k, max_len=max_len)

    def step(
        self, config: ModelConfig, weights: Weights, state: BeamState, cache: Cache
    ) -> tuple[BeamState, Cache, beams.Tried]:
        """One more token for every prompt that isn't over."""
        candidates = beams.expand(state)
        lengths_PWC = candidates.num_tokens_PWC.astype(jnp.float32)
        penalties_P11 = state.asked.length_penalties_P[:, None, None]
        score_PW, place_PW = beams.select(candidates.log_prob_PWC / lengths_PWC**penalties_P11, self.num_rows)
        parent_PW = place_PW // self.num_rows
        # Rows without a beam and prompts that are over write where nothing is read.
        lengths_R = jnp.repeat(state.asked.prompt_lengths_P + state.step_P, self.num_rows)
        rows_R, prompt_lengths_R = beams.rows_of(parent_PW), jnp.repeat(state.asked.prompt_lengths_P, self.num_rows)
        cache = kv_cache.follow_beams(config, weights, cache, rows_R, prompt_lengths_R, lengths_R)
        tokens_R1 = beams.pick(candidates.tokens_PWC, place_PW).reshape(-1, 1)
        logits_R1V, new_kv = forward.try_next(config, weights, tokens_R1, cache, lengths_R)
        normaliser_R1 = forward.log_normaliser(logits_R1V, is_native=weights.is_packed)
        log_probs_PWV = (logits_R1V - normaliser_R1[..., None]).reshape(*place_PW.shape, -1)
        survivors = beams.survive(state, candidates, score_PW, place_PW)
        tag_log_prob_PW = jnp.where(
            survivors.is_running_PW,
            state.asked.tag_log_prob(log_probs_PWV),
            beams.follow(state.tag_log_prob_PW, parent_PW),
        )
        new = beams.with_lookahead(
            config,
            survivors,
            is_held_PW=beams.pick(candidates.is_held_PWC, place_PW),
            tag_log_prob_PW=tag_log_prob_PW,
            next_log_probs_PWV=log_probs_PWV,
        )
        every_PWC = jnp.ones(candidates.tokens_PWC.shape, bool)
        tried = beams.tried(
            candidates, _looked_at(candidates, tag_log_prob_PW, place_PW), every_PWC, score_PW, place_PW
        )
        # So that the write waits for all that reads the cache, and XLA writes in place.
        lengths_R = jnp.where(jnp.isnan(normaliser_R1[:, 0]), cache.max_len, lengths_R)
        first_R = jnp.zeros_like(lengths_R)
        cache = kv_cache.write_next(cache, new_kv, first_R, lengths_R, is_native=weights.is_packed)
        return asked_lib.keep(state.is_over_P, state, new), cache, tried


def _looked_at(candidates: beams.Candidates, tag_log_prob_PW: Array, place_PW: Array) -> Array:
    """The pool's P(tag), known only for survivors."""
    shape = candidates.tokens_PWC.shape
    unknown_PM = jnp.full((shape[0], shape[1] * shape[2]), jnp.nan)
    return unknown_PM.at[jnp.arange(shape[0])[:, None], place_PW].set(tag_log_prob_PW).reshape(shape)
