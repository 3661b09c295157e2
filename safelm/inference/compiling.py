"""Compiles programs in a thread of its own while others run.

`jax.jit` shares compiled programs between threads: a call finds what `lower(..).compile()` has made. So lowering from
shapes alone in another thread, which needs no memory, saves a later call the compilation (except tracing, about a
tenth).
"""

import concurrent.futures
import logging
from collections.abc import Callable, Hashable, Iterable

log = logging.getLogger(__name__)
Program = tuple[Hashable, Callable[[], object]]  # what it is known by, and how it is compiled


class BackgroundCompiler:
    """Knows the compiled programs and makes missing ones, one at a time. To be used by one thread at a time."""

    def __init__(self) -> None:
        self._made: set[Hashable] = set()
        self._making: tuple[Hashable, concurrent.futures.Future[None]] | None = None
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="safelm-compile")

    def has(self, programs: Iterable[Program]) -> bool:
        """Whether all of these are compiled.

        If not, the first missing one is compiled next, once the thread is free.
        """
        self._collect()
        missing = next((program for program in programs if program[0] not in self._made), None)
        if missing is None:
            return True
        if self._making is None:
            key, compile_it = missing
            self._making = key, self._executor.submit(_make, key, compile_it)
        return False

    def is_made(self, key: Hashable) -> bool:
        """Whether the program of this name is compiled."""
        self._collect()
        return key in self._made

    def note(self, programs: Iterable[Program]) -> None:
        """Registers programs that are about to be called, and compiled by that; waits for one being compiled."""
        keys = {key for key, _ in programs}
        if self._making is not None and self._making[0] in keys:
            self.wait()
        self._made |= keys

    def wait(self) -> None:
        """Waits until nothing is being compiled."""
        if self._making is not None:
            concurrent.futures.wait([self._making[1]])
        self._collect()

    def _collect(self) -> None:
        if self._making is not None and self._making[1].done():
            self._made.add(self._making[0])  # also after a failure: the call that needs it tells of it
            self._making = None


def _make(key: Hashable, compile_it: Callable[[], object]) -> None:
    try:
        compile_it()
    except Exception as error:
        log.warning("compiling in the background failed, %s: %s", type(error).__name__, key)
