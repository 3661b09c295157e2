"""A web application on a port: bounded connections and headers, a clear line where it can't listen."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import signal
from collections.abc import AsyncIterator

from aiohttp import web

from safelm.serving.connections import Connections

_HEADER_BYTES = 8190


@dataclasses.dataclass(frozen=True)
class Listener:
    """An application that is reached at `url`."""

    url: str
    runner: web.AppRunner


@contextlib.asynccontextmanager
async def listening(
    app: web.Application, host: str, port: int, *, connections: int, seconds: float
) -> AsyncIterator[Listener]:
    """Listens for as long as the block runs.

    Args:
      port: 0 for any free one.
      connections: open at once. seconds: that an idle one is kept.

    Raises OSError if it can't listen there.
    """
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # its lines repeat what clients sent
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    make = functools.partial(
        Connections(connections).make,
        runner.server,
        access_log=None,
        keepalive_timeout=seconds,
        lingering_time=1.0,
        max_line_size=_HEADER_BYTES,
        max_field_size=_HEADER_BYTES,
        auto_decompress=False,
    )
    try:
        try:
            listener = await asyncio.get_running_loop().create_server(make, host, port, backlog=512)
        except OSError as error:
            raise OSError(f"--port={port}: can't listen there on {host} ({error.strerror})") from error
        name, number = listener.sockets[0].getsockname()[:2]
        try:
            yield Listener(f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}", runner)
        finally:
            listener.close()
    finally:
        await runner.cleanup()


def told_to_end() -> asyncio.Event:
    """An event of the first SIGTERM or SIGINT that this process gets; a second one ends the process at once."""
    first = asyncio.Event()

    def note(number: int) -> None:
        if first.is_set():
            logging.shutdown()
            os._exit(128 + number)  # an exit would wait for threads, and so for what they compile
        first.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note, number)
    return first
