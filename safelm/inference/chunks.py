"""Prompts read in chunks: tokens of several prompts end to end in one row, in one forward pass.

So whatever the lengths of the prompts that wait, few programs read them, nothing is spent on filling, and a long prompt
is read in parts between which others are decoded.
"""

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.inference import forward
from safelm.inference.kv_cache import Cache
from safelm.inference.weights import Weights
from safelm.models import attention, cpu_kernels
from safelm.models.arrays import Leaf
from safelm.models.config import ModelConfig

TOKENS_OF_A_PROMPT = 16  # of a chunk, for each prompt that may end in it


def prompts_in(num_tokens: int) -> int:
    """How many prompts may end in a chunk of so many tokens."""
    return max(1, num_tokens // TOKENS_OF_A_PROMPT)


@flax.struct.dataclass
class Chunk:
    """Tokens of several prompts in one row, read together: each sees its own prompt only.

    At most one cache of one row stands before them, of which those in `is_behind_T` see the first tokens.
    """

    tokens_T: Leaf
    positions_T: Leaf
    prompts_T: Leaf  # which prompt a token belongs to; -1: filling
    is_behind_T: Leaf
    last_G: Leaf  # where prompts end in it


def read_chunk(
    config: ModelConfig,
    weights: Weights,
    chunk: Chunk,
    behind: Cache | None = None,
    length: Int[Array, ""] | int = 0,
) -> tuple[Cache, Float[Array, "G V"]]:
    """Keys and values of a chunk's tokens (one row, S = T), and the logits of the token after each of `last_G`.

    Args:
      behind: one row, whose first `length` tokens stand before the tokens in `is_behind_T`.
    """
    positions_1T, prompts_1T = jnp.asarray(chunk.positions_T)[None], jnp.asarray(chunk.prompts_T)[None]
    mask_1TT = attention.causal_mask(positions_1T.shape[1], prompts_1T)
    is_native = forward.has_native_attention(config, weights)
    starts_T, behind_T = _starts(prompts_1T[0]), jnp.asarray(chunk.is_behind_T) * length

    def attend(layer: int, q_1TNH: Array, k_1TKH: Array, v_1TKH: Array) -> Array:
        window = forward.window_of(config, layer)
        if is_native:
            none = jnp.zeros((1, k_1TKH.shape[2], 0, k_1TKH.shape[3]), jnp.float32)
            cached = (none, none) if behind is None else (behind.keys[layer], behind.values[layer])
            return cpu_kernels.attend_chunk(q_1TNH, k_1TKH, v_1TKH, *cached, starts_T, behind_T, window)
        own_1TT = attention.windowed(mask_1TT, window)
        if behind is None:
            return attention.attend(q_1TNH, k_1TKH, v_1TKH, own_1TT)
        places_S = jnp.arange(behind.max_len)
        is_seen_1TS = (places_S < length) & jnp.asarray(chunk.is_behind_T)[None, :, None]
        is_seen_1TS &= attention.inside_window(positions_1T[..., None] - places_S, window)
        cached = behind.keys[layer], behind.values[layer]
        return attention.attend_both(q_1TNH, k_1TKH, v_1TKH, cached, is_seen_1TS, own_1TT)

    x_1TD, new_kv, _ = forward.stream_of(config, weights, jnp.asarray(chunk.tokens_T)[None], positions_1T, attend)
    return new_kv, forward.logits_of(config, weights, x_1TD[0, jnp.asarray(chunk.last_G)])


def _starts(prompts_T: Int[Array, " T"]) -> Int[Array, " T"]:
    """Where each token's prompt begins; filling is by itself."""
    places_T = jnp.arange(len(prompts_T))
    is_first_T = (prompts_T != jnp.roll(prompts_T, 1)) | (prompts_T < 0) | (places_T == 0)
    return jax.lax.cummax(jnp.where(is_first_T, places_T, 0))
