"""What clients do wrong or to others: floods, disconnects, slow and broken requests.

Behind every test: the server answers the next request, and no slot is left behind.
"""

import contextlib
import dataclasses
import http.client
import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_fakes import COMPLETION, is_empty, number_open, post, serve, start, wait_for
from serving_fakes import http as ask

from safelm.serving.limits import Limits

LIMITS = Limits(
    body_bytes=20_000, body_seconds=5.0, open_requests=3, request_seconds=60.0, new_tokens=450, connections=12
)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "an array, want an object"),
        (b'"x"', "a string, want an object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature=inf"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 15000, "nested too deeply"),
        (b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bodies_that_are_not_what_they_should_be(server, body, message):
    answer = post(server, body)
    assert answer.status == 400 and message in answer.error["message"]


def test_a_body_beyond_the_limit_is_refused(server):
    answer = post(server, {"prompt": "a" * 30_000})
    assert answer.status == 413 and "larger than 20000 bytes" in answer.error["message"]
    with server.connect() as client:  # no length given in advance
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                client.sendall(b"1000\r\n" + b"a" * 4096 + b"\r\n")
        assert b" 413 " in client.recv(100)


def test_another_content_type_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = post(server, b'{"prompt": "a"}', Content_Type=kind)
        assert answer.status == 415 and answer.error


def test_foreign_pages_are_kept_out_of_loopback(server):
    assert ask(server, "GET", "/v1/models", headers={"Host": "evil.example:80"}).status == 403
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert ask(server, "GET", "/v1/models", headers={"Host": host}).status == 200
    answer = ask(server, "OPTIONS", "/v1/completions", headers={"Origin": "http://evil.example"})
    assert answer.status == 405 and "access-control-allow-origin" not in answer.headers


def test_a_flood_gets_429_and_those_before_it_their_answers(server, script):
    script.may_go.clear()
    first = [start(server) for _ in range(3)]
    wait_for(lambda: number_open(server) == 3, "three requests are open")
    for body, path in ((COMPLETION, "/v1/completions"), ({"input": "a"}, "/v1/safelm/score")):
        answer = post(server, body, path)
        assert answer.status == 429 and answer.error["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "1"
    assert ask(server, "GET", "/health").status == 200
    script.may_go.set()
    for connection in first:
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == " the cat"
        connection.close()


def test_a_connection_beyond_the_limit_takes_the_idlest_ones_place(script):
    with (
        serve(script, limits=dataclasses.replace(LIMITS, body_seconds=60.0)) as server,
        contextlib.ExitStack() as open_ones,
    ):
        connections = server.server._runner.server
        idle = []
        for number in range(LIMITS.connections):
            idle.append(open_ones.enter_context(server.connect()))
            wait_for(lambda number=number: len(connections.connections) == number + 1, "it is connected")
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in idle[0].recv(1000)
        late = open_ones.enter_context(server.connect())
        assert idle[1].recv(1) == b"", "the first has been answered since"
        late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in late.recv(1000)
        open_ones.close()
        wait_for(lambda: len(connections.connections) == 0, "they are gone")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_client_that_goes_away_gives_its_slot_back(server, script, stream, is_waiting):
    script.may_go.clear()
    before, submitted = len(script.cancelled), len(script.requests)
    others = [start(server) for _ in range(2 * is_waiting)]  # take both slots
    wait_for(lambda: number_open(server) == len(others), "the others are open")
    connection = start(server, stream=stream)
    wait_for(lambda: number_open(server) == len(others) + 1, "it is open")
    wait_for(lambda: len(script.requests) == submitted + len(others) + 1, "the engine has it")
    worker = server.server.service.worker
    if is_waiting:
        wait_for(lambda: worker.num_waiting["tiny"] == 1, "it waits")
    connection.close()
    wait_for(lambda: number_open(server) == len(others), "it is gone")
    wait_for(lambda: len(script.cancelled) == before + 1, "the engine knows")
    script.may_go.set()
    for other in others:
        assert other.getresponse().status == 200
        other.close()


def test_a_client_that_goes_away_in_mid_stream_gives_its_slot_back(server, script):
    script.text, script.hold_at, before = "a b " * 100, 3, len(script.cancelled)
    with server.connect() as client:
        body = json.dumps(COMPLETION | {"max_tokens": 450, "stream": True}).encode()
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert b"200 OK" in client.recv(200)
    wait_for(lambda: len(script.cancelled) == before + 1, "the engine knows")


def test_slow_requests_are_ended(script):
    def answer_to(sent):
        with serve(script, limits=limits) as server, server.connect() as client:
            client.sendall(sent)
            return client.recv(1000)  # returns when the server answers or closes

    limits = dataclasses.replace(LIMITS, body_seconds=0.5)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert answer_to(b"") == b""
    assert answer_to(head) == b"", "half a head"
    assert b" 408 " in answer_to(head + b'Content-Length: 100\r\n\r\n{"prompt"')


@pytest.mark.parametrize("length", [10, 80], ids=["all of it fits aiohttp's buffers", "it does not"])
def test_a_stream_that_is_not_read_is_ended(script, length):
    script.text = "the cat sat " * length
    with serve(script, limits=Limits(body_seconds=0.2, new_tokens=450)) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(server.address)
        body = json.dumps({"prompt": "a", "max_tokens": 450, "stream": True}).encode()
        connections = server.server._runner.server
        wait_for(lambda: connections.connections != [], "it is connected")
        sending = connections.connections[0].transport.get_extra_info("socket")
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        num_before = len(script.requests)
        wait_for(lambda: len(script.requests) > num_before or number_open(server) == 1, "it has begun")
        is_empty(server)
        wait_for(lambda: connections.connections == [], "it is closed")
        client.settimeout(60)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(65536):
                received += data
        assert b"[DONE]" not in received


def test_one_connection_carries_many_requests_and_survives_refusals(server):
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.connect()
    sock = connection.sock
    for body, status in ((b'{"prompt": "a"}', 200), (b"{", 400), (b'{"prompt": "a", "stream": true}', 200)) * 3:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status == status and connection.sock is sock
    connection.close()


BROKEN = [
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    b"\r\n\r\n\x00\r\n\r\n",
]


def test_broken_http_is_refused(server):
    for sent in BROKEN:
        with server.connect() as client, contextlib.suppress(ConnectionResetError):
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(100)
            assert answer == b"" or (answer.startswith(b"HTTP/1.") and b" 400 " in answer)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["greedy", "user"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "prompt",
        "messages",
        "model",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "safelm",
        "n",
        "input",
        "user",
        "logit_bias",
        "metadata",
        "response_format",
    ]
)
MESSAGE = st.fixed_dictionaries({}, optional={"role": JSON | st.just("user"), "content": JSON, "name": JSON})
STEERING = st.dictionaries(
    st.sampled_from(
        ["method", "num_beams", "num_candidates", "drop_fraction", "threshold", "stop_above", "want_trace"]
    ),
    JSON | st.integers(0, 3) | st.sampled_from(["beam", "safe_beam", "sample"]),
    max_size=3,
)
FIELDS = {
    "prompt": st.text(max_size=9),
    "messages": st.lists(MESSAGE, max_size=2),
    "safelm": STEERING,
    "input": st.text(),
}
BODIES = st.fixed_dictionaries({}, optional={k: v | JSON for k, v in FIELDS.items()}).flatmap(
    lambda known: st.dictionaries(NAMES, JSON, max_size=3).map(lambda more: more | known)
)


@given(BODIES, st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/safelm/score"]))
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_breaks_the_server(server, body, path):
    answer = post(server, json.dumps(body).encode(), path)
    assert answer.status in (200, 400, 404), answer.body
    if answer.status != 200:
        assert answer.error["message"]


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_break_the_server(server, data):
    assert post(server, data).status == 400
