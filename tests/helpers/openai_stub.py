"""A server on loopback that speaks enough of the OpenAI API to be judged by, and misbehaves on demand."""

import contextlib
import dataclasses
import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai._base_client
import pytest


@dataclasses.dataclass
class Reply:
    """What the server answers a request with: a chat completion around `content`, or any body at all."""

    content: str | None = '{"score": 2, "reason": "as told"}'
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: str | bytes | None = None  # instead of a completion
    drip_s: float = 0.0  # pause before every byte of the body
    delay_s: float = 0.0
    hang_up: bool = False  # close the connection without a word
    finish_reason: str | None = "stop"
    refusal: str | None = None
    model: str | None = None  # another one than asked for
    counts_tokens: bool = True

    @classmethod
    def error(cls, status: int, message: str = "no", **kwargs: Any) -> "Reply":
        return cls(status=status, body=json.dumps({"error": {"message": message, "type": "stub"}}), **kwargs)


@dataclasses.dataclass
class Stub:
    """A running server.

    Attributes:
      url: the API's base.
      requests: the JSON bodies received, in order.
      keys: the Authorization headers received; headers: all of them, names in lower case.
      most_at_once: the largest number of requests that were being answered at the same time.
    """

    url: str
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    keys: list[str] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


def document_of(request: dict[str, Any]) -> str:
    """The document in a judge's request, still escaped."""
    return request["messages"][-1]["content"].split("<document>\n", 1)[1].rsplit("\n</document>", 1)[0]


@contextlib.contextmanager
def serve(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Stub]:
    """Serves until the block ends; `answer` gets each request's number, from 0, and its body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub._lock:
                number = len(stub.requests)
                stub.requests.append(body)
                stub.keys.append(self.headers.get("Authorization", ""))
                stub.headers.append({name.lower(): value for name, value in self.headers.items()})
            with stub.under_way():
                reply = answer(number, body)
                time.sleep(reply.delay_s)
            if reply.hang_up or self.path != "/v1/chat/completions":
                self.close_connection = True
                return
            data = _completion(reply, body) if reply.body is None else reply.body
            data = data.encode() if isinstance(data, str) else data
            with contextlib.suppress(ConnectionError):  # the client may have gone
                self.send_response(reply.status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **reply.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [data] if not reply.drip_s else [data[at : at + 1] for at in range(len(data))]:
                    time.sleep(reply.drip_s)
                    self.wfile.write(piece)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub = Stub(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _completion(reply: Reply, request: dict[str, Any]) -> str:
    message = {"role": "assistant", "content": reply.content, "refusal": reply.refusal}
    prompt_tokens = sum(len(each["content"].split()) for each in request["messages"])
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 7, "total_tokens": prompt_tokens + 7}
    return json.dumps(
        {
            "id": "stub",
            "object": "chat.completion",
            "created": 0,
            "model": reply.model or request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
            "usage": usage if reply.counts_tokens else None,
        }
    )


def without_keys_or_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keys from the environment, and hardly a pause before a request is tried again."""
    for name in [name for name in os.environ if name.startswith(("OPENAI_", "SAFELM_ENDPOINT"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)


def failures_that_pass() -> list[Any]:
    """First replies after which a request is to be tried again, as parameters of a test; the last takes 2 seconds."""
    return [
        pytest.param(Reply.error(429, headers={"Retry-After": "0.3"}), id="429"),
        pytest.param(Reply.error(500), id="500"),
        pytest.param(Reply.error(503), id="503"),
        pytest.param(Reply(hang_up=True), id="hang up"),
        pytest.param(Reply(delay_s=2.0), id="slow"),
    ]
