"""Decoding settings as arrays, one entry a prompt, so that one compiled program serves every setting of a method.

Axes beside `safelm.models.decoder`'s: P prompts, W beams, C candidates, M = W * C a prompt's pool, R = P * W rows of
the cache, E ids that end a text.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from safelm.inference import adjustments as adjustments_lib
from safelm.inference import token_mask
from safelm.inference.adjustments import Adjustment, Adjustments
from safelm.inference.methods import MAX_END_IDS, Greedy, Method, SafeBeam, draws
from safelm.models.arrays import ArrayLike, Leaf
from safelm.models.config import ModelConfig

RUNNING, ENDED_BY_EOS, ENDED_BY_TAG = 0, 1, 2
NEVER = -jnp.inf
_COLDEST = 2.0**-100  # no log-prob divided by it is infinite; a draw at it is the likeliest token


@flax.struct.dataclass
class Asked:
    """Decoding settings, one entry per prompt.

    A setting that the method lacks is neutral, and an empty slot is zeros.
    """

    prompt_lengths_P: Leaf  # tokens; 0: no prompt
    limits_P: Leaf  # new tokens at most
    end_ids_PE: Leaf  # any of them ends the text; -1: none
    masks_tag_P: Leaf  # the harm tag is never chosen
    stops_at_tag_P: Leaf  # choosing the harm tag ends the sequence
    key_data_P2: Leaf  # of the random draws
    is_sampled_P: Leaf  # not greedy
    temperatures_P: Leaf
    top_k_P: Leaf
    top_p_P: Leaf
    thresholds_P: Leaf
    penalties_P: Leaf
    length_penalties_P: Leaf
    drop_above_P: Leaf  # log of the P(tag) up to which no candidate is dropped
    anchors_P: Leaf  # part of the likeliest token's log-prob that is taken off at every step
    drop_counts_PM: Leaf  # dropped from a pool of 0, 1, .. M - 1 candidates
    allowed_PX: Leaf = None  # packed bits of what may come next (`token_mask`); None where no mask is possible
    adjustments: Adjustments | None = None  # None for a shape that takes none
    harm_tag_id: int | None = flax.struct.field(pytree_node=False, default=None)

    def end_of(self, tokens: Int[Array, "P ..."]) -> Int[Array, "P ..."]:
        """RUNNING, ENDED_BY_EOS or ENDED_BY_TAG for each of the tokens just chosen."""
        end_ids_PE = jnp.asarray(self.end_ids_PE)
        is_end = (tokens[..., None] == end_ids_PE.reshape(len(tokens), *(1,) * (tokens.ndim - 1), -1)).any(axis=-1)
        ends = jnp.where(is_end, ENDED_BY_EOS, RUNNING)
        if self.harm_tag_id is not None:
            stops = (tokens == self.harm_tag_id) & _along(self.stops_at_tag_P, tokens)
            ends = jnp.where(stops, ENDED_BY_TAG, ends)
        return ends.astype(jnp.int32)

    def choosable(self, config: ModelConfig, log_probs: Float[Array, "P ... V"]) -> Float[Array, "P ... V"]:
        """Log-probs with -inf for padding ids, banned ids, masked ids and a masked tag; not renormalised."""
        ids_V = np.arange(config.padded_vocab_size)
        may_be_V = (ids_V < config.vocab_size) & ~np.isin(ids_V, config.banned_ids)
        chosen = jnp.where(may_be_V, log_probs, NEVER)
        if self.allowed_PX is not None:
            chosen = jnp.where(token_mask.unpack(self.allowed_PX, config.padded_vocab_size), chosen, NEVER)
        if self.harm_tag_id is None:
            return chosen
        return jnp.where(_along(self.masks_tag_P, chosen) & (ids_V == self.harm_tag_id), NEVER, chosen)

    def tag_log_prob(self, log_probs: Float[Array, "*A V"]) -> Float[Array, "*A"]:
        """log P(tag | text so far); -inf if the vocabulary has no tag."""
        if self.harm_tag_id is None:
            return jnp.full(log_probs.shape[:-1], NEVER, jnp.float32)
        return log_probs[..., self.harm_tag_id]


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


def _along(value_P: ArrayLike, like: Array) -> Array:
    return jnp.asarray(value_P).reshape(-1, *(1 for _ in like.shape[1:]))


def key_data(seed: int) -> tuple[int, int]:
    """The random key of a 64-bit seed."""
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def ask(
    rows: Sequence[tuple[int, int, Sequence[int], Method, int] | None],
    *,
    harm_tag_id: int | None,
    max_pool: int = 0,
    allowed_PX: Int[np.ndarray, "P X"] | None = None,
    adjustments: Sequence[Adjustment] | None = None,
) -> Asked:
    """Settings as numpy arrays, from (prompt length, max_new_tokens, end_ids, method, seed) per prompt.

    None is an empty slot.

    Args:
      max_pool: the most candidates that a prompt has at once, if any method drops some.
      adjustments: one a prompt, for a shape that takes them.
    """
    nothing = (0, 0, (), Greedy(), 0)
    lengths, limits, end_ids, methods, seeds = zip(*(row or nothing for row in rows), strict=True)

    def setting(name: str, neutral: float | int, dtype: Any = np.float32) -> np.ndarray:
        return np.array([getattr(method, name, neutral) for method in methods], dtype)

    drop_counts_PM = np.zeros((len(rows), max_pool + 1), np.int32)
    for row, method in enumerate(methods):
        if isinstance(method, SafeBeam):
            drop_counts_PM[row] = method.drop_counts()
    return Asked(
        prompt_lengths_P=np.array(lengths, np.int32),
        limits_P=np.array(limits, np.int32),
        end_ids_PE=np.array([[*ids, *[-1] * (MAX_END_IDS - len(ids))] for ids in end_ids], np.int32),
        masks_tag_P=np.array([method.tag_candidate == "mask" for method in methods]),
        stops_at_tag_P=np.array([method.tag_candidate == "stop" for method in methods]),
        key_data_P2=np.array([key_data(seed) for seed in seeds], np.uint32),
        is_sampled_P=np.array([draws(method) for method in methods]),
        temperatures_P=np.maximum(setting("temperature", 1.0), _COLDEST),
        top_k_P=setting("top_k", 0, np.int32),
        top_p_P=setting("top_p", 1.0),
        thresholds_P=setting("threshold", math.inf),
        penalties_P=setting("penalty", 0.0),
        length_penalties_P=setting("length_penalty", 0.0),
        drop_above_P=np.array([_log(getattr(method, "drop_above", 0.0)) for method in methods], np.float32),
        anchors_P=setting("anchor", 0.0),
        drop_counts_PM=drop_counts_PM,
        allowed_PX=allowed_PX,
        adjustments=None if adjustments is None else adjustments_lib.stacked(adjustments),
        harm_tag_id=harm_tag_id,
    )


def pick_rows(tree: PyTree, rows: Int[Array, " N"]) -> PyTree:
    """These entries of every leaf's first axis; rows past the end become zeros."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="fill", fill_value=0), tree)


def keep(is_kept_P: Array, old: PyTree, new: PyTree) -> PyTree:
    """`old` where `is_kept_P`, otherwise `new`, along the first axis of every leaf."""
    return jax.tree.map(lambda mine, others: jnp.where(_along(is_kept_P, mine), mine, others), old, new)


def with_room(tokens: Array, max_len: int, fill: float = 0) -> Array:
    """The array with its last axis (tokens) cut or padded with `fill` to `max_len`."""
    missing = max(0, max_len - tokens.shape[-1])
    return jnp.pad(tokens[..., :max_len], [(0, 0)] * (tokens.ndim - 1) + [(0, missing)], constant_values=fill)
