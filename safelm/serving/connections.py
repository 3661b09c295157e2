"""The open connections: bounded, and never so full of slow clients that a new one can't be answered."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from aiohttp import web


class Connections:
    """Makes connections, at most `most` at once.

    Beyond that a new one takes the place of the one that has been without a finished request for longest, the requests
    being decoded or scored left alone. There are fewer of those than places (see `Limits`).
    """

    def __init__(self, most: int):
        self._most = most
        self._open: set[Connection] = set()

    def make(self, server: web.Server, **options: Any) -> "Connection":
        """A connection of `server`; `options` are `aiohttp.web.RequestHandler`'s."""
        return Connection(self, server, loop=asyncio.get_running_loop(), **options)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: "Connection") -> None:
        """Takes in a connection that is open now, and cuts off another one if need be."""
        while len(self._open) >= self._most:
            idle = [each for each in self._open if not each.is_answered]
            oldest = min(idle, key=lambda each: each.since)
            self._open.discard(oldest)
            if oldest.transport is not None:
                oldest.transport.abort()
        self._open.add(connection)

    def discard(self, connection: "Connection") -> None:
        """Forgets a connection that is closed."""
        self._open.discard(connection)


class Connection(web.RequestHandler):
    """A client's connection.

    Attributes:
      since: time.monotonic() of its beginning or of its last answer.
      is_answered: a request of it is being decoded or scored.
    """

    def __init__(self, connections: Connections, server: web.Server, **options: Any):
        super().__init__(server, **options)
        self._connections = connections
        self.since, self.is_answered = time.monotonic(), False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connections.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: BaseException | None) -> None:
        self._connections.discard(self)
        super().connection_lost(error)

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Keeps the connection's place while the block decodes or scores its request."""
        self.is_answered = True
        try:
            yield
        finally:
            self.is_answered, self.since = False, time.monotonic()
