"""What beam search and SafeBeam share: the beams, their candidates, and which candidates become the next beams.

W beams per prompt, C candidates per beam. The pool of a prompt's candidates is ordered by beam, then by candidate;
beams stand in order of their score and candidates in order of their log-prob (equal ones by token id). Wherever two
candidates compare equal, the one that stands earlier in the pool is preferred: so every choice is deterministic.
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from safelm import model
from safelm.inference import forward
from safelm.inference.forward import Ends
from safelm.model_config import ModelConfig


@flax.struct.dataclass
class BeamState:
    """What the search carries from step to step."""

    step: jax.Array  # tokens generated so far by beams that still run
    tokens_PWT: jax.Array  # generated tokens, the ending one included; T = max_new_tokens
    tag_log_probs_PWT: jax.Array  # log P(tag | prompt and tokens up to here)
    num_tokens_PW: jax.Array
    log_prob_PW: jax.Array
    score_PW: jax.Array  # what beams are compared by; -inf in slots without a beam
    tag_log_prob_PW: jax.Array  # log P(tag | text so far), of an ended beam that of its text before the ending token
    ends_PW: jax.Array  # forward.RUNNING, ENDED_BY_EOS, ENDED_BY_TAG
    next_log_probs_PWV: jax.Array
    cache: model.KVCache  # P * W rows: prompt and generated tokens

    @property
    def is_beam_PW(self) -> jax.Array:
        return self.score_PW > forward.NEVER

    @property
    def is_running_PW(self) -> jax.Array:
        return self.is_beam_PW & (self.ends_PW == forward.RUNNING)


OUTCOME = ("tokens_PWT", "tag_log_probs_PWT", "num_tokens_PW", "log_prob_PW", "score_PW", "ends_PW")


@flax.struct.dataclass
class Candidates:
    """The continuations of every beam. An ended beam's only candidate is itself, in its first place."""

    tokens_PWC: jax.Array
    log_prob_PWC: jax.Array  # of the whole sequence; -inf where there is no candidate
    ends_PWC: jax.Array
    is_held_PWC: jax.Array  # an ended beam standing for itself: no token is added
    num_tokens_PWC: jax.Array


def start(
    config: ModelConfig,
    params: model.Params,
    prompt_PT: Int[Array, "P T"],
    lengths_P: Int[Array, " P"],
    ends: Ends,
    *,
    num_beams: int,
    max_new_tokens: int,
) -> BeamState:
    """One beam per prompt, the prompt itself with log-prob 0, in the first of `num_beams` slots; filling rows: none."""
    cache_len = min(prompt_PT.shape[1] + max_new_tokens, config.max_seq_len)
    cache, log_probs_PV = forward.read_prompts(config, params, prompt_PT, lengths_P, cache_len=cache_len)
    is_beam_PW = (jnp.arange(num_beams) == 0) & (lengths_P > 0)[:, None]
    shape = is_beam_PW.shape
    next_log_probs_PWV = jnp.broadcast_to(log_probs_PV[:, None], (*shape, log_probs_PV.shape[-1]))
    return BeamState(
        step=jnp.zeros((), jnp.int32),
        tokens_PWT=jnp.full((*shape, max_new_tokens), ends.eos_id, jnp.int32),
        tag_log_probs_PWT=jnp.full((*shape, max_new_tokens), forward.NEVER, jnp.float32),
        num_tokens_PW=jnp.zeros(shape, jnp.int32),
        log_prob_PW=jnp.where(is_beam_PW, 0.0, forward.NEVER),
        score_PW=jnp.where(is_beam_PW, 0.0, forward.NEVER),
        tag_log_prob_PW=ends.tag_log_prob(next_log_probs_PWV),
        ends_PW=jnp.full(shape, forward.RUNNING, jnp.int32),
        next_log_probs_PWV=next_log_probs_PWV,
        cache=jax.tree.map(lambda kv: jnp.repeat(kv, num_beams, axis=1), cache),
    )


def expand(config: ModelConfig, state: BeamState, ends: Ends, *, num_candidates: int) -> Candidates:
    """Every running beam's `num_candidates` likeliest next tokens; every ended beam itself."""
    choosable_PWV = ends.choosable(config, state.next_log_probs_PWV)
    log_prob_PWC, tokens_PWC = jax.lax.top_k(choosable_PWV, num_candidates)
    has_ended_PW1 = (state.is_beam_PW & ~state.is_running_PW)[..., None]
    is_held_PWC = has_ended_PW1 & (jnp.arange(num_candidates) == 0)
    running_PWC = jnp.where(state.is_running_PW[..., None], state.log_prob_PW[..., None] + log_prob_PWC, forward.NEVER)
    return Candidates(
        tokens_PWC=tokens_PWC,
        log_prob_PWC=jnp.where(is_held_PWC, state.log_prob_PW[..., None], running_PWC),
        ends_PWC=jnp.where(has_ended_PW1, state.ends_PW[..., None], ends.of(tokens_PWC)),
        is_held_PWC=is_held_PWC,
        num_tokens_PWC=state.num_tokens_PW[..., None] + ~is_held_PWC,
    )


def select(score_PWC: Float[Array, "P W C"], num_beams: int) -> tuple[Float[Array, "P W"], Int[Array, "P W"]]:
    """The best `num_beams` of each prompt's pool: their scores, best first, and places in the pool."""
    score_PW, place_PW = jax.lax.top_k(score_PWC.reshape(score_PWC.shape[0], -1), num_beams)
    return score_PW, place_PW


def pick(array_PWC: Array, place_PW: Int[Array, "P W"]) -> Array:
    """The pool's entries at these places; trailing axes of the entries come along."""
    num_prompts, num_beams, num_candidates, *rest = array_PWC.shape
    pool = array_PWC.reshape(num_prompts, num_beams * num_candidates, *rest)
    return jnp.take_along_axis(pool, place_PW.reshape(*place_PW.shape, *(1 for _ in rest)), axis=1)


def follow(array_PW: Array, parent_PW: Int[Array, "P W"]) -> Array:
    """Each new beam's value of its parent; trailing axes come along."""
    return jnp.take_along_axis(array_PW, parent_PW.reshape(*parent_PW.shape, *(1 for _ in array_PW.shape[2:])), axis=1)


def follow_cache(cache: model.KVCache, parent_PW: Int[Array, "P W"]) -> model.KVCache:
    """Each new beam's cache rows: its parent's."""
    num_prompts, num_beams = parent_PW.shape
    parent_R = (parent_PW + num_beams * jnp.arange(num_prompts)[:, None]).reshape(-1)
    return jax.tree.map(lambda kv: jnp.take(kv, parent_R, axis=1), cache)


def survive(
    state: BeamState, candidates: Candidates, score_PW: Float[Array, "P W"], place_PW: Int[Array, "P W"]
) -> BeamState:
    """The selected candidates as beams: tokens and counts. What the model says after them is left as it was."""
    parent_PW = place_PW // candidates.tokens_PWC.shape[2]
    tokens_PWT = follow(state.tokens_PWT, parent_PW)
    token_PW = jnp.where(
        pick(candidates.is_held_PWC, place_PW), tokens_PWT[..., state.step], pick(candidates.tokens_PWC, place_PW)
    )
    return state.replace(
        step=state.step + 1,
        tokens_PWT=tokens_PWT.at[..., state.step].set(token_PW),
        tag_log_probs_PWT=follow(state.tag_log_probs_PWT, parent_PW),
        num_tokens_PW=pick(candidates.num_tokens_PWC, place_PW),
        log_prob_PW=pick(candidates.log_prob_PWC, place_PW),
        score_PW=score_PW,
        ends_PW=pick(candidates.ends_PWC, place_PW),
    )


def with_lookahead(
    survivors: BeamState,
    *,
    is_held_PW: Bool[Array, "P W"],
    tag_log_prob_PW: Float[Array, "P W"],
    next_log_probs_PWV: Float[Array, "P W V"],
    cache: model.KVCache,
) -> BeamState:
    """The survivors with what the model says after them; held beams get no new entry in their trace."""
    column = survivors.step - 1
    trace_PWT = survivors.tag_log_probs_PWT
    trace_PW = jnp.where(is_held_PW, trace_PWT[..., column], tag_log_prob_PW)
    return survivors.replace(
        tag_log_probs_PWT=trace_PWT.at[..., column].set(trace_PW),
        tag_log_prob_PW=tag_log_prob_PW,
        next_log_probs_PWV=next_log_probs_PWV,
        cache=cache,
    )


def run(
    state: BeamState,
    step: Callable[[BeamState], BeamState],
    is_decided: Callable[[BeamState], Array],
    max_new_tokens: int,
) -> BeamState:
    """Steps until every prompt's outcome is decided or the length is reached; decided prompts stay as they are."""

    def is_over_P(state: BeamState) -> Array:
        return is_decided(state) | ~state.is_running_PW.any(axis=1)

    def step_the_undecided(old: BeamState) -> BeamState:
        new, is_over = step(old), is_over_P(old)

        def frozen(name: str) -> Array:
            mine, others = getattr(old, name), getattr(new, name)
            return jnp.where(is_over.reshape(-1, *(1 for _ in mine.shape[1:])), mine, others)

        return new.replace(**{name: frozen(name) for name in OUTCOME})

    return jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & ~is_over_P(state).all(), step_the_undecided, state
    )
