"""The single computing thread: steps every model's engine in turn and runs scoring between steps.

The event loop sends it commands, which run in order, and receives the engines' updates once per step. So no two
computations compete for the cores, and no engine needs a lock.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from safelm.inference.engine import Engine
from safelm.inference.methods import Method
from safelm.inference.requests import EngineRequest, Update
from safelm.serving.errors import log_defect

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request given to the worker. `updates` receives its updates or, as the last item, an exception."""

    model: str
    request: EngineRequest
    updates: "asyncio.Queue[Update | Exception]" = dataclasses.field(default_factory=asyncio.Queue)
    is_cancelled: bool = False
    engine_id: int | None = None  # the worker's own from here on


class EngineWorker:
    """Runs engines by model name; `start` and all async methods belong to one event loop.

    Attributes:
      num_waiting, num_active, tokens_reserved: by model, after the last step; for metrics.
      prefixes: by model, the prompts that looked for a kept beginning ("asked") and found one ("found"), the tokens
        that these didn't have to read ("tokens"), and the positions kept ("kept").
    """

    def __init__(self, make_engines: Mapping[str, Callable[[], Engine]]):
        """Makes the engines by `make_engines`, which is called again for the first request after one has failed."""
        self._make_engines = dict(make_engines)
        self._engines = {name: make() for name, make in self._make_engines.items()}
        self._tickets: dict[str, dict[int, Ticket]] = {name: {} for name in self._engines}
        self._open: set[Ticket] = set()  # this and the next are the event loop's
        self._calls: set[asyncio.Future[Any]] = set()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="safelm-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.num_waiting = dict.fromkeys(self._engines, 0)
        self.num_active = dict.fromkeys(self._engines, 0)
        self.tokens_reserved = dict.fromkeys(self._engines, 0)
        self.prefixes = {name: dict.fromkeys(("asked", "found", "tokens", "kept"), 0) for name in self._engines}

    def check(self, model: str, request: EngineRequest) -> None:
        """Raises ValueError for a request that can never run. To be called before `start`."""
        self._engines[model].check(request)

    def start(self) -> None:
        """Starts the thread; the running event loop receives the updates."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step, without notifying tickets; returns when it has ended."""
        self._commands.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests can still be answered."""
        return self._thread.is_alive()

    def abandon(self, error: Exception) -> None:
        """Ends every request and call with this exception at once, whatever the thread is doing."""
        _deliver([(ticket, error) for ticket in self._open])
        for future in self._calls:
            _settle(future, None, error)

    async def generate(self, model: str, request: EngineRequest) -> AsyncIterator[Update]:
        """Yields a request's updates; leaving early in any way frees its slot.

        Raises the engine's error: ValueError for a request that can never fit, RuntimeError if the engine failed.
        """
        ticket = Ticket(model, request)
        self._open.add(ticket)
        self._commands.put(lambda: self._submit(ticket))
        try:
            while True:
                update = await ticket.updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update.finished:
                    return
        finally:
            self._open.discard(ticket)
            ticket.is_cancelled = True
            self._commands.put(lambda: self._cancel(ticket))

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function in the thread between steps, unless the caller has gone by then."""
        assert self._loop is not None
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            if future.done():
                return
            try:
                result, error = function(), None
            except Exception as caught:
                result, error = None, caught
            self._to_loop(_settle, future, result, error)

        self._calls.add(future)
        self._commands.put(run)
        try:
            return await future
        finally:
            self._calls.discard(future)

    async def compile_ahead(self, model: str, methods: Sequence[Method], *, longest: int) -> None:
        """`Engine.compile_ahead` between steps; raises what it raises."""
        await self.call(lambda: self._replace_failed(model))
        left = await self.call(lambda: self._engines[model].compile_ahead(methods, longest=longest))
        while await self.call(lambda: next(left, self)) is not self:
            pass

    def _work(self) -> None:
        while True:
            is_idle = all(engine.is_idle for engine in self._engines.values())
            while is_idle or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                self._obey(command)
                is_idle = all(engine.is_idle for engine in self._engines.values())
            for name in list(self._engines):
                if not self._engines[name].is_idle:
                    self._step(name)
                self._count(name)

    def _obey(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception as error:  # the thread must live on: everybody waits for it
            log_defect("a command of the engine's thread failed", error)

    def _step(self, name: str) -> None:
        try:
            updates = self._engines[name].step()
        except Exception as error:
            log_defect(f"the engine of model {name} failed, its {len(self._tickets[name])} requests end", error)
            failure = RuntimeError(f"the engine failed ({type(error).__name__})")
            self._to_loop(_deliver, [(ticket, failure) for ticket in self._tickets[name].values()])
            self._tickets[name] = {}
            del self._engines[name]  # its memory is the next one's
            return
        delivered = []
        for update in updates:
            ticket = self._tickets[name].get(update.request_id)
            if ticket is None:
                continue
            delivered.append((ticket, update))
            if update.finished:
                del self._tickets[name][update.request_id]
        if delivered:
            self._to_loop(_deliver, delivered)

    def _replace_failed(self, name: str) -> None:
        """Makes a model's engine anew if it failed. Raises RuntimeError if it can't be made."""
        if name in self._engines:
            return
        try:
            self._engines[name] = self._make_engines[name]()
        except Exception as error:
            raise RuntimeError(f"the engine failed and can't be made anew ({type(error).__name__})") from error

    def _submit(self, ticket: Ticket) -> None:
        if ticket.is_cancelled:
            return
        try:
            self._replace_failed(ticket.model)
            ticket.engine_id = self._engines[ticket.model].submit(ticket.request)
        except Exception as error:
            if not isinstance(error, ValueError):
                log_defect(f"model {ticket.model}: a request was not taken", error.__cause__ or error)
            self._to_loop(_deliver, [(ticket, error)])
            return
        self._tickets[ticket.model][ticket.engine_id] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        tickets = self._tickets[ticket.model]
        if ticket.engine_id is None or tickets.get(ticket.engine_id) is not ticket:
            return  # never submitted, or over
        del tickets[ticket.engine_id]
        self._engines[ticket.model].cancel(ticket.engine_id)
        self._count(ticket.model)

    def _count(self, name: str) -> None:
        if name not in self._engines:
            self.num_waiting[name] = self.num_active[name] = self.tokens_reserved[name] = 0
            return
        engine = self._engines[name]
        self.num_waiting[name], self.num_active[name] = engine.num_waiting, engine.num_active
        self.tokens_reserved[name] = engine.tokens_reserved
        kept = engine.prefixes
        self.prefixes[name] = {
            "asked": kept.num_asked,
            "found": kept.num_found,
            "tokens": kept.num_tokens_found,
            "kept": kept.num_tokens,
        }

    def _to_loop(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.debug("an update came after the event loop had closed")


def _deliver(updates: Sequence[tuple[Ticket, "Update | Exception"]]) -> None:
    for ticket, update in updates:
        ticket.updates.put_nowait(update)


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
