"""Batches prompts, padded on the right, in shapes from few buckets, so that few programs are compiled."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from safelm.models.config import ModelConfig

SMALLEST_BUCKET = 16  # tokens


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts of similar length; rows past `len(indices)` are padding."""

    indices: tuple[int, ...]  # where each row's prompt stands in the caller's list
    tokens_PT: Int32[np.ndarray, "P T"]
    lengths_P: Int32[np.ndarray, " P"]  # 0 marks a filling row


class TooLongError(ValueError):
    """A prompt and its new tokens are more than the context or the cache holds."""


def check_prompt(config: ModelConfig, prompt: Sequence[int], *, max_new_tokens: int, name: str) -> list[int]:
    """The prompt as a list of ids.

    Raises ValueError, calling the prompt `name`, if it is empty, `max_new_tokens` is below 1 or an id is outside the
    vocabulary, and TooLongError if both together do not fit the context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    ids = [int(token) for token in prompt]
    if not ids:
        raise ValueError(f"{name}: it has no token; an empty text begins with what `safelm.text.prompting` puts there")
    foreign = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if foreign is not None:
        raise ValueError(f"{name}: id {foreign} is not in the model's vocabulary of {config.vocab_size}")
    if len(ids) + max_new_tokens > config.max_seq_len:
        raise TooLongError(
            f"{name}: its {len(ids)} tokens and max_new_tokens={max_new_tokens} make {len(ids) + max_new_tokens}, more "
            f"than the model's context of {config.max_seq_len}"
        )
    return ids


def batches(rows: Sequence[Sequence[int]], *, max_rows: int, max_len: int) -> Iterator[PromptBatch]:
    """Rows in batches of at most `max_rows`, shortest first; widths (up to `max_len`) and heights are powers of two."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    by_width: dict[int, list[int]] = {}
    for index in order:
        by_width.setdefault(bucket(len(rows[index]), SMALLEST_BUCKET, max_len), []).append(index)
    for width, members in by_width.items():
        for start in range(0, len(members), max_rows):
            yield _pad(rows, tuple(members[start : start + max_rows]), width, max_rows)


def bucket(size: int, smallest: int, largest: int | float, *, factor: int = 2) -> int:
    """The smallest power of `factor` times `smallest` that holds `size`, at most `largest`."""
    width = smallest
    while width < size:
        width *= factor
    return min(width, largest)


def _pad(rows: Sequence[Sequence[int]], members: tuple[int, ...], width: int, max_rows: int) -> PromptBatch:
    height = bucket(len(members), 1, max_rows)
    tokens_PT = np.zeros((height, width), np.int32)
    lengths_P = np.zeros(height, np.int32)
    for row, index in enumerate(members):
        lengths_P[row] = len(rows[index])
        tokens_PT[row, : len(rows[index])] = rows[index]
    return PromptBatch(members, tokens_PT, lengths_P)
