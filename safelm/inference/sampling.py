"""Decodes one sequence per prompt: greedy, temperature / top-k / top-p sampling, and sampling with a tag penalty.

All three share one step: run one forward pass over the best C next tokens (by log-prob, with Gumbel noise when
sampling, so that the largest is an exact draw), choose among them, and rank the tokens that may follow. C is 1 except
with the tag penalty. With one candidate the next token is known before its forward pass; an ending token needs none.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.inference import asked as asked_lib
from safelm.inference import forward, kv_cache
from safelm.inference.asked import NEVER, RUNNING, Asked
from safelm.inference.kv_cache import Cache
from safelm.inference.truncation import filtered
from safelm.inference.weights import Weights
from safelm.models.arrays import Leaf
from safelm.models.config import ModelConfig


@flax.struct.dataclass
class SequenceState:
    """The state of decoding between steps."""

    asked: Asked
    step_P: Leaf  # tokens generated so far
    tokens_PT: Leaf  # generated tokens, the ending one included
    tag_log_probs_PT: Leaf  # log P(tag | prompt and tokens up to here)
    log_prob_P: Leaf  # the model's own, neither tempered nor filtered
    ends_P: Leaf
    tag_log_prob_P: Leaf  # log P(tag | text so far)
    next_tokens_PC: Leaf  # what is tried next, best first
    next_log_probs_PC: Leaf
    next_scores_PC: Leaf  # what the next token is the argmax of
    text_PS: Leaf = None  # prompt and text so far, for a shape that looks up in it (`safelm.inference.lookup`)

    @property
    def is_over_P(self) -> jax.Array:
        return (self.ends_P != RUNNING) | (self.step_P >= self.asked.limits_P)

    @property
    def num_final_P(self) -> jax.Array:
        """Every token is final at once."""
        return jnp.asarray(self.step_P)

    def outcome(self) -> tuple[jax.Array, ...]:
        """Tokens, log P(tag) of each, their number, the log-prob of all, and how each prompt's sequence ended."""
        return self.tokens_PT, self.tag_log_probs_PT, self.step_P, self.log_prob_P, self.ends_P

    def with_room(self, max_len: int) -> "SequenceState":
        """A copy with room for `max_len` tokens."""
        return self.replace(
            tokens_PT=asked_lib.with_room(self.tokens_PT, max_len),
            tag_log_probs_PT=asked_lib.with_room(self.tag_log_probs_PT, max_len, NEVER),
            text_PS=None if self.text_PS is None else asked_lib.with_room(self.text_PS, max_len),
        )


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The shape of a decoding step with one row of the cache per prompt."""

    num_candidates: int = 1
    num_rows: int = 1
    num_dropped_from: int = 0
    tokens_per_step: int = 1  # at most

    def start(
        self, config: ModelConfig, asked: Asked, logits_PV: Float[Array, "P V"], *, max_len: int
    ) -> SequenceState:
        """The state after the prompts, with room for `max_len` tokens."""
        num_prompts = logits_PV.shape[0]
        log_probs_PV = logits_PV - forward.log_normaliser(logits_PV)[:, None]
        step_P, no_tokens_PT = jnp.zeros(num_prompts, jnp.int32), jnp.zeros((num_prompts, max_len), jnp.int32)
        state = SequenceState(
            asked=asked,
            step_P=step_P,
            tokens_PT=no_tokens_PT,
            tag_log_probs_PT=jnp.full((num_prompts, max_len), NEVER, jnp.float32),
            log_prob_P=jnp.zeros(num_prompts, jnp.float32),
            ends_P=jnp.full(num_prompts, RUNNING, jnp.int32),
            tag_log_prob_P=asked.tag_log_prob(log_probs_PV),
            **_ranked(config, asked, log_probs_PV, no_tokens_PT, step_P, self.num_candidates),
        )
        return _settled(state)

    def step(
        self, config: ModelConfig, weights: Weights, state: SequenceState, cache: Cache
    ) -> tuple[SequenceState, Cache, None]:
        """One more token for every prompt that isn't over."""
        lengths_P = state.asked.prompt_lengths_P + state.step_P
        logits_PCV, new_kv = forward.try_next(config, weights, state.next_tokens_PC, cache, lengths_P)
        new, choice_P, normaliser_P = self.after(config, weights, state, logits_PCV)
        # Nothing is written after logits that are not numbers: so the write waits for all that reads the cache, and
        # XLA writes in place. Otherwise it copies the whole cache, twice a step.
        lengths_P = jnp.where(jnp.isnan(normaliser_P), cache.max_len, lengths_P)
        return new, kv_cache.write_next(cache, new_kv, choice_P, lengths_P, is_native=weights.is_packed), None

    def after(
        self, config: ModelConfig, weights: Weights, state: SequenceState, logits_PCV: Float[Array, "P C V"]
    ) -> tuple[SequenceState, Int[Array, " P"], Float[Array, " P"]]:
        """The state one token further, from the logits behind each candidate; of a prompt that is over the same state.

        Returns also the chosen candidate, and the log-normaliser of the logits behind it.
        """
        asked = state.asked
        normaliser_PC = forward.log_normaliser(logits_PCV, is_native=weights.is_packed)
        # A token that ends the text adds nothing to it: its lookahead is the one of the text as it stands.
        ends_PC = asked.end_of(state.next_tokens_PC)
        tag_log_prob_PC = jnp.where(
            ends_PC == RUNNING, asked.tag_log_prob(logits_PCV) - normaliser_PC, state.tag_log_prob_P[:, None]
        )
        is_penalised_PC = jnp.exp(tag_log_prob_PC) > asked.thresholds_P[:, None]
        scores_PC = state.next_scores_PC - jnp.where(is_penalised_PC, asked.penalties_P[:, None], 0.0)
        choice_P = jnp.argmax(scores_PC, axis=1)

        def pick(array_PC: Array) -> Array:
            return jnp.take_along_axis(array_PC, choice_P[:, None], axis=1)[:, 0]

        log_probs_PV = logits_PCV[:, 0]
        if self.num_candidates > 1:
            log_probs_PV = jnp.take_along_axis(logits_PCV, choice_P[:, None, None], axis=1)[:, 0]
        log_probs_PV -= pick(normaliser_PC)[:, None]
        step_P = state.step_P
        tokens_PT = _put(state.tokens_PT, step_P, pick(state.next_tokens_PC))
        new = state.replace(
            step_P=step_P + 1,
            tokens_PT=tokens_PT,
            tag_log_probs_PT=_put(state.tag_log_probs_PT, step_P, pick(tag_log_prob_PC)),
            log_prob_P=state.log_prob_P + pick(state.next_log_probs_PC),
            ends_P=pick(ends_PC),
            tag_log_prob_P=pick(tag_log_prob_PC),
            **_ranked(config, asked, log_probs_PV, tokens_PT, step_P + 1, self.num_candidates),
        )
        return asked_lib.keep(state.is_over_P, state, _settled(new)), choice_P, pick(normaliser_PC)

    def jump(
        self,
        config: ModelConfig,
        weights: Weights,
        state: SequenceState,
        cache: Cache,
        slots_J: Int[Array, " J"],
        tokens_JT: Int[Array, "J T"],
        counts_J: Int[Array, " J"],
    ) -> tuple[SequenceState, Cache]:
        """Adds several known tokens to some texts in one forward pass, instead of one step each.

        Args:
          slots_J: slots that aren't over; slots past the end only fill a bucket.
          tokens_JT: each slot's next token and the tokens after it, right-padded.
          counts_J: number of tokens of each slot.
        """
        old, rows_J1 = asked_lib.pick_rows(state, slots_J), jnp.arange(len(slots_J))[:, None]
        lengths_J = old.asked.prompt_lengths_P + old.step_P
        x_JTD, new_kv = forward.read_behind(config, weights, tokens_JT, kv_cache.take_rows(cache, slots_J), lengths_J)
        logits_JTV = forward.logits_of(config, weights, x_JTD)
        log_probs_JTV = logits_JTV - forward.log_normaliser(logits_JTV, is_native=weights.is_packed)[..., None]
        said_JT = jnp.take_along_axis(log_probs_JTV[:, :-1], tokens_JT[:, 1:, None], axis=2)[..., 0]
        said_JT = jnp.concatenate([old.next_log_probs_PC, said_JT], axis=1)
        is_said_JT = jnp.arange(tokens_JT.shape[1]) < counts_J[:, None]
        tag_log_probs_JT = old.asked.tag_log_prob(log_probs_JTV)
        columns_JT = jnp.where(is_said_JT, old.step_P[:, None] + jnp.arange(tokens_JT.shape[1]), old.tokens_PT.shape[1])
        last_JV, step_J = forward.at_last(log_probs_JTV, counts_J), old.step_P + counts_J
        new_tokens_JT = old.tokens_PT.at[rows_J1, columns_JT].set(tokens_JT, mode="drop")
        new = old.replace(
            step_P=step_J,
            tokens_PT=new_tokens_JT,
            tag_log_probs_PT=old.tag_log_probs_PT.at[rows_J1, columns_JT].set(tag_log_probs_JT, mode="drop"),
            log_prob_P=old.log_prob_P + jnp.where(is_said_JT, said_JT, 0).sum(axis=1),
            tag_log_prob_P=old.asked.tag_log_prob(last_JV),
            **_ranked(config, old.asked, last_JV, new_tokens_JT, step_J, self.num_candidates),
        )
        state = jax.tree.map(lambda all_, own: all_.at[slots_J].set(own, mode="drop"), state, _settled(new))
        lengths_J = jnp.where(jnp.isnan(new.log_prob_P), cache.max_len, lengths_J)  # so that it is written in place
        return state, kv_cache.write_behind(cache, new_kv, lengths_J, slots_J, is_native=weights.is_packed)


def _put(old_PT: Array, step_P: Int[Array, " P"], new_P: Array) -> Array:
    return old_PT.at[jnp.arange(len(step_P)), step_P].set(new_P, mode="drop")


def _settled(state: SequenceState) -> SequenceState:
    """Adds next tokens that need no forward pass: those that end a text.

    Without a tag also the last one that `limits_P` allows, since no P(tag) after it is reported.
    """
    if state.next_tokens_PC.shape[1] > 1:
        return state
    asked, next_P = state.asked, state.next_tokens_PC[:, 0]
    ends_P = asked.end_of(next_P)
    is_last_P = ends_P != RUNNING
    if asked.harm_tag_id is None:
        is_last_P |= state.step_P + 1 >= asked.limits_P
    new = state.replace(
        step_P=state.step_P + 1,
        tokens_PT=_put(state.tokens_PT, state.step_P, next_P),
        tag_log_probs_PT=_put(state.tag_log_probs_PT, state.step_P, state.tag_log_prob_P),
        log_prob_P=state.log_prob_P + state.next_log_probs_PC[:, 0],
        ends_P=ends_P,
    )
    return asked_lib.keep(state.is_over_P | ~is_last_P, state, new)


def _ranked(
    config: ModelConfig,
    asked: Asked,
    log_probs_PV: Float[Array, "P V"],
    tokens_PT: Int[Array, "P T"],
    step_P: Int[Array, " P"],
    num_candidates: int,
) -> dict[str, Any]:
    """The `num_candidates` next tokens with the highest scores after `step_P` new tokens, best first."""
    choosable_PV = asked.choosable(config, log_probs_PV)
    if asked.adjustments is not None:
        choosable_PV = asked.adjustments.apply(choosable_PV, tokens_PT, step_P)
    scores_PC, tokens_PC = jax.lax.top_k(choosable_PV, num_candidates)
    scores_PC, tokens_PC = jax.lax.cond(
        asked.is_sampled_P.any(),
        lambda: _drawn(asked, choosable_PV, step_P, scores_PC, tokens_PC),
        lambda: (scores_PC, tokens_PC),
    )
    log_probs_PC = jnp.take_along_axis(log_probs_PV, tokens_PC, axis=1)
    return {"next_tokens_PC": tokens_PC, "next_log_probs_PC": log_probs_PC, "next_scores_PC": scores_PC}


def _drawn(
    asked: Asked,
    log_probs_PV: Float[Array, "P V"],
    step_P: Int[Array, " P"],
    scores_PC: Float[Array, "P C"],
    tokens_PC: Int[Array, "P C"],
) -> tuple[Float[Array, "P C"], Int[Array, "P C"]]:
    """Draws candidates without replacement for sampled prompts; other prompts' candidates are unchanged."""
    keys_P = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(asked.key_data_P2), step_P)
    gumbel_PV = jax.vmap(lambda key: jax.random.gumbel(key, log_probs_PV.shape[1:]))(keys_P)
    tempered_PV = log_probs_PV / asked.temperatures_P[:, None]
    filtered_PV = filtered(tempered_PV, top_k_P=asked.top_k_P, top_p_P=asked.top_p_P, is_used_P=asked.is_sampled_P)
    drawn_scores_PC, drawn_tokens_PC = jax.lax.top_k(filtered_PV + gumbel_PV, scores_PC.shape[1])
    is_sampled_P1 = asked.is_sampled_P[:, None]
    return jnp.where(is_sampled_P1, drawn_scores_PC, scores_PC), jnp.where(is_sampled_P1, drawn_tokens_PC, tokens_PC)
