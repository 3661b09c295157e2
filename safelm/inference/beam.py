"""Beam search: `safelm.inference.methods.Beam` for what its score is.

A prompt's search starts from one beam, the prompt. A beam that chooses EOS (or the tag, with tag_candidate="stop") has
ended: it keeps its log-prob, stays among the beams while its score is among the best, and is not expanded. The search
is over when no beam runs, when no running beam can still beat the best ended one, or at `max_new_tokens`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from safelm import model
from safelm.inference import beams, forward
from safelm.inference.forward import Ends
from safelm.inference.methods import Beam
from safelm.model_config import ModelConfig


@functools.partial(jax.jit, static_argnames=("config", "method", "ends", "max_new_tokens"))
def decode(
    config: ModelConfig,
    params: model.Params,
    prompt_PT: Int[Array, "P T"],
    lengths_P: Int[Array, " P"],
    *,
    method: Beam,
    ends: Ends,
    max_new_tokens: int,
) -> beams.BeamState:
    """Decodes a batch in one compiled program; beams come back best first. Rows of length 0 are filling."""
    state = beams.start(
        config, params, prompt_PT, lengths_P, ends, num_beams=method.num_beams, max_new_tokens=max_new_tokens
    )
    return beams.run(
        state,
        functools.partial(_step, config, params, method, ends, lengths_P),
        functools.partial(is_decided, length_penalty=method.length_penalty, max_new_tokens=max_new_tokens),
        max_new_tokens,
    )


def is_decided(state: beams.BeamState, *, length_penalty: float, max_new_tokens: int) -> Bool[Array, " P"]:
    """Whether no running beam can still beat the best ended one: log-probs only fall, lengths end at the limit."""
    has_ended_PW = state.is_beam_PW & ~state.is_running_PW
    best_ended_P = jnp.where(has_ended_PW, state.score_PW, forward.NEVER).max(axis=1)
    reachable_PW = state.log_prob_PW / max_new_tokens**length_penalty
    return best_ended_P > jnp.where(state.is_running_PW, reachable_PW, forward.NEVER).max(axis=1)


def _step(
    config: ModelConfig,
    params: model.Params,
    method: Beam,
    ends: Ends,
    prompt_lengths_P: Int[Array, " P"],
    state: beams.BeamState,
) -> beams.BeamState:
    candidates = beams.expand(config, state, ends, num_candidates=method.num_beams)
    lengths_PWC = candidates.num_tokens_PWC.astype(jnp.float32)
    score_PW, place_PW = beams.select(candidates.log_prob_PWC / lengths_PWC**method.length_penalty, method.num_beams)
    survivors = beams.survive(state, candidates, score_PW, place_PW)
    parent_PW = place_PW // method.num_beams
    lengths_R = jnp.repeat(prompt_lengths_P + state.step, method.num_beams)
    cache = beams.follow_cache(state.cache, parent_PW)
    tokens_R1 = survivors.tokens_PWT[..., state.step].reshape(-1, 1)
    log_probs_R1V, new_kv = forward.try_next(config, params, tokens_R1, cache, lengths_R)
    next_log_probs_PWV = log_probs_R1V.reshape(state.next_log_probs_PWV.shape)
    tag_log_prob_PW = jnp.where(
        survivors.is_running_PW, ends.tag_log_prob(next_log_probs_PWV), beams.follow(state.tag_log_prob_PW, parent_PW)
    )
    return beams.with_lookahead(
        survivors,
        is_held_PW=beams.pick(candidates.is_held_PWC, place_PW),
        tag_log_prob_PW=tag_log_prob_PW,
        next_log_probs_PWV=next_log_probs_PWV,
        cache=model.write_cache(cache, new_kv, lengths_R),
    )
