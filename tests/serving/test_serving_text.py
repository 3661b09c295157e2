"""Streams of tokens as text: nothing but whole characters, no beginning of a stop string, every token accounted for."""

import functools
import json

import pytest
import tiny_runs
from hypothesis import given, settings
from hypothesis import strategies as st

from safelm.inference.requests import TraceCandidate
from safelm.serving.numbers import rounded, summarize
from safelm.serving.text_stream import TextStream
from safelm.serving.trace import encode_trace

TOKENIZER = tiny_runs.tokenizer()
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40)
TEXTS = st.text(alphabet=st.sampled_from("aab \n\u00e9\u4e2d\U0001f642"), max_size=30)
STOPS = st.lists(st.text(alphabet=st.sampled_from("ab \n\u00e9\U0001f642"), min_size=1, max_size=4), max_size=3)


def stream(ids, stop=()):
    """The text and pieces released after each token, then those at the end."""
    text, released = TextStream(TOKENIZER, stop), []
    for index, token in enumerate(ids):
        text.add(token, index / 100)
        released.append(text.release())
    text.finish()
    released.append(text.release())
    return text, released


@given(IDS)
@settings(deadline=None, max_examples=300)
def test_any_tokens_give_the_text_that_decoding_them_at_once_gives(ids):
    _, released = stream(ids)
    pieces = [piece for _, pieces in released for piece in pieces]
    want = TOKENIZER.decode(ids, keep_special=False)
    assert "".join(text for text, _ in released) == want
    assert "".join(piece.text for piece in pieces) == want
    assert [piece.id for piece in pieces] == ids
    assert [piece.tag_prob for piece in pieces] == [index / 100 for index in range(len(ids))]
    assert all(piece.special == TOKENIZER.special_token(piece.id) for piece in pieces)


@given(TEXTS)
@settings(deadline=None, max_examples=100)
def test_no_release_ends_within_a_character(text):
    for released, _ in stream(TOKENIZER.encode(text))[1]:
        assert "\ufffd" not in released


@given(TEXTS, STOPS)
@settings(deadline=None, max_examples=500)
def test_the_text_ends_in_front_of_the_stop_string_that_is_complete_first(text, stop):
    ids = TOKENIZER.encode(text)
    ended, released = stream(ids, stop)
    got = "".join(part for part, _ in released)
    pieces = [piece for _, pieces in released for piece in pieces]
    assert "".join(piece.text for piece in pieces) == got and text.startswith(got)
    assert [piece.id for piece in pieces] == ids[: len(pieces)]
    assert not any(string in got for string in stop)
    assert ended.is_stopped == any(string in text for string in stop)
    if ended.is_stopped:
        assert any(text.startswith(string, len(got)) for string in stop)
    else:
        assert got == text
    so_far = ""
    for count, (part, _) in enumerate(released[:-1], start=1):  # all is out early but what may begin a stop string
        so_far += part
        known = TOKENIZER.decode(ids[:count]).rstrip("\ufffd")
        beginnings = {string[:length] for string in stop for length in range(1, len(string))}
        doubtful = max((len(each) for each in beginnings if known.endswith(each)), default=0)
        assert ended.is_stopped or so_far == known[: len(known) - doubtful]


def test_a_piece_goes_out_with_the_last_of_its_text():
    first, second = TOKENIZER.encode("\u00e9")  # two bytes, two tokens
    ended, released = stream([first, second, *TOKENIZER.encode("ab")], ["bc"])
    assert [(text, [piece.text for piece in pieces]) for text, pieces in released] == [
        ("", []),
        ("\u00e9", ["", "\u00e9"]),
        ("a", ["a"]),
        ("", []),
        ("b", ["b"]),
    ]
    assert not ended.is_stopped


def test_a_special_token_stops_where_its_string_is_a_stop():
    first, _ = TOKENIZER.encode("\u00e9")
    for end in (TOKENIZER.chat_end_id, TOKENIZER.eos_id):
        ids = [*TOKENIZER.encode("ab"), first, end, *TOKENIZER.encode("cd")]
        ended, released = stream(ids, ["<|im_end|>", "<|endoftext|>"])
        assert ended.is_stopped and "".join(text for text, _ in released) == "ab\ufffd"


def test_tokens_stand_for_their_bytes():
    ids = range(TOKENIZER.vocab_size)
    assert all(TOKENIZER.token_bytes(token).decode(errors="replace") == TOKENIZER.decode([token]) for token in ids)
    assert TOKENIZER.special_token(TOKENIZER.eos_id) == "<|endoftext|>"
    assert TOKENIZER.special_token(TOKENIZER.encode("a")[0]) is None


def test_summary_of_a_curve():
    assert summarize([]) is None
    assert summarize([0.25]) == {"max": 0.25, "argmax": 0, "mean": 0.25, "area": 0.25}
    assert summarize([0.0, 1.0, 0.0]) == {"max": 1.0, "argmax": 1, "mean": rounded(1 / 3), "area": 0.5}


@pytest.mark.parametrize(("value", "want"), [(0.1234567890, 0.123457), (1e-12, 1e-12), (float("-inf"), None)])
def test_rounded(value, want):
    assert rounded(value) == want


def test_a_trace_marks_the_candidates_that_became_the_text():
    candidate = functools.partial(TraceCandidate, tag_prob=0.5)
    step0 = (
        candidate(0, 10, -1.0, outcome="kept", beam=0),
        candidate(0, 11, -2.0, outcome="kept", beam=1),
        candidate(0, 12, -0.5, outcome="dropped", beam=None),
    )
    step1 = (  # the second beam overtakes the first
        candidate(0, 13, -9.0, outcome="kept", beam=1),
        candidate(1, 14, -3.0, outcome="kept", beam=0),
    )
    ended = (candidate(0, None, -3.0, outcome="kept", beam=0),)
    steps = json.loads(encode_trace((step0, step1, ended), TOKENIZER))
    assert [[each["id"] for each in step if each.get("chosen")] for step in steps] == [[11], [14], [None]]
    assert [each["id"] for each in steps[0]] == [12, 10, 11], "best log-prob first"
    assert encode_trace(None, TOKENIZER) == "[]"
