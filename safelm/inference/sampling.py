"""One sequence per prompt: greedy, temperature / top-k / top-p sampling, and sampling with a tag penalty.

The three are one loop: rank the next tokens (log-probs, with Gumbel noise when sampling: the largest is then an exact
draw), put the best C through one forward, choose among them. C is 1 but for the tag penalty.
"""

import functools

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from safelm import model
from safelm.inference import forward
from safelm.inference.forward import Ends
from safelm.inference.methods import Greedy, Sampling, TagPenaltySampling
from safelm.model_config import ModelConfig


@flax.struct.dataclass
class SequenceState:
    """What the decoding loop carries."""

    step: jax.Array  # tokens generated so far by rows that still run
    tokens_PT: jax.Array  # generated tokens, the ending one included; T = max_new_tokens
    tag_log_probs_PT: jax.Array  # log P(tag | prompt and tokens up to here)
    num_tokens_P: jax.Array
    log_prob_P: jax.Array  # the model's own, neither tempered nor filtered
    ends_P: jax.Array  # forward.RUNNING, ENDED_BY_EOS, ENDED_BY_TAG
    next_log_probs_PV: jax.Array
    cache: model.KVCache  # prompt and generated tokens


@functools.partial(jax.jit, static_argnames=("config", "method", "ends", "max_new_tokens"))
def decode(
    config: ModelConfig,
    params: model.Params,
    prompt_PT: Int[Array, "P T"],
    lengths_P: Int[Array, " P"],
    keys_P: Key[Array, " P"] | None,
    *,
    method: Greedy | Sampling | TagPenaltySampling,
    ends: Ends,
    max_new_tokens: int,
) -> SequenceState:
    """Decodes a batch in one compiled program; rows of length 0 are filling. `keys_P` is None for Greedy."""
    num_prompts, width = prompt_PT.shape
    cache_len = min(width + max_new_tokens, config.max_seq_len)
    cache, next_log_probs_PV = forward.read_prompts(config, params, prompt_PT, lengths_P, cache_len=cache_len)
    state = SequenceState(
        step=jnp.zeros((), jnp.int32),
        tokens_PT=jnp.full((num_prompts, max_new_tokens), ends.eos_id, jnp.int32),
        tag_log_probs_PT=jnp.full((num_prompts, max_new_tokens), forward.NEVER, jnp.float32),
        num_tokens_P=jnp.zeros(num_prompts, jnp.int32),
        log_prob_P=jnp.zeros(num_prompts, jnp.float32),
        ends_P=jnp.where(lengths_P > 0, forward.RUNNING, forward.ENDED_BY_EOS).astype(jnp.int32),
        next_log_probs_PV=next_log_probs_PV,
        cache=cache,
    )
    return jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & (state.ends_P == forward.RUNNING).any(),
        functools.partial(_step, config, params, method, ends, keys_P, lengths_P),
        state,
    )


def _step(
    config: ModelConfig,
    params: model.Params,
    method: Greedy | Sampling | TagPenaltySampling,
    ends: Ends,
    keys_P: Key[Array, " P"] | None,
    prompt_lengths_P: Int[Array, " P"],
    state: SequenceState,
) -> SequenceState:
    scores_PV = _scores(method, ends.choosable(config, state.next_log_probs_PV), keys_P, state.step)
    num_candidates = method.num_candidates if isinstance(method, TagPenaltySampling) else 1
    scores_PC, tokens_PC = jax.lax.top_k(scores_PV, num_candidates)
    lengths_P = prompt_lengths_P + state.step
    log_probs_PCV, new_kv = forward.try_next(config, params, tokens_PC, state.cache, lengths_P)
    # A token that ends the text adds nothing to it: its lookahead is the one of the text as it stands.
    ends_PC = ends.of(tokens_PC)
    tag_log_prob_PC = jnp.where(
        ends_PC == forward.RUNNING,
        ends.tag_log_prob(log_probs_PCV),
        ends.tag_log_prob(state.next_log_probs_PV)[:, None],
    )
    if isinstance(method, TagPenaltySampling):
        scores_PC -= jnp.where(jnp.exp(tag_log_prob_PC) > method.threshold, method.penalty, 0.0)
    choice_P = jnp.argmax(scores_PC, axis=1)
    pick = lambda array_PC: jnp.take_along_axis(array_PC, choice_P[:, None], axis=1)[:, 0]  # noqa: E731
    token_P, is_running_P = pick(tokens_PC), state.ends_P == forward.RUNNING
    log_prob_P = jnp.take_along_axis(state.next_log_probs_PV, token_P[:, None], axis=1)[:, 0]
    put = lambda old_PT, new_P: old_PT.at[:, state.step].set(  # noqa: E731
        jnp.where(is_running_P, new_P, old_PT[:, state.step])
    )
    return SequenceState(
        step=state.step + 1,
        tokens_PT=put(state.tokens_PT, token_P),
        tag_log_probs_PT=put(state.tag_log_probs_PT, pick(tag_log_prob_PC)),
        num_tokens_P=state.num_tokens_P + is_running_P,
        log_prob_P=state.log_prob_P + jnp.where(is_running_P, log_prob_P, 0.0),
        ends_P=jnp.where(is_running_P, pick(ends_PC), state.ends_P),
        next_log_probs_PV=jnp.take_along_axis(log_probs_PCV, choice_P[:, None, None], axis=1)[:, 0],
        cache=forward.keep_one(state.cache, new_kv, choice_P, lengths_P),
    )


def _scores(
    method: Greedy | Sampling | TagPenaltySampling,
    log_probs_PV: Float[Array, "P V"],
    keys_P: Key[Array, " P"] | None,
    step: Int[Array, ""],
) -> Float[Array, "P V"]:
    """What the next token is the argmax of."""
    if isinstance(method, Greedy):
        return log_probs_PV
    keys_P = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_P, step)
    gumbel_PV = jax.vmap(lambda key: jax.random.gumbel(key, log_probs_PV.shape[1:]))(keys_P)
    return filtered(log_probs_PV / method.temperature, top_k=method.top_k, top_p=method.top_p) + gumbel_PV


def filtered(log_probs_PV: Float[Array, "P V"], *, top_k: int, top_p: float) -> Float[Array, "P V"]:
    """-inf for tokens outside the `top_k` likeliest (0: all) and, of those, outside the smallest set reaching `top_p`.

    Of equally likely tokens the one with the smaller id is taken first; the likeliest token always stays.
    """
    vocab_size = log_probs_PV.shape[1]
    if (top_k == 0 or top_k >= vocab_size) and top_p == 1:
        return log_probs_PV
    kept_PK, ids_PK = jax.lax.top_k(log_probs_PV, min(top_k or vocab_size, vocab_size))
    if top_p < 1:
        probs_PK = jax.nn.softmax(kept_PK, axis=-1)
        before_PK = jnp.cumsum(probs_PK, axis=-1) - probs_PK
        kept_PK = jnp.where(before_PK < top_p, kept_PK, forward.NEVER).at[:, 0].set(kept_PK[:, 0])
    rows_P1 = jnp.arange(log_probs_PV.shape[0])[:, None]
    return jnp.full_like(log_probs_PV, forward.NEVER).at[rows_P1, ids_PK].set(kept_PK)
