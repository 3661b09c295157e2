"""What a monitor is, what it costs, and whether it fits a model.

A monitor reads, at every token, the logits of the next token or the residual stream after some blocks. With a header it
reads them not at the token but at the last of some ids that stand behind it for that purpose only: the assistant's
header re-inserted in the middle of an answer (Any-Depth Alignment, arXiv 2510.18081). The text then goes on as if the
header had never been there.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from safelm.inference.prompts import TooLongError
from safelm.models.config import ModelConfig
from safelm.tags import MAX_SCORE


@runtime_checkable
class Monitor(Protocol):
    """A level at every token. Hashable, and equal to those of the same fingerprint: programs are compiled for it.

    Attributes:
      name: for tables.
      fingerprint: changes whenever its levels would.
      layer: the number of blocks after which the stream, not normed, is read; None where the logits are.
      header_ids: put behind a token, to read at the last of them; none: read at the token itself.
      every: tokens between two readings; in between the last level holds.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def layer(self) -> int | None: ...

    @property
    def header_ids(self) -> tuple[int, ...]: ...

    @property
    def every(self) -> int: ...

    def log_level(self, values_AX: Float[Array, "*A X"]) -> Float[Array, "*A"]:
        """The log of the level, from float32 logits over the padded vocabulary, or from the stream."""
        ...

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where it is another model's."""
        ...


def check_monitor(monitor: Monitor, config: ModelConfig, *, num_tokens: int = 0) -> None:
    """Raises ValueError where a monitor doesn't fit a model, TooLongError where its header fits no context."""
    if monitor.layer is not None and not 0 <= monitor.layer <= config.num_layers:
        raise ValueError(f"monitor {monitor.name}: reads layer {monitor.layer}, the model has 0 to {config.num_layers}")
    for token in monitor.header_ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"monitor {monitor.name}: id {token} of its header is not among the {config.vocab_size}")
    if num_tokens + len(monitor.header_ids) > config.max_seq_len:
        raise TooLongError(
            f"monitor {monitor.name}: {num_tokens} tokens and its header of {len(monitor.header_ids)} don't fit the "
            f"context of {config.max_seq_len}"
        )
    monitor.check(config)


def extra_flops_per_token(monitor: Monitor, config: ModelConfig, seq_len: int) -> float:
    """FLOPs that a monitor adds to every token which the same model writes, in texts of `seq_len` tokens.

    Products are counted, as in `ModelConfig.flops_per_token`; the logits and the stream of the token itself are there.
    """
    own = 2.0 * config.d_model * (MAX_SCORE + 1) if monitor.layer is not None else 0.0
    if not monitor.header_ids:
        return own
    return (len(monitor.header_ids) * _blocks(monitor, config, seq_len) + _last(monitor, config) + own) / monitor.every


def reading_flops_per_token(monitor: Monitor, config: ModelConfig, seq_len: int) -> float:
    """FLOPs of every token of a text that is only read, such as another model's."""
    logits = 0.0 if monitor.header_ids else _last(monitor, config)
    return _blocks(monitor, config, seq_len) + logits + extra_flops_per_token(monitor, config, seq_len)


def _blocks(monitor: Monitor, config: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs of the blocks that a monitor needs, a token."""
    read = config.num_layers if monitor.layer is None else monitor.layer
    if not read:
        return 0.0
    part = config.part(0, read)
    unembedding = 2 * config.vocab_size * config.d_model
    return part.flops_per_token(seq_len) / 3 - unembedding


def _last(monitor: Monitor, config: ModelConfig) -> float:
    """FLOPs of the logits, where they are read."""
    return 2.0 * config.vocab_size * config.d_model if monitor.layer is None else 0.0
