"""Sends many requests to one endpoint: a failing request fails alone, and an endpoint that is down ends the run."""

import asyncio
import collections
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from safelm.safety.endpoint_client import Completion, EndpointClient, EndpointError, PassingError, RequestRefusedError

GIVE_UP_AFTER = 8
_PROBE = [{"role": "user", "content": "Answer with the word yes."}]
_PROBE_TOKENS = 16
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


@dataclasses.dataclass
class _Task(Generic[_Item]):
    index: int
    item: _Item
    failures: int = 0


class RequestQueue(Generic[_Item, _Answer]):
    """Sends the requests of all items, `concurrency` at once.

    An item whose request fails at every retry is set aside and asked again at the end, provided that the endpoint
    answers a short request; if it fails again, it is delivered without an answer. If the short request fails too, `run`
    raises, so that an outage costs no item.
    """

    def __init__(
        self,
        endpoint: EndpointClient,
        ask: Callable[[Any, _Item], Awaitable[_Answer]],
        deliver: Callable[[int, _Answer | None], None],
        *,
        book: Callable[[Completion], object],
        concurrency: int,
        give_up_after: int = GIVE_UP_AFTER,
    ):
        """A queue for one run.

        Args:
          ask: called with the open client and an item; may raise what `EndpointClient.complete` does.
          deliver: called with an item's index and its answer, or None if the request failed at every retry, twice. An
            EndpointError that it raises ends the run.
          book: called with the answers to the short requests.
          give_up_after: number of items set aside after which the endpoint is tested with a short request.
        """
        self._endpoint, self._ask, self._deliver, self._book = endpoint, ask, deliver, book
        self._concurrency, self._give_up_after = concurrency, give_up_after
        self._waiting: collections.deque[_Task[_Item]] = collections.deque()
        self._aside: list[_Task[_Item]] = []
        self._error: EndpointError | None = None
        self._lock = asyncio.Lock()

    async def run(self, items: Sequence[_Item]) -> None:
        """Sends all requests. Raises EndpointError if the endpoint is unusable; open requests are still delivered."""
        self._waiting.extend(_Task(*pair) for pair in enumerate(items))
        async with self._endpoint.open() as client:
            while self._waiting and self._error is None:
                count = min(self._concurrency, len(self._waiting))
                workers = [asyncio.create_task(self._work(client)) for _ in range(count)]
                try:
                    await asyncio.gather(*workers)
                except BaseException:  # an interrupt, or the receiver's own failure: what is under way goes with it
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
                    raise
                await self._settle(client)
        if self._error is not None:
            raise self._error

    async def _work(self, client: Any) -> None:
        """Sends one request after the other until none waits or the endpoint proves unusable."""
        while self._waiting and self._error is None:
            task = self._waiting.popleft()
            try:
                self._deliver(task.index, await self._ask(client, task.item))
            except PassingError:
                task.failures += 1
                self._aside.append(task)
                if len(self._aside) >= self._give_up_after:
                    await self._settle(client)
            except EndpointError as error:
                self._error = self._error or error

    async def _settle(self, client: Any) -> None:
        """Asks the items that were set aside again, gives them up or, if nothing is answered any more, ends the run."""
        async with self._lock:
            if not self._aside or self._error is not None:
                return
            aside, self._aside = self._aside, []
            try:
                self._book(await self._endpoint.complete(client, _PROBE, {"max_tokens": _PROBE_TOKENS}))
            except RequestRefusedError:
                pass  # that is an answer
            except EndpointError as error:
                self._error = error
                return
            for task in aside:
                if task.failures < 2:
                    self._waiting.append(task)
                    continue
                try:
                    self._deliver(task.index, None)
                except EndpointError as error:
                    self._error = self._error or error
