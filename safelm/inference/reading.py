"""Which tokens of the prompts that wait are read next, behind what, and by which compiled program."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from safelm.inference import chunks, programs
from safelm.inference.catalog import Catalog
from safelm.inference.compiling import BackgroundCompiler, Program
from safelm.inference.entry import Entry
from safelm.inference.kv_cache import Cache
from safelm.inference.prefixes import Behind, Prefixes
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

SMALLEST_CHUNK, CHUNK_FACTOR = 16, 4  # tokens
Needs = Callable[["Reading"], list[Program]]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The next tokens of a prompt."""

    entry: Entry
    begin: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with them."""
        return self.begin + self.count == len(self.entry.prompt)


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What a chunk of `size` tokens reads; those parts that begin at `behind.length` stand behind it, others at 0."""

    size: int
    parts: tuple[Part, ...]
    behind: Behind | None

    @property
    def behind_len(self) -> int:
        """Length of the row behind; 0: none."""
        return 0 if self.behind is None else self.behind.cache.max_len

    @property
    def unfinished(self) -> Part | None:
        """The part that doesn't end its prompt; always the last one."""
        return None if self.parts[-1].is_last else self.parts[-1]

    @property
    def finished(self) -> list[Part]:
        """The parts that end their prompts."""
        return [part for part in self.parts if part.is_last]

    def chunk(self) -> chunks.Chunk:
        """Its tokens as arrays."""
        tokens_T, positions_T = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)
        prompts_T, is_behind_T = np.full(self.size, -1, np.int32), np.zeros(self.size, bool)
        last_G, at, ended = np.zeros(chunks.prompts_in(self.size), np.int32), 0, 0
        for number, part in enumerate(self.parts):
            own = slice(at, at + part.count)
            tokens_T[own] = part.entry.prompt[part.begin : part.begin + part.count]
            positions_T[own] = np.arange(part.begin, part.begin + part.count)
            prompts_T[own], is_behind_T[own] = number, part.begin > 0
            at += part.count
            if part.is_last:
                last_G[ended], ended = at - 1, ended + 1
        return chunks.Chunk(tokens_T, positions_T, prompts_T, is_behind_T, last_G)


class Reader:
    """Reads prompts of one model, for all lanes of an engine."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        catalog: Catalog,
        prefixes: Prefixes,
        *,
        most_tokens: int,
        compiler: BackgroundCompiler | None = None,
    ):
        """`most_tokens`: of a chunk."""
        self._config, self._weights, self._catalog = config, weights, catalog
        self._compiler, self.prefixes = compiler, prefixes
        smallest = min(SMALLEST_CHUNK, most_tokens)
        powers = (smallest * CHUNK_FACTOR**power for power in range(16))
        self.sizes = (*(size for size in powers if size < most_tokens), most_tokens)

    def next(self, unread: Sequence[Entry], needs: Needs, *, may_wait: bool) -> Reading | None:
        """The next chunk of prompts that wait, first come first; with a compiler one whose programs are compiled.

        Args:
          needs: the programs that it takes beside the forward.
          may_wait: whether to return None where none is compiled, until one is; else the best is compiled here.
        """
        readings = self._readings(unread, looks=True)
        if self._compiler is None:
            return readings[0]
        for reading in [*readings, *self._readings(unread, looks=False)]:
            if self._compiler.has(self._programs(reading, needs)):
                return reading
        if may_wait:
            return None
        self._compiler.note(self._programs(readings[0], needs))
        return readings[0]

    def read(self, reading: Reading) -> tuple[chunks.Chunk, Cache, jax.Array]:
        """The chunk, its tokens' keys and values, and the logits behind prompts that end in it."""
        chunk, behind = reading.chunk(), reading.behind
        for part in reading.parts:
            if not part.entry.has_begun:
                part.entry.has_begun = True
                self.prefixes.count(behind if part.begin else None)
        before = () if behind is None else (behind.cache, np.int32(behind.length))
        new_kv, logits_GV = programs.read_chunk(self._config, self._weights, chunk, *before)
        if (part := reading.unfinished) is not None:
            part.entry.behind = self._extended(reading, chunk, new_kv, part)
        return chunk, new_kv, logits_GV

    def row_of(self, entry: Entry) -> Cache:
        """One row with all tokens of a prompt that has no lane."""
        while True:
            parts, behind = self._parts([entry])
            reading = self._cut(self._by_fitness(parts[0].count)[0], parts, behind)
            chunk, new_kv, _ = self.read(reading)
            if reading.unfinished is None:
                return self._extended(reading, chunk, new_kv, reading.parts[0]).cache

    def _readings(self, unread: Sequence[Entry], *, looks: bool) -> list[Reading]:
        parts, behind = self._parts(unread, looks=looks)
        return [self._cut(size, parts, behind) for size in self._by_fitness(sum(part.count for part in parts))]

    def _parts(self, unread: Sequence[Entry], *, looks: bool = True) -> tuple[list[Part], Behind | None]:
        """The prompts' next tokens that can be read together, and what stands behind some of them.

        `looks`: whether prompts not begun may start from kept rows.
        """
        parts: list[Part] = []
        behind, room = None, self.sizes[-1]
        for entry in unread:
            own = entry.behind
            if own is None and looks and not entry.has_begun:
                own = self._found(entry)
            if own is not None and behind is not None and not own.is_same(behind):
                break
            begin = 0 if own is None else own.length
            count = min(len(entry.prompt) - begin, room)
            if not count:
                break
            behind = behind or own
            parts.append(Part(entry, begin, count))
            room -= count
        return parts, behind

    def _found(self, entry: Entry) -> Behind | None:
        """What a prompt may start from, unless a chunk behind it has yet to be compiled."""
        found = self.prefixes.longest(entry.prompt)
        if found is None or self._compiler is None:
            return found
        sizes = self._by_fitness(len(entry.prompt) - found.length)
        is_ready = any(self._compiler.has([self._catalog.read(size, found.cache.max_len)]) for size in sizes)
        return found if is_ready else None

    def _by_fitness(self, num_tokens: int) -> list[int]:
        """The sizes of a chunk for so many tokens, the best first: little filling, and few chunks."""
        best = next((size for size in self.sizes if size >= num_tokens), self.sizes[-1])
        smaller = [size for size in self.sizes if size <= num_tokens]
        if smaller and num_tokens < best / 2:
            best = smaller[-1]
        larger = [size for size in self.sizes if size > best]
        return [best, *larger, *(size for size in reversed(self.sizes) if size < best)]

    def _cut(self, size: int, parts: Sequence[Part], behind: Behind | None) -> Reading:
        """As much of the parts as a chunk of this size takes."""
        found: list[Part] = []
        room = size
        for part in parts:
            count = min(part.count, room)
            if not count or len(found) == chunks.prompts_in(size):
                break
            found.append(dataclasses.replace(part, count=count))
            room -= count
        is_behind = any(part.begin for part in found)
        return Reading(size, tuple(found), behind if is_behind else None)

    def _programs(self, reading: Reading, needs: Needs) -> list[Program]:
        found = [self._catalog.read(reading.size, reading.behind_len), *needs(reading)]
        if (part := reading.unfinished) is not None:
            own_len = reading.behind_len if part.begin else 0
            max_len = self._catalog.length(part.begin + part.count)
            found.append(self._catalog.extend(reading.size, own_len, max(own_len, max_len)))
        return found

    def _extended(self, reading: Reading, chunk: chunks.Chunk, new_kv: Cache, part: Part) -> Behind:
        own = reading.behind if part.begin else None
        is_own_T = chunk.prompts_T == reading.parts.index(part)
        length = part.begin + part.count
        max_len = max(self._catalog.length(length), own.cache.max_len if own else 0)
        cache = programs.extend(own and own.cache, new_kv, is_own_T, chunk.positions_T, max_len=max_len)
        return Behind(cache, length)
