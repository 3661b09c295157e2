"""The common part of beam search and SafeBeam: beams, their candidates, and the choice of the next beams.

W beams per prompt, C candidates per beam. The pool of a prompt's candidates is ordered by beam, then by candidate;
beams stand in order of their score and candidates in order of their log-prob (equal ones by token id). Of equal
candidates the earlier one in the pool is preferred, so every choice is deterministic.
"""

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.inference import asked as asked_lib
from safelm.inference import forward
from safelm.inference.asked import NEVER, RUNNING, Asked
from safelm.models.arrays import Leaf
from safelm.models.config import ModelConfig


@flax.struct.dataclass
class BeamState:
    """The state of a search between steps."""

    asked: Asked
    step_P: Leaf  # tokens generated so far by beams that still run
    tokens_PWT: Leaf  # generated tokens, the ending one included
    tag_log_probs_PWT: Leaf  # log P(tag | prompt and tokens up to here)
    num_tokens_PW: Leaf
    log_prob_PW: Leaf
    score_PW: Leaf  # what beams are compared by; -inf in slots without a beam
    tag_log_prob_PW: Leaf  # log P(tag | text so far), of an ended beam that of its text before the ending token
    ends_PW: Leaf
    next_tokens_PWC: Leaf  # the likeliest continuations of every beam, best first
    next_log_probs_PWC: Leaf
    holders_PWS: Leaf | None = None  # which of the prompt's rows holds each cached token of a beam; None: its own

    @property
    def is_beam_PW(self) -> jax.Array:
        return self.score_PW > NEVER

    @property
    def is_running_PW(self) -> jax.Array:
        return self.is_beam_PW & (self.ends_PW == RUNNING)

    @property
    def is_over_P(self) -> jax.Array:
        """Whether a prompt's outcome is settled, by the bound that holds for plain beam search."""
        is_exhausted_P = ~self.is_running_PW.any(axis=1) | (self.step_P >= self.asked.limits_P)
        drops_none_P = ~self.asked.drop_counts_PM.any(axis=1)
        return is_exhausted_P | (drops_none_P & is_decided(self))

    @property
    def num_final_P(self) -> jax.Array:
        """Tokens that the answer begins with whatever comes: all live beams do; once it is settled, all of its own."""
        tokens_PWT, is_beam_PW = jnp.asarray(self.tokens_PWT), self.is_beam_PW
        shortest_P = jnp.where(is_beam_PW, self.num_tokens_PW, tokens_PWT.shape[2]).min(axis=1)
        is_shared_PWT = (tokens_PWT == tokens_PWT[:, :1]) | ~is_beam_PW[..., None]
        is_shared_PT = is_shared_PWT.all(axis=1) & (jnp.arange(tokens_PWT.shape[2]) < shortest_P[:, None])
        shared_P = jnp.cumprod(is_shared_PT, axis=1, dtype=jnp.int32).sum(axis=1)
        return jnp.where(self.is_over_P, self.num_tokens_PW[:, 0], shared_P)

    def outcome(self) -> tuple[jax.Array, ...]:
        """The outcome of the best beam, which is the first; as `sampling.SequenceState.outcome`."""
        beams = (self.tokens_PWT, self.tag_log_probs_PWT, self.num_tokens_PW, self.log_prob_PW, self.ends_PW)
        return tuple(array[:, 0] for array in beams)

    def with_room(self, max_len: int) -> "BeamState":
        """A copy with room for `max_len` tokens."""
        return self.replace(
            tokens_PWT=asked_lib.with_room(self.tokens_PWT, max_len),
            tag_log_probs_PWT=asked_lib.with_room(self.tag_log_probs_PWT, max_len, NEVER),
            holders_PWS=None if self.holders_PWS is None else asked_lib.with_room(self.holders_PWS, max_len),
        )


@flax.struct.dataclass
class Candidates:
    """The continuations of every beam. An ended beam's only candidate is itself, in its first place."""

    tokens_PWC: Leaf
    log_prob_PWC: Leaf  # of the whole sequence; -inf where there is no candidate
    ends_PWC: Leaf
    is_held_PWC: Leaf  # an ended beam standing for itself: no token is added
    num_tokens_PWC: Leaf


@flax.struct.dataclass
class Tried:
    """A step for a trace: the pool's candidates, and the pool places of the resulting beams."""

    tokens_PM: Leaf
    log_prob_PM: Leaf  # -inf where there is no candidate
    tag_log_prob_PM: Leaf  # nan where nobody looked
    is_dropped_PM: Leaf
    is_held_PM: Leaf
    place_PW: Leaf
    is_beam_PW: Leaf


def is_decided(state: BeamState) -> Array:
    """Whether no running beam can still beat the best ended one, since scores only fall and lengths are bounded."""
    has_ended_PW = state.is_beam_PW & ~state.is_running_PW
    best_ended_P = jnp.where(has_ended_PW, state.score_PW, NEVER).max(axis=1)
    longest_P1 = jnp.maximum(state.asked.limits_P, 1).astype(jnp.float32)[:, None]
    reachable_PW = state.log_prob_PW / longest_P1 ** state.asked.length_penalties_P[:, None]
    reachable_PW = jnp.where(state.asked.anchors_P[:, None] > 0, state.score_PW, reachable_PW)
    return best_ended_P > jnp.where(state.is_running_PW, reachable_PW, NEVER).max(axis=1)


def start(
    config: ModelConfig,
    asked: Asked,
    logits_PV: Float[Array, "P V"],
    *,
    num_beams: int,
    num_candidates: int,
    max_len: int,
) -> BeamState:
    """One beam per prompt, the prompt itself with log-prob 0, in the first of `num_beams` slots."""
    log_probs_PV = logits_PV - forward.log_normaliser(logits_PV)[:, None]
    is_beam_PW = (jnp.arange(num_beams) == 0) & (asked.prompt_lengths_P > 0)[:, None]
    shape = is_beam_PW.shape
    log_prob_PW = jnp.where(is_beam_PW, 0, NEVER).astype(jnp.float32)
    next_log_probs_PC, next_tokens_PC = jax.lax.top_k(asked.choosable(config, log_probs_PV), num_candidates)

    def every_beam(array_P: Array) -> Array:
        return jnp.broadcast_to(array_P[:, None], (*shape, *array_P.shape[1:]))

    return BeamState(
        asked=asked,
        step_P=jnp.zeros(shape[0], jnp.int32),
        tokens_PWT=jnp.zeros((*shape, max_len), jnp.int32),
        tag_log_probs_PWT=jnp.full((*shape, max_len), NEVER, jnp.float32),
        num_tokens_PW=jnp.zeros(shape, jnp.int32),
        log_prob_PW=log_prob_PW,
        score_PW=log_prob_PW,
        tag_log_prob_PW=every_beam(asked.tag_log_prob(log_probs_PV)),
        ends_PW=jnp.full(shape, RUNNING, jnp.int32),
        next_tokens_PWC=every_beam(next_tokens_PC),
        next_log_probs_PWC=every_beam(next_log_probs_PC),
    )


def expand(state: BeamState) -> Candidates:
    """Every running beam's likeliest next tokens; every ended beam itself."""
    num_candidates = state.next_tokens_PWC.shape[2]
    has_ended_PW1 = (state.is_beam_PW & ~state.is_running_PW)[..., None]
    is_held_PWC = has_ended_PW1 & (jnp.arange(num_candidates) == 0)
    log_prob_PW1 = state.log_prob_PW[..., None]
    running_PWC = jnp.where(state.is_running_PW[..., None], log_prob_PW1 + state.next_log_probs_PWC, NEVER)
    return Candidates(
        tokens_PWC=state.next_tokens_PWC,
        log_prob_PWC=jnp.where(is_held_PWC, log_prob_PW1, running_PWC),
        ends_PWC=jnp.where(has_ended_PW1, state.ends_PW[..., None], state.asked.end_of(state.next_tokens_PWC)),
        is_held_PWC=is_held_PWC,
        num_tokens_PWC=state.num_tokens_PW[..., None] + ~is_held_PWC,
    )


def select(score_PWC: Float[Array, "P W C"], num_beams: int) -> tuple[Float[Array, "P W"], Int[Array, "P W"]]:
    """The best `num_beams` of each prompt's pool: their scores, best first, and places in the pool."""
    score_PW, place_PW = jax.lax.top_k(score_PWC.reshape(score_PWC.shape[0], -1), num_beams)
    return score_PW, place_PW


def pick(array_PWC: Array, place_PW: Int[Array, "P W"]) -> Array:
    """The pool's entries at these places, with their trailing axes."""
    num_prompts, num_beams, num_candidates, *rest = array_PWC.shape
    pool = array_PWC.reshape(num_prompts, num_beams * num_candidates, *rest)
    return jnp.take_along_axis(pool, place_PW.reshape(*place_PW.shape, *(1 for _ in rest)), axis=1)


def follow(array_PW: Array, parent_PW: Int[Array, "P W"]) -> Array:
    """The value of each new beam's parent, with its trailing axes."""
    return jnp.take_along_axis(array_PW, parent_PW.reshape(*parent_PW.shape, *(1 for _ in array_PW.shape[2:])), axis=1)


def rows_of(beam_PW: Int[Array, "P W"]) -> Int[Array, " R"]:
    """The cache rows of each prompt's beams."""
    num_prompts, num_beams = beam_PW.shape
    return (beam_PW + num_beams * jnp.arange(num_prompts)[:, None]).reshape(-1)


def survive(
    state: BeamState, candidates: Candidates, score_PW: Float[Array, "P W"], place_PW: Int[Array, "P W"]
) -> BeamState:
    """The selected candidates as beams with updated tokens and counts.

    The model's predictions after them are unchanged.
    """
    parent_PW = place_PW // candidates.tokens_PWC.shape[2]
    column = _column(state)
    tokens_PWT = follow(state.tokens_PWT, parent_PW)
    token_PW = jnp.where(
        pick(candidates.is_held_PWC, place_PW), tokens_PWT[column], pick(candidates.tokens_PWC, place_PW)
    )
    return state.replace(
        step_P=state.step_P + 1,
        tokens_PWT=tokens_PWT.at[column].set(token_PW, mode="drop"),
        tag_log_probs_PWT=follow(state.tag_log_probs_PWT, parent_PW),
        num_tokens_PW=pick(candidates.num_tokens_PWC, place_PW),
        log_prob_PW=pick(candidates.log_prob_PWC, place_PW),
        score_PW=score_PW,
        ends_PW=pick(candidates.ends_PWC, place_PW),
    )


def with_lookahead(
    config: ModelConfig,
    survivors: BeamState,
    *,
    is_held_PW: Array,
    tag_log_prob_PW: Float[Array, "P W"],
    next_log_probs_PWV: Float[Array, "P W V"],
) -> BeamState:
    """The survivors with the model's predictions after them; held beams get no new entry in their trace."""
    column = _column(survivors, before=1)
    trace_PWT = survivors.tag_log_probs_PWT
    trace_PW = jnp.where(is_held_PW, trace_PWT[column], tag_log_prob_PW)
    choosable_PWV = survivors.asked.choosable(config, next_log_probs_PWV)
    next_log_probs_PWC, next_tokens_PWC = jax.lax.top_k(choosable_PWV, survivors.next_tokens_PWC.shape[2])
    return survivors.replace(
        tag_log_probs_PWT=trace_PWT.at[column].set(trace_PW, mode="drop"),
        tag_log_prob_PW=tag_log_prob_PW,
        next_tokens_PWC=next_tokens_PWC,
        next_log_probs_PWC=next_log_probs_PWC,
    )


def _column(state: BeamState, before: int = 0) -> tuple[Array, Array, Array]:
    """The indices of this step's token in arrays [P, W, T]."""
    num_prompts, num_beams = state.num_tokens_PW.shape
    prompts_P1, beams_1W = jnp.arange(num_prompts)[:, None], jnp.arange(num_beams)[None, :]
    return prompts_P1, beams_1W, state.step_P[:, None] - before


def tried(
    candidates: Candidates, tag_log_prob_PWC: Array, is_kept_PWC: Array, score_PW: Array, place_PW: Array
) -> Tried:
    """A step for the trace."""

    def flat(array_PWC: Array) -> Array:
        return array_PWC.reshape(array_PWC.shape[0], -1)

    is_candidate_PWC = candidates.log_prob_PWC > NEVER
    return Tried(
        tokens_PM=flat(candidates.tokens_PWC),
        log_prob_PM=flat(candidates.log_prob_PWC),
        tag_log_prob_PM=flat(tag_log_prob_PWC),
        is_dropped_PM=flat(is_candidate_PWC & ~is_kept_PWC),
        is_held_PM=flat(candidates.is_held_PWC),
        place_PW=place_PW,
        is_beam_PW=score_PW > NEVER,
    )
