"""Programs compiled before the first request, so that none waits for the compiler.

They cover every request up to a length, not tightly: lanes of one prompt or of as many as fit, rows whose lengths are
four times one another. Tighter ones are compiled aside once they are of use, and take over then.
"""

from collections.abc import Iterator, Sequence

from safelm.inference import programs
from safelm.inference.catalog import Catalog, Size
from safelm.inference.compiling import Program
from safelm.inference.prompts import bucket

LENGTHS_APART = 4


def sizes_ahead(
    catalog: Catalog, shape: programs.StepShape, *, longest: int, max_prompts: int, max_tokens: int
) -> list[Size]:
    """Lanes of one prompt and of as many as `max_tokens` positions hold, for rows of up to `longest` tokens."""
    found: list[Size] = []
    length = catalog.length(1)
    while True:
        max_len = min(catalog.length(length), catalog.length(longest))
        fitting = max_tokens // (max_len * shape.num_rows)
        most = max((slots for slots in _powers(max_prompts) if slots <= fitting), default=0)
        found += [(slots, max_len) for slots in sorted({1, most}) if 0 < slots <= fitting]
        if max_len >= catalog.length(longest):
            return found
        length *= LENGTHS_APART


def programs_ahead(
    catalog: Catalog, shape: programs.StepShape, sizes: Sequence[Size], chunk_sizes: Sequence[int]
) -> Iterator[Program]:
    """A shape's programs for lanes of these sizes, which may grow from any to any larger one."""
    yield from (catalog.start(shape, chunk) for chunk in chunk_sizes)
    for size in sizes:
        yield catalog.run(shape, size)
        yield from (catalog.place(shape, size, chunk) for chunk in chunk_sizes)
        for length in catalog.lengths(sizes[-1][1]):
            yield catalog.put_behind(shape, size, length)
        for length in sorted({length for _, length in sizes if length <= size[1]}):
            yield catalog.take_slot(shape, size, length)
        for larger in sizes:
            if larger != size and larger[0] >= size[0] and larger[1] >= size[1]:
                yield catalog.resize(shape, size, larger)


def reading_ahead(catalog: Catalog, longest: int, chunk_sizes: Sequence[int]) -> Iterator[Program]:
    """The forwards over prompts, and over their next parts behind rows of up to `longest` tokens."""
    for chunk in chunk_sizes:
        yield catalog.read(chunk, 0)
    lengths, largest = catalog.lengths(longest), chunk_sizes[-1]
    for length in lengths:
        yield catalog.read(largest, length)
        if length >= catalog.length(largest):
            yield catalog.extend(largest, 0, length)
        yield from (catalog.extend(largest, length, longer) for longer in lengths if length <= longer <= 2 * length)


def _powers(largest: int) -> Iterator[int]:
    """The numbers of prompts of a lane."""
    number = 0
    while number < largest:
        number = bucket(number + 1, 1, largest, factor=4)
        yield number
