"""The engine's programs by what they are known by, each with how it is compiled before its first call."""

import functools
from typing import Any

from safelm.inference import chunks, programs
from safelm.inference.compiling import Program
from safelm.inference.prompts import bucket
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

SHORTEST_CACHE = 128  # tokens of a row
Size = tuple[int, int]  # prompts decoded together, and tokens of their rows


class Catalog:
    """Names programs of one model; `S` is the length of a row that stands behind a chunk's tokens, 0 for none."""

    def __init__(self, config: ModelConfig, weights: Weights, *, harm_tag_id: int | None, steps_per_call: int):
        self._config, self._weights = config, weights
        self._harm_tag_id, self._steps_per_call = harm_tag_id, steps_per_call

    def length(self, num_tokens: int) -> int:
        """The length of a row for so many tokens."""
        return bucket(num_tokens, SHORTEST_CACHE, self._config.max_seq_len)

    def lengths(self, longest: int) -> list[int]:
        """Those of rows of up to `longest` tokens."""
        found = [self.length(1)]
        while found[-1] < self.length(longest):
            found.append(self.length(found[-1] + 1))
        return found

    def abstract(self, shape: programs.StepShape, size: Size) -> Any:
        """Shapes of the state and cache of a lane."""
        return programs.abstract(self._config, shape, size, harm_tag_id=self._harm_tag_id)

    def run(self, shape: programs.StepShape, size: Size) -> Program:
        """A block of steps."""
        compile_it = functools.partial(programs.compile_run, self._config, shape, self._weights)
        return ("run", shape, size), lambda: compile_it(self.abstract(shape, size), num_steps=self._steps_per_call)

    def resize(self, shape: programs.StepShape, now: Size, size: Size) -> Program:
        """From one size to another."""
        key = ("resize", shape, now, size)
        return key, lambda: programs.compile_resize(shape, self.abstract(shape, now), size)

    def jump(self, shape: programs.StepShape, size: Size, height: int, width: int) -> Program:
        """Forced tokens."""
        compile_it = functools.partial(programs.compile_jump, self._config, shape, self._weights)
        key = ("jump", shape, size, (height, width))
        return key, lambda: compile_it(self.abstract(shape, size), height, width)

    def read(self, num_tokens: int, behind_len: int) -> Program:
        """A chunk's forward."""
        compile_it = functools.partial(programs.compile_read, self._config, self._weights)
        return ("read", num_tokens, behind_len), lambda: compile_it(num_tokens, behind_len)

    def extend(self, num_tokens: int, behind_len: int, max_len: int) -> Program:
        """A row of what was read of a prompt."""
        sizes = num_tokens, behind_len, max_len
        return ("extend", *sizes), lambda: programs.compile_extend(self._config, *sizes)

    def start(self, shape: programs.StepShape, num_tokens: int) -> Program:
        """The prompts that end in a chunk."""
        joining = functools.partial(self._joining, shape, num_tokens)
        key = ("start", shape, num_tokens)
        return key, lambda: programs.compile_start(self._config, shape, joining())

    def place(self, shape: programs.StepShape, size: Size, num_tokens: int) -> Program:
        """A chunk into a lane."""
        compile_it = functools.partial(programs.compile_place, self._config, shape, self._weights)
        joining = functools.partial(self._joining, shape, num_tokens)
        key = ("place", shape, size, num_tokens)
        return key, lambda: compile_it(self.abstract(shape, size), joining(), num_tokens)

    def _joining(self, shape: programs.StepShape, num_tokens: int) -> Any:
        return self.abstract(shape, (chunks.prompts_in(num_tokens), programs.FIRST_ROOM))[0]

    def put_behind(self, shape: programs.StepShape, size: Size, behind_len: int) -> Program:
        """A row into a lane."""
        compile_it = functools.partial(programs.compile_put_behind, self._config, shape)
        key = ("put_behind", shape, size, behind_len)
        return key, lambda: compile_it(self.abstract(shape, size)[1], behind_len)

    def take_slot(self, shape: programs.StepShape, size: Size, max_len: int) -> Program:
        """A row out of a lane."""
        key = ("take_slot", shape, size, max_len)
        return key, lambda: programs.compile_take_slot(shape, self.abstract(shape, size)[1], max_len)
