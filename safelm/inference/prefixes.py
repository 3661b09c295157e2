"""Prefixes that many prompts share, such as a rubric or a system message, read once."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from safelm.inference import programs
from safelm.inference.forward import Cache
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

ROUNDED_TO = 128  # tokens; prefixes of similar length share programs


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Ids and their cache: one row, padded to a multiple of `ROUNDED_TO` positions."""

    ids: tuple[int, ...]
    cache: Cache


class Prefixes:
    """The prefixes that an engine keeps, by their ids."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self._config, self._weights = config, weights
        self._kept: dict[tuple[int, ...], Prefix] = {}

    @property
    def num_tokens(self) -> int:
        """Number of cache positions that they take together."""
        return sum(prefix.cache.max_len for prefix in self._kept.values())

    def keep(self, ids: Sequence[int]) -> None:
        """Reads a prefix unless it is kept already."""
        key = tuple(ids)
        if key in self._kept:
            return
        tokens_1T = np.zeros((1, -(-len(key) // ROUNDED_TO) * ROUNDED_TO), np.int32)
        tokens_1T[0, : len(key)] = key
        cache, _ = programs.read_prompts(self._config, self._weights, tokens_1T, jnp.asarray([len(key)], jnp.int32))
        self._kept[key] = Prefix(key, cache)

    def drop(self, ids: Sequence[int]) -> None:
        """Drops a prefix; submitted requests that use it aren't affected."""
        self._kept.pop(tuple(ids), None)

    def longest(self, prompt: Sequence[int]) -> Prefix | None:
        """The longest kept prefix that is a proper prefix of the prompt."""
        fitting = [p for p in self._kept.values() if len(p.ids) < len(prompt) and tuple(prompt[: len(p.ids)]) == p.ids]
        return max(fitting, key=lambda prefix: len(prefix.ids), default=None)
