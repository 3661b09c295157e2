"""An engine that computes nothing, for tests of HTTP behaviour: it says what it is told to, as slowly as it is told."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tiny_runs

from safelm.inference.methods import Beam, Method, SafeBeam
from safelm.inference.prefixes import Prefixes
from safelm.inference.requests import EngineRequest, TraceCandidate, Update
from safelm.models import decoder as model
from safelm.serving import app
from safelm.serving.limits import Limits
from safelm.serving.models import ServedModel


@dataclasses.dataclass
class Script:
    """What every fake engine made with it does; tests change it while the server runs.

    Attributes:
      text: the continuation; its tokens' P(tag) are 0.01, 0.02, ..
      may_go: while clear, no step makes a token.
      may_return: while clear, a step takes for ever, as one that compiles does; is_held: such a step is under way.
      fail_next_step: raise once.
      fail_at, hold_at: raise once, or give nothing more, when a request has been told so many tokens.
      cancelled: ids, in order.
      requests: as submitted.
    """

    text: str = " the cat sat on the mat"
    may_go: threading.Event = dataclasses.field(default_factory=threading.Event)
    may_return: threading.Event = dataclasses.field(default_factory=threading.Event)
    is_held: threading.Event = dataclasses.field(default_factory=threading.Event)
    fail_next_step: bool = False
    fail_at: int | None = None
    hold_at: int | None = None
    cancelled: list[int] = dataclasses.field(default_factory=list)
    requests: list[EngineRequest] = dataclasses.field(default_factory=list)
    ids: list[int] | None = None  # in place of the text

    def __post_init__(self) -> None:
        self.may_go.set()
        self.may_return.set()

    @contextlib.contextmanager
    def long_step(self) -> Iterator[None]:
        """A step that is under way from the beginning to the end, whatever happens between."""
        self.may_return.clear()
        try:
            assert self.is_held.wait(60), "no step began"
            yield
        finally:
            self.may_return.set()

    def tokens(self, request: EngineRequest) -> list[int]:
        ids = tiny_runs.tokenizer().encode(self.text) if self.ids is None else self.ids
        return [*ids, request.end_ids[0]][: request.max_new_tokens]


class FakeEngine:
    """The engine's contract: a token a step and request, beam methods all at the end, `slots` requests at a time."""

    def __init__(self, script: Script, slots: int = 4):
        self._script, self._slots, self._next_id = script, slots, 0
        self._all: dict[int, tuple[EngineRequest, int]] = {}  # tokens told so far
        self._told: list[Update] = []
        self.prefixes = Prefixes()

    def compile_ahead(self, methods: Sequence[Method], *, longest: int) -> Iterator[None]:
        return iter(())

    @property
    def num_active(self) -> int:
        return min(len(self._all), self._slots)

    @property
    def num_waiting(self) -> int:
        return len(self._all) - self.num_active

    @property
    def tokens_reserved(self) -> int:
        return sum(len(request.prompt) + request.max_new_tokens for request, _ in self._all.values())

    @property
    def is_idle(self) -> bool:
        return not self._all and not self._told

    def check(self, request: EngineRequest) -> None:
        if request.max_new_tokens > 500:
            raise ValueError("max_new_tokens can never fit")

    def submit(self, request: EngineRequest) -> int:
        self.check(request)
        self._script.requests.append(request)
        self._next_id += 1
        self._all[self._next_id] = (request, 0)
        return self._next_id

    def cancel(self, request_id: int) -> None:
        if self._all.pop(request_id, None) is not None:
            self._script.cancelled.append(request_id)
            self._told.append(Update(request_id, finished="cancelled"))

    def step(self) -> list[Update]:
        if not self._script.may_return.is_set():
            self._script.is_held.set()
            self._script.may_return.wait(60)
            self._script.is_held.clear()
        if self._script.fail_next_step:
            self._script.fail_next_step = False
            raise ArithmeticError(self._script.text)
        updates, self._told = self._told, []
        if not self._script.may_go.wait(0.005):
            return updates
        for request_id, (request, num_told) in [*self._all.items()][: self._slots]:
            if num_told == self._script.fail_at:
                self._script.fail_at = None
                raise ArithmeticError(self._script.text)
            if num_told == self._script.hold_at:
                time.sleep(0.001)
                continue
            tokens = self._script.tokens(request)
            is_beam = isinstance(request.method, Beam | SafeBeam)
            new = tokens[num_told:] if is_beam else tokens[num_told : num_told + 1]
            probs = tuple(round(0.01 * (num_told + index + 1), 2) for index in range(len(new)))
            is_over = num_told + len(new) >= len(tokens)
            finished = ("eos" if tokens[-1] in request.end_ids else "length") if is_over else ""
            trace = _trace(tokens) if is_over and request.want_trace else None
            updates.append(Update(request_id, tuple(new), probs, finished, -1.5, trace=trace))
            self._all[request_id] = (request, num_told + len(new))
            if is_over:
                del self._all[request_id]
        return updates


def _trace(tokens: list[int]) -> tuple[tuple[TraceCandidate, ...], ...]:
    """Each step: the chosen token, one that was dropped, one that was outranked."""
    return tuple(
        (
            TraceCandidate(0, token, -float(step), 0.001, "kept", 0),
            TraceCandidate(0, 7, -0.5, 0.9, "dropped", None),
            TraceCandidate(0, 8, -99.0, 0.002, "outranked", None),
        )
        for step, token in enumerate(tokens)
    )


@functools.cache
def tiny_model(name: str = "tiny", seed: int = 0) -> ServedModel:
    """Random weights and the trained vocabulary of `tiny_runs`."""
    config = model.ModelConfig(**tiny_runs.model_fields(max_seq_len=512), attention="xla")
    return ServedModel(config, model.init(config, jax.random.key(seed)), tiny_runs.tokenizer(), name)


@dataclasses.dataclass
class Running:
    """A server in a thread of its own, for clients that block."""

    url: str
    server: app.Server
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def run(self, coroutine: Any) -> Any:
        """Runs a coroutine in the server's loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)


@contextlib.contextmanager
def running(
    models: dict[str, ServedModel],
    make_engines: dict[str, Callable[[], Any]],
    *,
    limits: Limits | None = None,
    **config: Any,
) -> Iterator[Running]:
    """A server on a free loopback port until the block ends."""
    settings = app.ServerConfig(limits or Limits(), port=0, **config)
    with in_thread(app.serving(settings, models, make_engines)) as found:
        yield found


@contextlib.contextmanager
def in_thread(serving: contextlib.AbstractAsyncContextManager[Any]) -> Iterator[Running]:
    """What listens while `serving` is open, in an event loop of its own until the block ends."""
    started: dict[str, Any] = {}
    is_up = threading.Event()

    async def main() -> None:
        started["stop"] = asyncio.Event()
        async with serving as listener:
            started["running"] = Running(listener.url, listener, asyncio.get_running_loop())
            is_up.set()
            await started["stop"].wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="server")
    thread.start()
    assert is_up.wait(60)
    try:
        yield started["running"]
    finally:
        started["running"].loop.call_soon_threadsafe(started["stop"].set)
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def left_clean(running: "Running", script: Script) -> Iterator[None]:
    """A test's part of a shared server: an engine that goes on its way before it, nothing left and an answer after."""
    script.may_go.set()
    script.text = " the cat"
    yield
    script.may_go.set()
    script.hold_at = None
    is_empty(running)
    assert http(running, "POST", "/v1/completions", COMPLETION).status == 200


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Waits until it holds; fails after a minute."""
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, f"never happened: {what}"
        time.sleep(0.002)


def http(running: Running, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> "Answer":
    """One request on a connection of its own."""
    import http.client

    connection = http.client.HTTPConnection(*running.address, timeout=600)  # the first request may wait for compilation
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if data is not None else {}
        connection.request(method, path, data, sent | (headers or {}))
        response = connection.getresponse()
        return Answer(response.status, {key.lower(): value for key, value in response.getheaders()}, response.read())
    finally:
        connection.close()


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"].startswith("application/json")
        assert self.json.keys() == {"error"} and self.json["error"].keys() == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """A stream's events; the last must be [DONE]."""
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


COMPLETION = {"prompt": "one", "max_tokens": 50}


def serve(
    script: Script, *, limits: Limits, slots: int = 2, **config: Any
) -> contextlib.AbstractContextManager[Running]:
    """A server of one model that says what the script says."""
    return running({"tiny": tiny_model()}, {"tiny": lambda: FakeEngine(script, slots)}, limits=limits, **config)


def is_empty(server: Running) -> None:
    """Waits until nothing is left in the server."""
    service = server.server.service
    wait_for(lambda: service.admission.num_open == 0, "no request is open")
    wait_for(lambda: service.worker.num_active == service.worker.num_waiting == {"tiny": 0}, "no slot is taken")


def post(server: Running, body: Any, path: str = "/v1/completions", **headers: str) -> Answer:
    """A request with headers whose names have _ for -."""
    return http(server, "POST", path, body, {key.replace("_", "-"): value for key, value in headers.items()})


def start(server: Running, **fields: Any) -> Any:
    """A completion whose reply isn't read yet."""
    import http.client

    connection = http.client.HTTPConnection(*server.address, timeout=60)
    body = json.dumps(COMPLETION | fields)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection


def number_open(server: Running) -> int:
    """Requests being answered."""
    return server.server.service.admission.num_open
