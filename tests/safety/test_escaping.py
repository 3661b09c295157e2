"""One escaping for judges and writers: no text leaves its frame, in characters or in ids behind a normalizer."""

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from safelm.safety import escaping
from safelm.safety.synthesis.requests import user_message
from safelm.safety.synthesis.writer import Request
from safelm.text.tokenizer import Tokenizer

FORGED = ["</document>", "<|im_end|>", "<|user|>", "[/INST]", "\uff3bINST\uff3d", "[\uff29\uff2e\uff33\uff34]"]
FORGED += ["\uff1c/document\uff1e", "\uff1c|im_end|\uff1e", "\ufe64/document\ufe65", "\u226e/document\u226f"]
HIDDEN = "\u200b\u200d\u2060\ufeff\u202e\u2066\U000e0041\U000e007f\U000e0101\ufe01\u3164\x1b\x00\x85\u2028"
PIECES = [*FORGED, *HIDDEN, "<", ">", "&", "[", "]", "&lt;", "&#x200B;", "plain \u00e9", "\n"]
TEXTS = st.lists(st.sampled_from(PIECES)).map("".join)
NORMALIZERS = {
    "none": None,
    "nfkc": normalizers.NFKC(),
    "nfd": normalizers.NFD(),
    "own": normalizers.Replace("\u2039", "<"),
}


@functools.cache
def vocabulary(name: str) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(Tokenizer.train(["some text </document> <|user|>"] * 3, 300).to_json())
    backend.add_tokens([AddedToken("<|user|>", normalized=True, special=False)])
    if NORMALIZERS[name] is not None:
        backend.normalizer = NORMALIZERS[name]
    return Tokenizer(backend)


@given(TEXTS)
def test_nothing_is_lost_and_nothing_hides(text):
    escaped = escaping.escape(text)
    assert escaping.unescape(escaped) == text
    assert not set(escaped) & set("<>" + HIDDEN) and not any(map(escaping.is_hidden, escaped))


@given(TEXTS)
def test_a_judge_and_a_writer_are_shown_the_same(text):
    request = Request("k", "s", "(", text, ")", "", 1, 0, {})
    assert user_message(request)[1:-1] == escaping.escape(text)


@pytest.mark.parametrize("name", NORMALIZERS)
@settings(max_examples=50)
@given(text=TEXTS)
def test_no_delimiter_or_role_comes_out_of_a_vocabularys_normalizer(name, text):
    tokenizer = vocabulary(name)
    ids = tokenizer.encode(escaping.escape(tokenizer.normalized(f"\u2039/document>{text}")))
    assert not set(ids) & set(tokenizer.conventions.control_tokens.values())
    seen = tokenizer.decode(ids)
    assert not set(seen) & set("<>") and not any(token in seen for token in ("[INST]", "[/INST]"))


def test_what_a_writer_repeats_is_text_again_without_what_nobody_sees():
    assert escaping.unescape_seen("a &lt;b&gt; &#91;X] &#xFF1C; &#x200B;&#x41; &#xFFFFFF; &amp;") == (
        "a <b> [X] \uff1c &#x41; &#xFFFFFF; &"
    )


def test_letters_and_pictures_stay():
    shown = "\u0430\u4e2d\u2764\ufe0f\U0001f600"
    assert escaping.escape(shown) == shown
