"""Decoding without beams that guesses tokens by looking them up in the text, and checks them in one forward pass.

Where the last three tokens stand in the prompt or the text already, what followed them there is a guess of what follows
now (prompt lookup decoding, Saxena 2023). One forward pass over the next token and the guesses tells
what the model itself says behind each; guesses are kept as far as it says the same. So the text is that of plain
decoding, a drawn one too, since a draw depends on seed and step only. Texts that copy (rewrites, quotes, code) need
fewer passes. Where no text of a batch has a guess, the pass is a plain one.

Axes: see `safelm.inference.asked`; G guesses.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from safelm.inference import asked as asked_lib
from safelm.inference import forward
from safelm.inference.asked import Asked
from safelm.inference.kv_cache import Cache
from safelm.inference.sampling import Sequences, SequenceState
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

MOST_LOOKUP_TOKENS = 15
HELP = "tokens guessed from the text so far and checked at once: the same text, faster where it copies (default: 0)"


@dataclasses.dataclass(frozen=True)
class Lookups(Sequences):
    """The shape of a decoding step that takes up to `tokens_per_step` tokens, all but one of them guesses."""

    def start(
        self, config: ModelConfig, asked: Asked, logits_PV: Float[Array, "P V"], *, max_len: int
    ) -> SequenceState:
        """As `Sequences.start`; the prompts have yet to be put into `text_PS`."""
        state = super().start(config, asked, logits_PV, max_len=max_len)
        return state.replace(text_PS=jnp.zeros((logits_PV.shape[0], max_len), jnp.int32))

    def step(
        self, config: ModelConfig, weights: Weights, state: SequenceState, cache: Cache
    ) -> tuple[SequenceState, Cache, None]:
        """One more token for every prompt that isn't over, and the guesses behind it that are what would follow."""
        lengths_P = state.asked.prompt_lengths_P + state.step_P
        rows_P1 = jnp.arange(len(lengths_P))[:, None]
        text_PS = state.text_PS.at[rows_P1, lengths_P[:, None]].set(state.next_tokens_PC, mode="drop")
        guesses_PG, has_guess_P = guesses(text_PS, lengths_P + 1, self.tokens_per_step - 1)
        state = state.replace(text_PS=text_PS)
        check = functools.partial(self._check, config, weights, guesses_PG)
        step = functools.partial(super().step, config, weights)
        state, cache = jax.lax.cond(
            (has_guess_P & ~state.is_over_P).any(), check, lambda *given: step(*given)[:2], state, cache
        )
        return state, cache, None

    def _check(
        self, config: ModelConfig, weights: Weights, guesses_PG: jax.Array, state: SequenceState, cache: Cache
    ) -> tuple[SequenceState, Cache]:
        """One forward pass over the next tokens and the guesses behind them; as many steps as these are right."""
        lengths_P = state.asked.prompt_lengths_P + state.step_P
        rows_P1 = jnp.arange(len(lengths_P))[:, None]
        tokens_PT = jnp.concatenate([state.next_tokens_PC, guesses_PG], axis=1)
        x_PTD, cache = forward.read_on(config, weights, tokens_PT, cache, lengths_P)
        logits_PTV = forward.logits_of(config, weights, x_PTD)
        text_PS = state.text_PS
        state, _, _ = self.after(config, weights, state, logits_PTV[:, :1])
        is_right_P = jnp.ones(len(lengths_P), bool)
        for place in range(1, self.tokens_per_step):
            is_right_P &= (state.next_tokens_PC[:, 0] == tokens_PT[:, place]) & ~state.is_over_P
            step = functools.partial(self._kept, config, weights, logits_PTV[:, place : place + 1], is_right_P)
            state = jax.lax.cond(is_right_P.any(), step, lambda state: state, state)
        columns_PT = lengths_P[:, None] + jnp.arange(self.tokens_per_step)
        state = state.replace(text_PS=text_PS.at[rows_P1, columns_PT].set(tokens_PT, mode="drop"))
        return state, cache

    def _kept(
        self,
        config: ModelConfig,
        weights: Weights,
        logits_P1V: jax.Array,
        is_right_P: jax.Array,
        state: SequenceState,
    ) -> SequenceState:
        """The state one token further where the guess is right."""
        return asked_lib.keep(~is_right_P, state, self.after(config, weights, state, logits_P1V)[0])


def guesses(
    text_PS: Int[Array, "P S"], lengths_P: Int[Array, " P"], count: int
) -> tuple[Int[Array, "P G"], Bool[Array, " P"]]:
    """What followed the last three tokens of each text of `lengths_P` tokens at the last place where they stood before.

    Places with `count` tokens behind them go first. Returns also whether there is a place; where there is none, the
    guesses are any tokens.
    """
    places_S = jnp.arange(text_PS.shape[1])

    def back(distance: int) -> jax.Array:
        """Whether the token so far before each place is the one so far before the text's end."""
        before_PS = jnp.roll(text_PS, distance, axis=1)
        last_P1 = jnp.take_along_axis(text_PS, jnp.maximum(lengths_P - 1 - distance, 0)[:, None], axis=1)
        return (before_PS == last_P1) & (places_S >= distance)

    is_like_end_PS = back(0) & back(1) & back(2) & (places_S < lengths_P[:, None] - 1)
    has_room_PS = places_S + count < lengths_P[:, None]
    score_PS = jnp.where(is_like_end_PS, places_S + text_PS.shape[1] * has_room_PS, -1)
    place_P1 = jnp.argmax(score_PS, axis=1)[:, None]
    found_PG = jnp.take_along_axis(text_PS, place_P1 + 1 + jnp.arange(count), axis=1, mode="clip")
    return found_PG, is_like_end_PS.any(axis=1)
