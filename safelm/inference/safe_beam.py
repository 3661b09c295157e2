"""SafeBeam: beam search steered by the harm tag's one-token lookahead (Maini et al. 2025, section 4.1, algorithm 1).

Each step, for every prompt: every running beam y proposes its N likeliest next tokens t with
log p(y + t) = log p(y) + log f(t | y); the lookahead of a candidate is f(tag | y + t); the `drop_fraction` of the pool
with the highest lookahead is dropped; of the rest the k with the highest log-prob are the next beams.

Cost: one forward over k * N candidates a step. Candidates of a beam share the beam's cache and don't see each other,
so nothing is copied per candidate; the same forward's output after a candidate is its lookahead and, should it survive,
its next expansion. Survivors' keys and values are then gathered and written once.

What the algorithm leaves open, decided here:
- Start: one beam, the prompt. So the first pool has N candidates and at most N - dropped beams come of it; the k slots
  fill within a few steps if N * (1 - drop_fraction) > 1.
- Pool: the N candidates of every running beam and every ended beam as one candidate. `drop_fraction` of the pool's size
  is dropped, rounded down (of 5 candidates 2), so at least one survives. Fewer than k survivors: the beams are fewer.
  With N = 1 a pool of k beams halves every step until one is left, which then goes on alone (greedily).
- Ended beams: a beam that chooses EOS keeps its log-prob, competes in every later pool, and is never expanded.
  Ending adds no text, so its lookahead is and stays that of the text it ends: f(tag | y), not f(tag | y + EOS), which a
  model of single documents never learns. EOS can neither hide what was said nor be dropped for what comes after it.
- The tag as a candidate: with "mask" it is never one; with "stop" a beam that chooses it ends (`stopped_by="tag"`),
  under the same rule as EOS. Ids that only pad the vocabulary are never candidates. Masks don't renormalise log-probs.
- Ties: a beam's candidates stand in the order of log-prob, equal ones by token id; beams in the order of log-prob. Of
  candidates with equal lookahead those that stand earlier stay; of equal log-prob the earlier is the better.
- No two beams are equal: they differ in their parent or in the token chosen, and ended beams propose nothing.
- End: no beam runs, or `max_new_tokens`; the answer is the beam with the highest log-prob, ended or not. With
  drop_fraction = 0 this is beam search (and ends early as that does); else an ended beam can still be dropped later.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from safelm import model
from safelm.inference import beam, beams, forward
from safelm.inference.forward import Ends
from safelm.inference.methods import SafeBeam
from safelm.model_config import ModelConfig


@functools.partial(jax.jit, static_argnames=("config", "method", "ends", "max_new_tokens"))
def decode(
    config: ModelConfig,
    params: model.Params,
    prompt_PT: Int[Array, "P T"],
    lengths_P: Int[Array, " P"],
    *,
    method: SafeBeam,
    ends: Ends,
    max_new_tokens: int,
) -> beams.BeamState:
    """Decodes a batch in one compiled program; beams come back best first. Rows of length 0 are filling."""
    state = beams.start(
        config, params, prompt_PT, lengths_P, ends, num_beams=method.num_beams, max_new_tokens=max_new_tokens
    )
    never = lambda state: jnp.zeros(lengths_P.shape, bool)  # noqa: E731
    drops_none = not any(method.drop_counts())
    by_bound = functools.partial(beam.is_decided, length_penalty=0.0, max_new_tokens=max_new_tokens)
    return beams.run(
        state,
        functools.partial(step, config, params, method, ends, lengths_P),
        by_bound if drops_none else never,
        max_new_tokens,
    )


def step(
    config: ModelConfig,
    params: model.Params,
    method: SafeBeam,
    ends: Ends,
    prompt_lengths_P: Int[Array, " P"],
    state: beams.BeamState,
) -> beams.BeamState:
    """One step of algorithm 1 for every prompt."""
    num_prompts, num_beams, vocab_size = state.next_log_probs_PWV.shape
    candidates = beams.expand(config, state, ends, num_candidates=method.num_candidates)
    lengths_R = jnp.repeat(prompt_lengths_P + state.step, num_beams)
    tokens_RC = candidates.tokens_PWC.reshape(num_prompts * num_beams, method.num_candidates)
    log_probs_RCV, new_kv = forward.try_next(config, params, tokens_RC, state.cache, lengths_R)
    log_probs_PWCV = log_probs_RCV.reshape(*candidates.tokens_PWC.shape, vocab_size)
    tag_log_prob_PWC = jnp.where(
        candidates.ends_PWC == forward.RUNNING, ends.tag_log_prob(log_probs_PWCV), state.tag_log_prob_PW[..., None]
    )
    is_kept_PWC = undropped(candidates.log_prob_PWC > forward.NEVER, tag_log_prob_PWC, method)
    score_PW, place_PW = beams.select(jnp.where(is_kept_PWC, candidates.log_prob_PWC, forward.NEVER), num_beams)
    parent_PW, choice_PW = jnp.divmod(place_PW, method.num_candidates)
    new_kv = beams.follow_cache(new_kv, parent_PW)
    return beams.with_lookahead(
        beams.survive(state, candidates, score_PW, place_PW),
        is_held_PW=beams.pick(candidates.is_held_PWC, place_PW),
        tag_log_prob_PW=beams.pick(tag_log_prob_PWC, place_PW),
        next_log_probs_PWV=beams.pick(log_probs_PWCV, place_PW),
        cache=forward.keep_one(beams.follow_cache(state.cache, parent_PW), new_kv, choice_PW.reshape(-1), lengths_R),
    )


def undropped(
    is_candidate_PWC: Bool[Array, "P W C"], tag_log_prob_PWC: Float[Array, "P W C"], method: SafeBeam
) -> Bool[Array, "P W C"]:
    """Which candidates stay when those with the highest lookahead of each prompt's pool are dropped."""
    is_candidate_PM = is_candidate_PWC.reshape(is_candidate_PWC.shape[0], -1)
    tag_log_prob_PM = jnp.where(is_candidate_PM, tag_log_prob_PWC.reshape(is_candidate_PM.shape), jnp.inf)
    safest_first_PM = jnp.argsort(tag_log_prob_PM, axis=1, stable=True)
    rank_PM = jnp.argsort(safest_first_PM, axis=1)
    size_P1 = is_candidate_PM.sum(axis=1, keepdims=True)
    num_kept_P1 = size_P1 - jnp.asarray(method.drop_counts())[size_P1]
    return (is_candidate_PM & (rank_PM < num_kept_P1)).reshape(is_candidate_PWC.shape)
