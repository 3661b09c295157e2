"""What writers, scorers and judges of answers share behind an address: bounds, failures that pass, keys and hosts."""

import gzip
import json
import time
import zlib

import pytest
from openai_stub import Reply, serve, without_keys_or_pauses

from safelm.evaluate.judges import load_judge
from safelm.evaluate.judges.verdicts import UNSCORED, Exchange
from safelm.safety import endpoint_http
from safelm.safety.endpoint_client import EndpointClient, EndpointError
from safelm.safety.scorer import load_scorer
from safelm.safety.synthesis.writer import Request
from safelm.safety.synthesis.writers import load_writer


@pytest.fixture(autouse=True)
def no_keys_or_pauses(monkeypatch):
    without_keys_or_pauses(monkeypatch)


def written(spec: str, texts: list[str]) -> list[str | None]:
    replies = {}
    requests = [Request(text, "s", "before\n", text, "\nafter", max_new_tokens=9, seed=0) for text in texts]
    load_writer(spec).write(requests, lambda index, reply: replies.update({index: reply.text}))
    return [replies[index] for index in range(len(texts))]


def scored(spec: str, texts: list[str]) -> list[str | None]:
    return [None if verdict.score is None else str(verdict.score) for verdict in load_scorer(spec).score(texts)]


def judged(spec: str, texts: list[str]) -> list[str | None]:
    verdicts = load_judge(spec).judge([Exchange("request", text, asks_harm=True) for text in texts])
    return [None if verdict == UNSCORED else verdict for verdict in verdicts]


USERS = {  # how each asks, an answer that is fine, an option
    "writer": (written, "a text", "give_up_after=3"),
    "scorer": (scored, '{"score": 3}', "max_unusable=1"),
    "judge": (judged, "Yes", "max_unscored=1"),
}
FAST = "retries=1&timeout_s=20&concurrency=1"


@pytest.fixture(params=USERS)
def ask(request):
    """Asks as one of the users does, and what it says of an answer that is fine."""
    user, good, lenient = USERS[request.param]

    def ask(stub, texts, options=FAST):
        return user(f"endpoint:{stub.url}#m?{options}", texts)

    ask.good, ask.lenient = good, lenient
    return ask


def completion(**choice) -> str:
    message = {"role": "assistant", "content": "a te"}
    return json.dumps({"choices": [{"index": 0, "message": message, **choice}], "model": "m"})


PASSING = {
    "an error object": json.dumps({"error": {"code": 502, "message": "Provider returned error, a private text"}}),
    "with an id": json.dumps({"id": "x", "error": {"code": "overloaded", "message": "m"}, "user_id": "u"}),
    "a string": json.dumps({"error": "model is loading"}),
    "of the older form": json.dumps({"object": "error", "message": "m", "code": 50001}),
    "beside no choices": json.dumps({"choices": None, "error": {"message": "m"}}),
    "of a choice": completion(finish_reason=None, error={"code": 429, "message": "m"}),
    "as finish_reason": completion(finish_reason="error"),
}


LATER = {
    **PASSING,
    "a page": "<html>Busy</html>",
    "other json": "{}",
    "nothing": "",
    "null": "null",
    "deep": "[" * 9999,
}


def test_an_error_in_a_body_with_status_200_is_tried_again():
    def answer(number, _):
        return Reply("a text") if number % 2 else Reply(body=bodies[number // 2])

    bodies = list(PASSING.values())
    with serve(answer) as stub:
        assert written(f"endpoint:{stub.url}#m?{FAST}", ["x"] * len(bodies)) == ["a text"] * len(bodies)
    assert len(stub.requests) == 2 * len(bodies)


def test_rows_whose_replies_are_none_cost_themselves_only(ask):
    def answer(_, request):
        said = request["messages"][-1]["content"]
        return next((Reply(body=body) for name, body in LATER.items() if f"poison {name}." in said), Reply(ask.good))

    with serve(answer) as stub:
        answers = ask(stub, ["x", *(f"poison {name}." for name in LATER), "x"], FAST + f"&{ask.lenient}")
    assert [each is None for each in answers] == [False, *[True] * len(LATER), False]
    assert sum("poison a page." in str(body["messages"]) for body in stub.requests) == 4  # twice, with a retry each


def test_an_endpoint_of_errors_ends_the_run_in_one_line_that_quotes_nothing(ask):
    with serve(lambda *_: Reply(body=PASSING["an error object"])) as stub:
        with pytest.raises(EndpointError, match=r"answers 200 with an error in the body \(code 502\)") as caught:
            ask(stub, ["x"] * 30)
    assert "private" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(stub.requests) < 30


def test_a_document_with_a_chunk_that_nobody_read_has_no_score():
    def answer(_, request):
        return (
            Reply(body='{"error": {}, "object": "error"}')
            if "bbb" in str(request["messages"])
            else Reply('{"score": 1}')
        )

    with serve(answer) as stub:
        assert scored(f"endpoint:{stub.url}#m?{FAST}&chunk_chars=3", ["aaabbb", "aaaccc"]) == [None, "1"]


def bomb(num_bytes: int) -> bytes:
    """A gzip of so many spaces, made without holding them."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(b" " * (1 << 20)) for _ in range(num_bytes >> 20)) + packer.flush()


MANY = 3 * endpoint_http.MOST_BYTES
UNUSABLE = {
    "long": (b" " * MANY, {}, "a reply of more than 8 MB"),
    "a bomb": (bomb(512 << 20), {"Content-Encoding": "gzip"}, "a reply of more than 8 MB"),
    "behind the gzip": (gzip.compress(b"{}") + b"a" * MANY, {"Content-Encoding": "gzip"}, "more than 8 MB"),
    "no gzip": (b"abc", {"Content-Encoding": "gzip"}, "not the gzip it says it is"),
    "half a gzip": (gzip.compress(b"abc" * 99)[:20], {"Content-Encoding": "gzip"}, "gzip ends too early"),
    "another encoding": (b"abc", {"Content-Encoding": "zstd"}, "Content-Encoding 'zstd', which was not asked for"),
    "two encodings": (b"abc", {"Content-Encoding": "gzip, gzip"}, "Content-Encoding 'gzip, gzip'"),
}


@pytest.mark.parametrize(("data", "headers", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_replies_are_bounded_and_decoded_with_care(data, headers, message):
    with serve(lambda *_: Reply(body=data, headers=headers)) as stub:
        with pytest.raises(EndpointError, match=message):
            written(f"endpoint:{stub.url}#m?retries=0", ["x"])


def test_a_gzipped_reply_is_read():
    packed = gzip.compress(completion(finish_reason="stop").encode())
    with serve(lambda *_: Reply(body=packed, headers={"Content-Encoding": "gzip"})) as stub:
        assert written(f"endpoint:{stub.url}#m", ["x"]) == ["a te"]


def test_a_reply_that_drips_ends_when_its_time_is_over(ask):
    with serve(lambda *_: Reply(ask.good, drip_s=0.1)) as stub:  # half a minute in all
        began = time.monotonic()
        with pytest.raises(EndpointError, match=r"no answer within 1 times timeout_s=0\.3"):
            ask(stub, ["x"], "retries=0&timeout_s=0.3")
    assert time.monotonic() - began < 15


WEIRD = [
    {"choices": [None]},
    {"choices": ["x"]},
    {"choices": [{"message": 3}]},
    {"choices": [{"message": {"content": 5}}]},
    {"choices": [{"message": {"content": "x \ud800"}}], "usage": {"prompt_tokens": "7", "completion_tokens": -1}},
    {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 10**400, "completion_tokens": 1.5}},
    {"choices": [{"message": {"content": "x"}}], "usage": [], "model": {"a": 1}},
    {"choices": {}},
    {"choices": 1e999},
    {"choices": [{"message": {"content": "x"}, "finish_reason": ["stop"]}], "usage": True, "model": 3},
]


@pytest.mark.parametrize("body", WEIRD, ids=lambda body: str(body)[:60])
def test_fields_of_a_foreign_server_are_no_defect_of_ours(body):
    with serve(lambda number, _: Reply(body=json.dumps(body))) as stub:
        try:
            (text,) = written(f"endpoint:{stub.url}#m?retries=0", ["x"])
        except EndpointError as error:
            assert "\n" not in str(error)
        else:
            (text or "").encode()


def test_openais_key_and_names_go_to_openais_host_only(ask, monkeypatch):
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", f"sk-secret-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Custom: secret\nAuthorization: Bearer secret")
    monkeypatch.setenv("MY_KEY", "named")
    with serve(lambda *_: Reply(ask.good)) as stub:
        ask(stub, ["x"])
        ask(stub, ["x"], "key_env=MY_KEY")
        monkeypatch.setenv("SAFELM_ENDPOINT_KEY", "ours")
        ask(stub, ["x"])
    assert stub.keys == ["Bearer none", "Bearer named", "Bearer ours"]
    assert "secret" not in str(stub.headers)


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://api.openai.com/v1", "openais"),
        ("https://eu.api.openai.com/v1", "openais"),
        ("http://api.openai.com/v1", ""),
        ("https://api.openai.com.evil.example/v1", ""),
        ("https://evil.example/api.openai.com", ""),
        ("https://evilapi.openai.com/v1", ""),
        ("https://evil.example\\.api.openai.com/v1", ""),
        ("http://localhost:8000/v1", ""),
    ],
)
def test_which_hosts_are_openais(monkeypatch, url, key):
    monkeypatch.setenv("OPENAI_API_KEY", "openais")
    assert EndpointClient(url, "m", timeout_s=1.0, retries=0)._key() == key


def test_a_withheld_key_is_told(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serve(lambda *_: Reply.error(401)) as stub, pytest.raises(EndpointError) as caught:
        written(f"endpoint:{stub.url}#m", ["x"])
    assert "none is set (OPENAI_API_KEY goes to api.openai.com only); the key goes into the environment" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("NO_SUCH", None, "no environment variable of that name"), ("BAD", "a\nb", "the key in BAD holds characters")],
)
def test_a_key_that_can_not_be_is_refused_at_once(monkeypatch, name, value, message):
    if value is not None:
        monkeypatch.setenv(name, value)
    for load in (load_writer, load_scorer, load_judge):
        with pytest.raises(ValueError, match=message) as caught:
            load(f"endpoint:http://localhost:1/v1#m?key_env={name}")
        assert "NO_SUCH" not in str(caught.value), "a key given in its place stays unseen"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(ask, monkeypatch, status):
    monkeypatch.setenv("SAFELM_ENDPOINT_KEY", "sk-secret")
    with serve(lambda *_: Reply(ask.good)) as other:
        headers = {"Location": f"{other.url}/chat/completions"}
        with serve(lambda *_: Reply(body="", status=status, headers=headers)) as stub:
            with pytest.raises(EndpointError, match=f"status {status}, a redirect, which is not followed"):
                ask(stub, ["x"])
    assert not other.requests and len(stub.requests) == 1
