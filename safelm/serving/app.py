"""The server's life cycle: listen, answer, and on SIGTERM finish open requests before it ends."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Mapping

from aiohttp import web

from safelm.inference.engine import Engine
from safelm.inference.methods import METHODS
from safelm.inference.planning import planner
from safelm.inference.requests import EngineRequest
from safelm.serving import access, static_files, token_routes
from safelm.serving.errors import ApiError
from safelm.serving.limits import Admission, Limits, Shapes
from safelm.serving.listening import Listener, listening, told_to_end
from safelm.serving.metrics import Metrics
from safelm.serving.models import ServedModel
from safelm.serving.routes import Service
from safelm.serving.warm_up import warm_up
from safelm.serving.worker import EngineWorker

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """The server's settings.

    Attributes:
      key: the API key that clients must send; empty for none.
      default_method: the decoding method of requests that name none.
      port: 0 for any free port.
      warms_up: whether `serve` compiles the first programs before it reports ready.
      warm_tokens: tokens of prompt and reply up to which none then waits for the compiler.
    """

    limits: Limits
    key: str = ""
    default_method: str = "sample"
    host: str = "127.0.0.1"
    port: int = 8000
    warms_up: bool = False
    warm_tokens: int = 512


class Server:
    """A running server, in one event loop.

    Attributes:
      url: the address it listens on.
      service: the state that the routes share.
    """

    def __init__(self, config: ServerConfig, service: Service, listener: Listener):
        self.service, self.url = service, listener.url
        self._config, self._runner = config, listener.runner

    async def warm_up(self) -> None:
        """Compiles the first programs, if configured, and then reports ready."""
        if not self.service.is_warm:
            longest = self._config.warm_tokens
            await warm_up(self.service.models, self.service.worker, self._config.default_method, longest=longest)
            self.service.is_warm = True

    async def drain(self) -> None:
        """Refuses new requests, waits for open ones during the grace period, and then ends those that are left."""
        admission, worker = self.service.admission, self.service.worker
        admission.is_draining = True
        log.info("draining: %d requests under way", admission.num_open)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.limits.grace_seconds):
                await admission.wait_until_empty()
        if admission.num_open:
            log.warning("the grace period is over: %d requests are ended", admission.num_open)
            worker.abandon(ApiError(503, "the server is shutting down", code="shutting_down"))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await admission.wait_until_empty()


@contextlib.asynccontextmanager
async def serving(
    config: ServerConfig, models: Mapping[str, ServedModel], make_engines: Mapping[str, Callable[[], Engine]]
) -> AsyncIterator[Server]:
    """Context manager for a server that listens during the block.

    Raises OSError if it can't listen, ValueError if the default method could answer no request to a model.
    """
    limits, metrics, worker = config.limits, Metrics(), EngineWorker(make_engines)
    for model in models.values():
        _check_method(config.default_method, model, worker)
    service = Service(
        models,
        worker,
        limits,
        Admission(limits.open_requests),
        Shapes(limits.shapes),
        metrics,
        config.default_method,
        is_warm=not config.warms_up,
    )
    app = web.Application(
        middlewares=[
            access.count_and_tell_errors(metrics, seconds_to_send=limits.body_seconds),
            access.allow(key=config.key, is_loopback=access.is_loopback(config.host)),
        ],
        client_max_size=limits.body_bytes,
    )
    app.add_routes([*service.routes(), *token_routes.routes(service.find, limits), *static_files.routes("playground")])
    place = (config.host, config.port)
    service.worker.start()
    try:
        async with listening(app, *place, connections=limits.connections, seconds=limits.body_seconds) as listener:
            yield Server(config, service, listener)
    finally:
        await asyncio.to_thread(service.worker.stop)


def _check_method(name: str, model: ServedModel, worker: EngineWorker) -> None:
    """Raises ValueError if a model's engine could never take a request with this method's own settings."""
    method, prompt = model.steered(METHODS[name]()), tuple(model.encode("", is_chat=False))
    try:
        plan = planner(model.config, model.tokenizer, method, is_chat=True, knob=model.knob)
        worker.check(model.name, EngineRequest(prompt, method, 1, model.end_ids, plan=plan))
    except ValueError as error:
        raise ValueError(f"method={name}: model {model.name}: {error}") from None


async def serve(
    config: ServerConfig,
    models: Mapping[str, ServedModel],
    make_engines: Mapping[str, Callable[[], Engine]],
    *,
    started: Callable[[Server], None],
) -> None:
    """Serves until SIGTERM or SIGINT and drains; a second signal ends the process at once.

    `started` is called after warming up.
    """
    first = told_to_end()
    async with serving(config, models, make_engines) as server:
        ready, ended = asyncio.ensure_future(server.warm_up()), asyncio.ensure_future(first.wait())
        await asyncio.wait([ready, ended], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
            started(server)
            await ended
        ready.cancel()
        await server.drain()
