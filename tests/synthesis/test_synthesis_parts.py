"""Long documents in parts."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelm.safety.synthesis.parts import split

TEXTS = st.one_of(
    st.text(max_size=400),
    st.lists(
        st.sampled_from(
            ["A cat sat. ", "Why? ", "word ", "\n\n", "\n", " \n \n", "x" * 17, "…", "。", "\r\n", "\u2028"]
        )
    ).map("".join),
)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 60))
def test_nothing_is_lost_or_doubled_and_no_part_is_too_long(text, max_chars):
    parts = split(text, max_chars)
    assert "".join(parts) == text
    assert all(len(part) <= max_chars for part in parts)
    assert parts and (parts == [""] or all(parts))


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(2, 60))
def test_there_are_no_crumbs(text, max_chars):
    parts = split(text, max_chars)
    assert all(len(part) >= max_chars // 2 for part in parts[:-1])
    if len(text) <= max_chars:
        assert parts == [text]


def test_cuts_lie_between_paragraphs_where_there_are_any():
    paragraphs = [f"Paragraph {number}. " + "It goes on." * (number % 5) for number in range(40)]
    text = "\n\n".join(paragraphs)
    parts = split(text, 200)
    assert len(parts) > 5
    assert [each for part in parts for each in part.removesuffix("\n\n").split("\n\n")] == paragraphs
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_one_long_paragraph_is_cut_between_sentences_and_one_long_sentence_between_words():
    sentences = "".join(f'This is sentence {number}, "as they say." ' for number in range(60))
    parts = split(sentences, 300)
    assert len(parts) > 5 and all(part.endswith('say." ') for part in parts)
    words = " ".join(f"word{number}" for number in range(300))
    assert [word for part in split(words, 100) for word in part.split()] == words.split()
    assert [len(part) for part in split("x" * 100, 30)] == [30, 30, 30, 10]


def test_parts_are_about_equally_long():
    text = "".join(f"Sentence number {number:03d}. " for number in range(100))  # 2,200 characters
    lengths = [len(part) for part in split(text, 1200)]
    assert len(lengths) == 2 and max(lengths) - min(lengths) <= 44


def test_a_cut_between_sentences_needs_a_pause():
    text = "Version 3.14 of the tool is out, see example.com for more and then some other words here and there too"
    assert all(not re.search(r"\d\.$", part) for part in split(text, 40))


def test_an_impossible_length_is_named():
    with pytest.raises(ValueError, match="max_chars=0: must be at least 1"):
        split("x", 0)
