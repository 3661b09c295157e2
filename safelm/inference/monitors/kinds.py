"""The kinds of monitors: P(tag), P(refusal) behind a re-inserted header, and linear heads on the stream.

A linear head is a probe (trained on prompts or answers) or a token-level classifier (trained on labelled spans,
arXiv 2601.21571); with a header, a probe at the re-inserted header (Any-Depth Alignment, arXiv 2510.18081).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from safelm.io import records
from safelm.models.config import ModelConfig
from safelm.tags import MAX_SCORE


@dataclasses.dataclass(frozen=True)
class TagProbability:
    """P(tag): the probability that the harm tag comes next (Maini et al. 2025, section 4.1)."""

    tag_id: int
    name: str = "tag"

    layer = None
    header_ids: tuple[int, ...] = dataclasses.field(default=(), init=False)
    every: int = dataclasses.field(default=1, init=False)

    @property
    def fingerprint(self) -> str:
        return records.fingerprint(["tag", self.tag_id])

    def log_level(self, values_AX: Float[Array, "*A X"]) -> Float[Array, "*A"]:
        """log P(tag)."""
        return values_AX[..., self.tag_id] - jax.nn.logsumexp(values_AX, axis=-1)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError for a tag outside the vocabulary."""
        if not 0 <= self.tag_id < config.vocab_size:
            raise ValueError(f"monitor {self.name}: the vocabulary of {config.vocab_size} has no harm tag")


@dataclasses.dataclass(frozen=True)
class RefusalProbability:
    """P(refusal): the probability that a refusal begins behind the re-inserted header.

    It is that of the first tokens of refusals, so a word that other answers begin with too counts as well.
    """

    header_ids: tuple[int, ...]
    refusal_ids: tuple[int, ...]
    every: int = 1
    name: str = "refusal"

    layer = None

    def __post_init__(self) -> None:
        for field in ("header_ids", "refusal_ids"):
            if not getattr(self, field):
                raise ValueError(f"monitor {self.name}: no {field}")
        _check_every(self.name, self.every)

    @property
    def fingerprint(self) -> str:
        return records.fingerprint(["refusal", self.header_ids, self.refusal_ids, self.every])

    def log_level(self, values_AX: Float[Array, "*A X"]) -> Float[Array, "*A"]:
        """log P(first token of a refusal)."""
        wanted_AI = values_AX[..., np.array(self.refusal_ids)]
        return jax.nn.logsumexp(wanted_AI, axis=-1) - jax.nn.logsumexp(values_AX, axis=-1)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError for a word outside the vocabulary."""
        if not 0 <= min(self.refusal_ids) <= max(self.refusal_ids) < config.vocab_size:
            raise ValueError(
                f"monitor {self.name}: ids {min(self.refusal_ids)} to {max(self.refusal_ids)} of refusals, the "
                f"vocabulary has {config.vocab_size}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class LinearHead:
    """P(harm score of at least `min_score`), from a linear softmax over the scores on the stream.

    Attributes:
      layer: number of blocks after which the stream is read (0: the embeddings).
      kernel_DC, bias_C: float32, C the scores 0 to 5.
      header_ids: put behind a token, to read at the last of them.
      every: tokens between two readings.
    """

    layer: int
    kernel_DC: Float[np.ndarray, "D C"] = dataclasses.field(repr=False)
    bias_C: Float[np.ndarray, " C"] = dataclasses.field(repr=False)
    min_score: int
    header_ids: tuple[int, ...] = ()
    every: int = 1
    name: str = "head"

    def __post_init__(self) -> None:
        if not 1 <= self.min_score <= MAX_SCORE:
            raise ValueError(f"monitor {self.name}: min_score={self.min_score}: must be 1 to {MAX_SCORE}")
        _check_every(self.name, self.every)

    @functools.cached_property
    def fingerprint(self) -> str:
        arrays = [np.asarray(each, np.float32).tobytes().hex() for each in (self.kernel_DC, self.bias_C)]
        return records.fingerprint([self.layer, *arrays, self.min_score, self.header_ids, self.every])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinearHead) and (self.name, self.fingerprint) == (other.name, other.fingerprint)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def log_level(self, values_AX: Float[Array, "*A X"]) -> Float[Array, "*A"]:
        """log P(harm score >= min_score)."""
        logits_AC = values_AX.astype(jnp.float32) @ jnp.asarray(self.kernel_DC) + jnp.asarray(self.bias_C)
        return jax.nn.logsumexp(jax.nn.log_softmax(logits_AC)[..., self.min_score :], axis=-1)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError for a stream of another width."""
        if self.kernel_DC.shape[0] != config.d_model:
            raise ValueError(
                f"monitor {self.name}: reads a stream of {self.kernel_DC.shape[0]} values, the model's has "
                f"{config.d_model}"
            )


def _check_every(name: str, every: int) -> None:
    if every < 1:
        raise ValueError(f"monitor {name}: every={every}: must be at least 1 token")
