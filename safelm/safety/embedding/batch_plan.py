"""Which chunks share a batch: row lengths of a fixed table, a budget of tokens, hardly any padding.

A table has 16 lengths to every doubling, 32 between 512 and 1,024, where much of the web's text lies, so that a chunk
is padded by a sixteenth of its length at most and less than half of that on average; short ones by under 8 tokens. It
depends on the longest chunk alone, never on the texts: the same text in the same batch gives the same bits wherever a
run goes on.

| longest chunk | lengths |
|---|---:|
| 256 | 32 |
| 512 | 48 |
| 2,048 | 96 |
| 8,192 | 128 |

Each is one program, compiled when the first chunk of that length comes.
"""

import bisect
from collections.abc import Callable, Sequence

_LEAST, _PER_DOUBLING = 8, 16
_OFTEN = 512  # up to twice that there are twice as many


def bucket_lengths(max_tokens: int) -> tuple[int, ...]:
    """The row lengths of chunks of up to `max_tokens`."""
    lengths: list[int] = []
    while not lengths or lengths[-1] < max_tokens:
        last = lengths[-1] if lengths else 0
        doubling = 1 << last.bit_length() >> 1
        step = doubling // (_PER_DOUBLING * (2 if doubling == _OFTEN else 1))
        lengths.append(last + max(_LEAST, step))
    return (*lengths[:-1], max_tokens)


def plan(
    lengths: Sequence[int], buckets: Sequence[int], rows: Callable[[int], int], *, is_last: bool = True
) -> tuple[list[tuple[list[int], int]], list[int]]:
    """The chunks of each batch with its row length, longest first, and those chunks that are left.

    Args:
      lengths: tokens of every chunk.
      rows: of a row length, how many of them make a batch.
      is_last: whether no more chunks come; else those that don't fill a batch, the shortest, are left for later.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, start = [], 0
    while start < len(order):
        length = buckets[bisect.bisect_left(buckets, lengths[order[start]])]
        batch = order[start : start + rows(length)]
        if not is_last and len(batch) < rows(length):
            break
        batches.append((batch, length))
        start += len(batch)
    return batches, order[start:]
