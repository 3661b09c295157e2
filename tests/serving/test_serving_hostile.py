"""Requests made to hurt: numbers beyond all range, odd encodings, foreign hosts, slow crowds, work for the event loop.

Behind every test: the server answers the next request, and no slot is left behind.
"""

import concurrent.futures
import contextlib
import dataclasses
import gzip
import json
import logging
import threading

import pytest
from serving_fakes import (
    COMPLETION,
    FakeEngine,
    number_open,
    post,
    running,
    serve,
    start,
    tiny_model,
    wait_for,
)
from serving_fakes import http as ask

from safelm.serving import replies
from safelm.serving.limits import Limits
from safelm.text import prompting

LIMITS = Limits(body_seconds=60.0, open_requests=3, new_tokens=450, connections=12)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
COMPLETIONS, CHATS, SCORES = "/v1/completions", "/v1/chat/completions", "/v1/safelm/score"
OWN = (
    "num_beams",
    "num_candidates",
    "drop_fraction",
    "drop_above",
    "anchor",
    "length_penalty",
    "top_k",
    "threshold",
    "penalty",
    "stop_above",
    "want_trace",
    "method",
    "tag_candidate",
)
FIELDS = (
    "model",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "n",
    "stop",
    "stream",
    "best_of",
    "echo",
    "suffix",
    "logprobs",
    "top_logprobs",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "user",
    "metadata",
    "stream_options",
    "safelm",
    "input",
    "messages",
    "tools",
    "response_format",
)
VALUES = [10**400, -(10**4000), 1e308, [10**400], {"a": 10**400}]


def bodies(value):
    """Requests with this value in every field, and in every place that holds numbers."""
    prompt, messages = {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}
    for name in FIELDS:
        yield COMPLETIONS, prompt | {name: value}
        yield CHATS, messages | {name: value}
        yield SCORES, {"input": "a"} | {name: value}
    for name in OWN:
        yield COMPLETIONS, prompt | {"safelm": {"method": "safe_beam", name: value}}
    yield COMPLETIONS, prompt | {"stream_options": {"include_usage": value}}
    for name in ("role", "content", "name", "tool_calls"):
        yield CHATS, {"messages": [messages["messages"][0] | {name: value}]}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:9])
def test_numbers_beyond_all_range_are_refused_by_name(server, value):
    for path, body in bodies(value):
        answer = post(server, body, path)
        if answer.status == 200:  # what nothing depends on
            assert {"metadata"} & set(body) or isinstance(value, dict)
            continue
        assert answer.status in (400, 404), (list(body), answer.body[:200])
        assert answer.error["param"] and len(answer.error["message"]) < 300


@pytest.mark.parametrize("depth", [500, 960])
def test_deep_values_are_refused_in_every_field(server, depth):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = opening * depth + "1" + closing * depth
        for path, body in bodies("DEEP"):
            answer = post(server, json.dumps(body).replace('"DEEP"', deep).encode(), path)
            assert answer.status in (200, 400), (list(body), answer.body[:200])


def test_bodies_in_other_encodings_are_refused(server):
    body = json.dumps(COMPLETION)
    for encoding in ("gzip", "deflate", "br", "zstd", "x-unknown", "gzip, gzip", "identity, gzip", "GZIP"):
        for data in (gzip.compress(body.encode()), b"garbage", b"", body.encode()):
            answer = post(server, data, Content_Encoding=encoding)
            assert answer.status == 415 and answer.error["code"] == "wrong_content_encoding"
            assert answer.headers["accept-encoding"] == "identity"
    for kind in (
        "application/json",
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
    ):
        assert post(server, b"\x1f\x8b garbage", Content_Type=kind, Content_Encoding="gzip").status == 415
    assert post(server, body.encode(), Content_Encoding="identity").status == 200
    for charset in ("utf-16", "latin-1", "utf-7", "nonsense", "\u00ff"):
        assert post(server, body.encode(), Content_Type=f"application/json; charset={charset}").status == 415
    for charset in ("utf-8", "UTF-8", '"utf-8"', ""):
        assert post(server, body.encode(), Content_Type=f"application/json; charset={charset}").status == 200
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        assert (
            post(server, json.dumps(COMPLETION | {"prompt": "\u00e9+"}, ensure_ascii=False).encode(encoding)).status
            == 400
        )
    assert post(server, json.dumps({"prompt": "\u00e9"}, ensure_ascii=False).encode("latin-1")).status == 400
    assert post(server, body.encode("utf-8-sig")).status == 200


def exchange(server, sent: bytes) -> bytes:
    """What the server says to these bytes until it closes."""
    with server.connect() as client:
        client.sendall(sent)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(65536):
                answer += data
    return answer


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("/health", "localhost", 200),
        ("/health", "localhost:", 200),
        ("/health", "127.0.0.1:1", 200),
        ("/health", "127.9.8.7", 200),
        ("/health", "[::1]:8000", 200),
        ("/health", "evil.example", 403),
        ("/health", "localhost.evil.example", 403),
        ("/health", "localhost@evil.example", 403),
        ("/health", "evil.example#localhost", 403),
        ("/health", "[::1]evil.example", 403),
        ("/health", "10.0.0.1", 403),
        ("/health", "", 403),
        ("http://localhost/health", "localhost", 200),
        ("http://127.0.0.1:99/health", "localhost", 200),
        ("http://localhost/health", "evil.example", 403),
        ("http://evil.example/health", "localhost", 403),
        ("http://localhost@evil.example/health", "localhost", 403),
        ("http://evil.example", "localhost", 403),
        ("//evil.example/health", "localhost", 404),
    ],
)
def test_hosts_of_whole_addresses_and_headers_are_checked(server, target, host, status):
    answer = exchange(server, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:100]


def test_two_hosts_are_both_checked(server):
    sent = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert exchange(server, sent)[9:12] in (b"400", b"403")
    sent = b"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert exchange(server, sent)[9:12] in (b"400", b"403")


def test_another_address_of_loopback_is_served(script):
    with serve(script, limits=LIMITS, host="127.0.0.2") as server:
        assert server.address[0] == "127.0.0.2"
        assert ask(server, "GET", "/health").status == post(server, COMPLETION).status == 200
        assert ask(server, "GET", "/health", headers={"Host": "evil.example"}).status == 403


SLOW = {
    "nothing": b"",
    "half a head": HEAD,
    "half a body": HEAD + b'Content-Length: 999\r\n\r\n{"prompt"',
    "chunks": HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"pro\r\n',
    "a page, not read": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3,
}


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
def test_a_crowd_of_slow_clients_keeps_nobody_out(server, script, sent):
    script.may_go.clear()
    answered = start(server)
    wait_for(lambda: number_open(server) == 1, "it is being answered")
    with contextlib.ExitStack() as crowd:
        for _ in range(3 * LIMITS.connections):
            crowd.enter_context(server.connect()).sendall(sent)
            assert ask(server, "GET", "/health").status == 200
        script.may_go.set()
        assert post(server, COMPLETION).status == 200
        response = answered.getresponse()
        assert response.status == 200 and response.read(), "its place was kept"
        answered.close()


def test_there_are_more_connections_than_requests_at_once():
    with pytest.raises(ValueError, match="--connections=64: must be above --open_requests=64"):
        Limits(connections=64)


@contextlib.contextmanager
def held(monkeypatch, module, name, value):
    """A function of the server that waits while the block runs, once it has been called."""
    is_called, may_go = threading.Event(), threading.Event()

    def wait(*_, **__):
        is_called.set()
        assert may_go.wait(60)
        return value

    monkeypatch.setattr(module, name, wait)
    try:
        yield is_called
    finally:
        may_go.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_is_built_beside_the_event_loop(server, monkeypatch, stream):
    body = COMPLETION | {"stream": stream, "safelm": {"method": "safe_beam", "want_trace": True}}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with held(monkeypatch, replies, "encode_trace", "[]") as is_called:
            traced = pool.submit(post, server, body)
            assert is_called.wait(60)
            assert ask(server, "GET", "/health").status == post(server, COMPLETION).status == 200
        answer = traced.result()
    assert answer.status == 200 and b'"trace":[]}}' in answer.body


def test_a_chat_is_rendered_beside_the_event_loop(server, monkeypatch):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with held(monkeypatch, prompting, "chat_prompt", [5, 6]) as is_called:
            answer = pool.submit(post, server, {"messages": [{"role": "user", "content": "a"}]}, CHATS)
            assert is_called.wait(60)
            assert ask(server, "GET", "/health").status == post(server, COMPLETION).status == 200
        assert answer.result().status == 200


def test_a_server_is_ready_when_it_is_warm(script, caplog):
    models = {name: dataclasses.replace(tiny_model(), name=name) for name in ("a", "b")}
    engines = dict.fromkeys(models, lambda: FakeEngine(script))
    script.text = " the cat"
    with caplog.at_level(logging.INFO), running(models, engines, limits=LIMITS, warms_up=True) as server:
        cold = ask(server, "GET", "/health")
        assert cold.status == 503 and cold.json == {"status": "warming_up"}
        assert post(server, COMPLETION).status == 200, "who can't wait waits for the programs"
        script.requests.clear()
        server.run(server.server.warm_up())
        assert ask(server, "GET", "/health").json == {"status": "ok"}
        methods = [type(request.method).__name__ for request in script.requests]
    assert methods == ["SafeBeam", "SafeBeam", "Sampling", "Sampling"] * 2
    said = [record.getMessage() for record in caplog.records if "warm" in record.getMessage()]
    assert said[0] == "warming up: compiling the first programs (a, b); --skip_warm_up serves at once"
    assert said[1].startswith("warm after ") and len(said) == 2


def test_a_model_that_can_not_be_warmed_up_is_served_all_the_same(script, caplog):
    with serve(script, limits=LIMITS, warms_up=True) as server:
        script.fail_next_step = True
        with caplog.at_level(logging.WARNING):
            server.run(server.server.warm_up())
        assert ask(server, "GET", "/health").status == post(server, COMPLETION).status == 200
    assert "warming up tiny with safe_beam: the engine failed (ArithmeticError)" in caplog.text
