"""Token masks: which tokens may come next in a request's text.

A mask has one bit per id: bit i % 32 of word i // 32 stands for id i. Axes: X words, V ids.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from safelm.inference.methods import Greedy, Method, Sampling
from safelm.models.config import ModelConfig

WORD_BITS = 32


class TokenMask(Protocol):
    """The state of one text's mask, from its first token on (see `safelm.inference.grammar` for grammars)."""

    def consume(self, tokens: Sequence[int]) -> None:
        """Advances by tokens that were added to the text; raises ValueError for one that isn't allowed there."""
        ...

    def forced(self) -> Sequence[int]:
        """The only ids that may come next, in order; empty where there is a choice.

        The engine reads them in one forward pass. An empty answer is always correct: `allowed` then has one bit.
        """
        ...

    def allowed(self) -> Int32[np.ndarray, " X"] | None:
        """The ids that may come next, None for all; after a complete text the ids that end it."""
        ...


MakeMask = Callable[[], TokenMask]


def num_words(config: ModelConfig) -> int:
    """Number of words of a mask over the padded vocabulary."""
    return -(-config.padded_vocab_size // WORD_BITS)


def all_ids(config: ModelConfig, num_prompts: int) -> Int32[np.ndarray, "P X"]:
    """Masks that allow every id."""
    return np.full((num_prompts, num_words(config)), -1, np.int32)


def only(ids: Sequence[int], words: int) -> Int32[np.ndarray, " X"]:
    """A mask that allows these ids only."""
    bits = np.zeros(words * WORD_BITS, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def unpack(allowed_PX: Int[Array, "P X"], num_ids: int) -> Bool[Array, "P V"]:
    """The first `num_ids` bits of each mask as booleans."""
    bits_PXb = (jnp.asarray(allowed_PX)[..., None] >> np.arange(WORD_BITS, dtype=np.int32)) & 1
    return bits_PXb.reshape(len(allowed_PX), -1)[:, :num_ids] == 1


def check_method(method: Method) -> None:
    """Raises ValueError for a method that tries several tokens at once, which would need a mask each."""
    if not isinstance(method, Greedy | Sampling):
        raise ValueError(f"a token mask goes with Greedy or Sampling, not with {type(method).__name__}")


class MaskedText:
    """A request's mask and its first error.

    Attributes:
      error: message of the mask's first ValueError, after which it isn't called again; empty before.
    """

    def __init__(
        self,
        config: ModelConfig,
        make: MakeMask,
        method: Method,
        end_ids: Sequence[int],
        harm_tag_id: int | None,
    ):
        self.error = ""
        self._may_end = {*end_ids, harm_tag_id}
        masked = {*config.banned_ids, *({harm_tag_id} if method.tag_candidate == "mask" else ())}
        self._choosable_X = only([i for i in range(config.vocab_size) if i not in masked], num_words(config))
        self._mask: TokenMask | None = self._ask(make, None)

    def follow(self, tokens: Sequence[int]) -> None:
        """Advances by tokens that are chosen."""
        self._ask(lambda: self._mask.consume(tokens), None)

    def forced(self, most: int) -> tuple[int, ...]:
        """At most `most` of the forced ids, up to the first that may end the text."""
        found = self._ask(lambda: self._mask.forced()[: max(0, most)], ())
        return tuple(itertools.takewhile(lambda token: token not in self._may_end, found))

    def allowed(self) -> Int32[np.ndarray, " X"]:
        """The ids that may come next."""
        return self._ask(self._allowed, self._choosable_X)

    def _allowed(self) -> Int32[np.ndarray, " X"]:
        allowed_X = self._mask.allowed()
        if allowed_X is None:
            return self._choosable_X
        if allowed_X.shape != self._choosable_X.shape:
            raise ValueError(f"token mask: {len(allowed_X)} words, the vocabulary takes {len(self._choosable_X)}")
        if not (allowed_X & self._choosable_X).any():
            raise ValueError("token mask: it allows no token of the vocabulary")
        return allowed_X

    def _ask(self, question: Callable[[], Any], otherwise: Any) -> Any:
        if self.error:
            return otherwise
        try:
            return question()
        except ValueError as error:
            self.error = str(error)
            return otherwise
