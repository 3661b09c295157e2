"""Bounds the open connections, and makes room for new clients by closing slow ones."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from aiohttp import web


class Connections:
    """Creates connections, at most `most` at once.

    Beyond that a new connection replaces the one that has gone longest without a finished request, except those whose
    request is being decoded or scored. There are fewer of those than connections (see `Limits`).
    """

    def __init__(self, most: int):
        self._most = most
        self._open: set[Connection] = set()

    def make(self, server: web.Server, **options: Any) -> "Connection":
        """A connection of `server`; `options` are those of `aiohttp.web.RequestHandler`."""
        return Connection(self, server, loop=asyncio.get_running_loop(), **options)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: "Connection") -> None:
        """Registers an open connection, and cuts off another if necessary."""
        while len(self._open) >= self._most:
            idle = [each for each in self._open if not each.is_answered]
            oldest = min(idle, key=lambda each: each.since)
            self._open.discard(oldest)
            if oldest.transport is not None:
                oldest.transport.abort()
        self._open.add(connection)

    def discard(self, connection: "Connection") -> None:
        """Forgets a closed connection."""
        self._open.discard(connection)


class Connection(web.RequestHandler):
    """A client's connection.

    Attributes:
      since: time.monotonic() of its start or its last answer.
      is_answered: whether a request of it is being decoded or scored.
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

    def note_reply(self) -> None:
        """Says that a request of it has had its reply, of whatever kind."""
        self.since = time.monotonic()

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Context manager that protects the connection while its request is decoded or scored."""
        self.is_answered = True
        try:
            yield
        finally:
            self.is_answered = False
            self.note_reply()
