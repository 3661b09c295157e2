"""What gates are built on: near-duplicates by their signatures, words, sentences and shared runs."""

import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from safelm.safety.synthesis.gates import words as gate_words
from safelm.safety.synthesis.gates.duplicates import Duplicates, signature

# ---- near-duplicates


def numbered(*, seed: int, count: int = 300) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(5000)}" for _ in range(count)]


def test_near_duplicates_are_found_and_others_are_not():
    first, other = numbered(seed=0), numbered(seed=1)
    nearly = [*first[:290], *other[:10]]
    half = [*first[:150], *other[:150]]
    seen = Duplicates(0.7)
    texts = {"first": first, "nearly": nearly, "half": half, "other": other, "again": first}
    found = {key: seen.add(key, signature(" ".join(text).upper())) for key, text in texts.items()}
    assert found == {"first": None, "nearly": "first", "half": None, "other": None, "again": "first"}
    assert len(seen) == 3
    with pytest.raises(ValueError, match="'first' was added before"):
        seen.add("first", signature("x"))
    with pytest.raises(ValueError, match="duplicate_threshold=0"):
        Duplicates(0.0)


def test_signatures_estimate_the_jaccard_similarity():
    first = numbered(seed=2, count=600)
    for kept in (550, 400, 250):
        second = [*first[:kept], *numbered(seed=kept, count=600 - kept)]
        grams = [{tuple(text[i : i + 5]) for i in range(596)} for text in (first, second)]
        exact = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
        estimate = np.mean(signature(" ".join(first)) == signature(" ".join(second)))
        assert abs(estimate - exact) < 4 * (exact * (1 - exact) / 128) ** 0.5 + 1e-9
    assert signature("").shape == signature("one").shape == (128,)


# ---- words, against the obvious


@hypothesis.given(
    strategies.lists(strategies.sampled_from("abc"), max_size=12),
    strategies.lists(strategies.sampled_from("abc"), max_size=12),
    strategies.integers(1, 4),
)
def test_shared_runs_are_the_longest_of_each_place(source, text, at_least):
    inside = {tuple(source[i:j]) for i in range(len(source)) for j in range(i + 1, len(source) + 1)}
    runs = [(i, j) for i in range(len(text)) for j in range(i + at_least, len(text) + 1) if tuple(text[i:j]) in inside]
    longest = {r for r in runs if not any(o != r and o[0] <= r[0] and r[1] <= o[1] for o in runs)}
    found = gate_words.shared_runs(source, text, at_least)
    assert {(run.start, run.stop) for run in found} == longest
    assert gate_words.covered(found) == len({place for i, j in runs for place in range(i, j)})


@hypothesis.given(strategies.text(max_size=300))
def test_sentences_hold_every_word_once(text):
    cut = gate_words.sentences(text)
    assert [word for one in cut for word in gate_words.words(one).words] == list(gate_words.words(text).words)


def test_sentences_of_few_words_go_with_the_one_behind_them():
    assert gate_words.sentences("Oh. No! It rains again. Ah") == ["Oh. No! It rains again. Ah"]
    assert gate_words.sentences("It rains again. - . Yes. So be it now.") == [
        "It rains again.",
        "- . Yes. So be it now.",
    ]
    assert gate_words.sentences("* . *") == []


def test_runs_that_share_a_word_are_one():
    runs = [gate_words.WordRun(5, 9), gate_words.WordRun(0, 3), gate_words.WordRun(2, 4), gate_words.WordRun(9, 11)]
    assert gate_words.merged(runs) == [gate_words.WordRun(0, 4), gate_words.WordRun(5, 9), gate_words.WordRun(9, 11)]
    assert gate_words.covered(runs) == 10
