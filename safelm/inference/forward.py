"""The two calls of the model that decoding is made of, and which tokens may be chosen. Pure functions under `jit`.

Axes beside `safelm.model`'s: P prompts, W beams, C candidates, R = P * W cache rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm import model
from safelm.inference.methods import TagCandidate
from safelm.model_config import ModelConfig

RUNNING, ENDED_BY_EOS, ENDED_BY_TAG = 0, 1, 2
NEVER = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Ends:
    """The ids that end a sequence, and what becomes of the harm tag (None: the vocabulary has none)."""

    eos_id: int
    harm_tag_id: int | None
    tag_candidate: TagCandidate

    def of(self, tokens: Int[Array, "*A"]) -> Int[Array, "*A"]:
        """RUNNING, ENDED_BY_EOS or ENDED_BY_TAG for every token as the one just chosen."""
        ends = jnp.where(tokens == self.eos_id, ENDED_BY_EOS, RUNNING)
        if self.harm_tag_id is not None and self.tag_candidate == "stop":
            ends = jnp.where(tokens == self.harm_tag_id, ENDED_BY_TAG, ends)
        return ends.astype(jnp.int32)

    def choosable(self, config: ModelConfig, log_probs: Float[Array, "*A V"]) -> Float[Array, "*A V"]:
        """Log-probs with -inf for ids that only pad the vocabulary and for a masked tag; not renormalised."""
        ids_V = np.arange(config.padded_vocab_size)
        allowed_V = ids_V < config.vocab_size
        if self.harm_tag_id is not None and self.tag_candidate == "mask":
            allowed_V &= ids_V != self.harm_tag_id
        return jnp.where(allowed_V, log_probs, NEVER)

    def tag_log_prob(self, log_probs: Float[Array, "*A V"]) -> Float[Array, "*A"]:
        """log P(tag | text so far); -inf where the vocabulary has no tag."""
        if self.harm_tag_id is None:
            return jnp.full(log_probs.shape[:-1], NEVER, jnp.float32)
        return log_probs[..., self.harm_tag_id]


def read_prompts(
    config: ModelConfig,
    params: model.Params,
    tokens_PT: Int[Array, "P T"],
    lengths_P: Int[Array, " P"],
    *,
    cache_len: int,
) -> tuple[model.KVCache, Float[Array, "P V"]]:
    """A cache of `cache_len` positions holding every prompt, and the log-probs of the token after it.

    The last token goes through on its own: so the wide forward's logits, the size of P * T * V, are never computed.
    Padding's keys lie past each row's length, where nothing attends and the first new tokens overwrite them.
    """
    num_prompts, width = tokens_PT.shape
    nothing_P = jnp.zeros(num_prompts, jnp.int32)
    _, new_kv = model.apply_cached(
        config,
        params,
        tokens_PT,
        model.init_cache(config, num_prompts, 0),
        lengths_B=nothing_P,
        positions_BT=jnp.broadcast_to(jnp.arange(width), tokens_PT.shape),
    )
    cache = model.write_cache(model.init_cache(config, num_prompts, cache_len), new_kv, nothing_P)
    last_P = jnp.maximum(lengths_P - 1, 0)
    last_tokens_P1 = jnp.take_along_axis(tokens_PT, last_P[:, None], axis=1)
    log_probs_P1V, _ = try_next(config, params, last_tokens_P1, cache, last_P)
    return cache, log_probs_P1V[:, 0]


def try_next(
    config: ModelConfig,
    params: model.Params,
    tokens_RC: Int[Array, "R C"],
    cache: model.KVCache,
    lengths_R: Int[Array, " R"],
) -> tuple[Float[Array, "R C V"], model.KVCache]:
    """One forward over C alternatives for every row's next token: each sees its row's cache and itself, no other.

    Returns float32 log-probs of the token after each alternative, and the alternatives' keys and values.
    """
    num_candidates = tokens_RC.shape[1]
    logits_RCV, new_kv = model.apply_cached(
        config,
        params,
        tokens_RC,
        cache,
        lengths_B=lengths_R,
        positions_BT=jnp.broadcast_to(lengths_R[:, None], tokens_RC.shape),
        new_mask_BTT=jnp.eye(num_candidates, dtype=bool)[None],
    )
    return jax.nn.log_softmax(logits_RCV.astype(jnp.float32), axis=-1), new_kv


def keep_one(
    cache: model.KVCache, new_kv: model.KVCache, choice_R: Int[Array, " R"], lengths_R: Int[Array, " R"]
) -> model.KVCache:
    """Writes each row's chosen alternative into its cache."""
    pick = lambda kv: jnp.take_along_axis(kv, choice_R[None, :, None, None, None], axis=2)  # noqa: E731
    return model.write_cache(cache, jax.tree.map(pick, new_kv), lengths_R)
