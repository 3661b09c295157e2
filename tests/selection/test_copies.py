"""Exact and near-duplicates, in memory and through files."""

import random

import numpy as np
import pytest

from safelm.selection import copies
from safelm.selection.copies import Copies, Marks


def marked(parts, total, folder, **more):
    marks = Marks(total)
    copies.mark(iter(parts), total, str(folder), marks, **more)
    return marks.get(0, total)


def exact_parts(values, order):
    hashes = np.array([[0, value] for value in values], np.uint64)
    number, order = np.arange(len(values)), np.array(order, np.uint64)
    return [Copies(number[at::3], order[at::3], hashes[at::3]) for at in range(3)]


@pytest.mark.parametrize("part_bytes", [1 << 20, 64])
def test_of_equal_hashes_the_first_in_order_stays(monkeypatch, tmp_path, part_bytes):
    monkeypatch.setattr(copies, "PART_BYTES", part_bytes)
    rng = random.Random(0)
    values, order = [rng.randrange(40) for _ in range(200)], rng.sample(range(1000), 200)
    expected = [any(values[b] == values[a] and order[b] < order[a] for b in range(200)) for a in range(200)]
    assert marked(exact_parts(values, order), 200, tmp_path).tolist() == expected
    assert not list(tmp_path.iterdir())
    assert 100 < sum(expected) < 190


def test_with_a_limit_only_copies_of_what_comes_before_it_are_marked(tmp_path):
    rng = random.Random(1)
    values, order = [rng.randrange(40) for _ in range(200)], rng.sample(range(1000), 200)
    first = {value: min(order[at] for at in range(200) if values[at] == value) for value in values}
    found = marked(exact_parts(values, order), 200, tmp_path, limit=100)
    assert found.tolist() == [first[value] < min(place, 100) for value, place in zip(values, order, strict=True)]
    assert 5 < found.sum() < 190


def test_the_copy_with_the_highest_score_comes_first_then_the_lowest_key():
    score = np.array([0, 5, 5, 3, -1])
    key = np.array([1, 1 << 62, (1 << 62) + 4, 0, 0], np.uint64)
    assert np.argsort(copies.order(score, key)).tolist() == [1, 2, 3, 0, 4]


def test_marks_are_bits_by_number():
    rng = np.random.default_rng(0)
    marks, expected = Marks(1003), np.zeros(1003, bool)
    for _ in range(5):
        numbers = rng.integers(0, 1003, 40)
        marks.add(numbers)
        expected[numbers] = True
    for start, stop in ((0, 1003), (3, 5), (8, 16), (1, 1000), (17, 17)):
        assert marks.get(start, stop).tolist() == expected[start:stop].tolist()


def near_marks(texts, similarity, folder):
    signatures = np.array([copies.signature(text) for text in texts])
    bands, sketch = copies.bands(signatures, similarity), signatures.astype(np.uint8)
    number = np.arange(len(texts))
    marks = Marks(len(texts))
    for band in range(bands.shape[1]):
        part = Copies(number, number.astype(np.uint64), bands[:, band : band + 1], sketch)
        copies.mark([part], len(texts), str(folder), marks, similarity)
    return marks.get(0, len(texts)).tolist()


def test_near_duplicates_are_those_that_share_most_of_their_5_grams(tmp_path):
    rng = random.Random(0)
    words = [f"w{at}" for at in range(3000)]
    texts, expected = [], []
    for _ in range(40):
        text = [rng.choice(words) for _ in range(300)]
        far = [*text]
        for at in range(0, 300, 8):
            far[at] = "x"  # no 5-gram less than 5 in 8 is another
        texts += [" ".join(text), " ".join([*text[:290], "y"]), " ".join(far)]
        expected += [False, True, False]
    assert near_marks(texts, 0.7, tmp_path) == expected


def test_a_folder_of_one_text_keeps_one(tmp_path):
    assert near_marks(["the same words again and again"] * 20, 0.7, tmp_path) == [False] + [True] * 19
