"""Prompts of evaluation sets in documents: planted leaks are all found, and nothing else is."""

import random

import pytest

from safelm.safety.report_card import normal_form
from safelm.selection import contamination
from safelm.selection.contamination import Decontaminator, PromptIndex, PromptSet, index_prompts

VOCABULARY = [f"{a}{b}{c}" for a in ("bra", "tol", "mé", "Ši", "kun'") for b in "aeiou" for c in ("n", "rt", "ß", "k9")]


def sentence(rng, words):
    return " ".join(rng.choice(VOCABULARY) for _ in range(words))


def prompt_set(rng, sizes):
    texts = tuple(sentence(rng, size) for size in sizes)
    return PromptSet("made_up", tuple(f"made_up/{at:03d}" for at in range(len(texts))), texts)


def disguised(rng, text):
    """The same words in another case, with other marks and white space between them."""
    words = [rng.choice([str.upper, str.lower, str.title, str])(word) for word in text.split()]
    between = [rng.choice([" ", "  ", "\n", ", ", " — ", "-", "\u00a0", ". ", "\u200b ", '" ']) for _ in words]
    return "".join(word + mark for word, mark in zip(words, between, strict=True)).rstrip()


def find(sets, texts, min_words=6):
    index = index_prompts(sets, min_words)
    found = Decontaminator(PromptIndex.from_json(index.to_json())).find(texts)
    return [[index.prompts[place][1] for place in places] for places in found]


def test_planted_leaks_are_found_100_of_100_wherever_they_stand_and_however_they_are_written():
    rng = random.Random(0)
    one = prompt_set(rng, [rng.randint(6, 40) for _ in range(100)])
    leaks = []
    for text in one.texts:
        before, behind = sentence(rng, rng.randint(0, 300)), sentence(rng, rng.randint(0, 300))
        leaks.append(f"{before}\n{disguised(rng, text)}! {behind}")
    clean = [sentence(rng, 400) for _ in range(100)]
    found = find([one], [*leaks, *clean])
    assert [one.ids[at] in prompts for at, prompts in enumerate(found[:100])] == [True] * 100
    assert found[100:] == [[]] * 100


def test_a_part_of_a_long_prompt_counts_from_13_words_on():
    rng = random.Random(1)
    one = prompt_set(rng, [30])
    words = one.texts[0].split()
    around = [sentence(rng, 20), sentence(rng, 20)]
    assert find([one], [" ".join([around[0], *words[5:18], around[1]])]) == [["made_up/000"]]
    assert find([one], [" ".join([around[0], *words[5:17], around[1]])]) == [[]]


def test_short_prompts_count_as_a_whole_and_those_that_are_too_short_are_counted():
    rng = random.Random(2)
    one = prompt_set(rng, [5, 6, 12])
    texts = [f"{sentence(rng, 9)} {text} {sentence(rng, 9)}" for text in one.texts]
    assert find([one], texts) == [[], ["made_up/001"], ["made_up/002"]]
    assert find([one], texts, min_words=5) == [["made_up/000"], ["made_up/001"], ["made_up/002"]]
    assert find([one], [text.rpartition(" ")[0] for text in one.texts]) == [[], [], []]
    assert index_prompts([one], 6).suites == {"made_up": {"prompts": 3, "too_short": 1}}


def test_a_run_never_reaches_from_one_document_into_the_next():
    one = prompt_set(random.Random(3), [20])
    words = one.texts[0].split()
    assert find([one], [" ".join(words[:10]), " ".join(words[10:]), "", one.texts[0]]) == [[], [], [], ["made_up/000"]]


def test_the_same_runs_are_found_as_by_comparing_all_of_them():
    rng = random.Random(4)
    few = VOCABULARY[:3]  # so that documents share runs by chance
    one = PromptSet(
        "s", tuple("abcdefgh"), tuple(" ".join(rng.choices(few, k=k)) for k in (6, 7, 8, 9, 11, 13, 15, 30))
    )
    texts = [" ".join(rng.choices(few, k=rng.randint(0, 1000))) for _ in range(30)]

    def words(text):
        return normal_form.normal([text]).replace(b"\n", b"").split()

    def runs(found, size):
        return {tuple(found[at : at + size]) for at in range(len(found) - size + 1)}

    def holds(text, prompt):
        size = min(13, len(words(prompt)))
        return bool(runs(words(prompt), size) & runs(words(text), size))

    expected = [
        [name for name, prompt in zip(one.ids, one.texts, strict=True) if holds(text, prompt)] for text in texts
    ]
    assert find([one], texts) == expected
    assert 10 < sum(map(len, expected)) < 8 * 30 - 10  # else there was nothing to get wrong


def test_long_documents_are_cut_without_losing_a_run(monkeypatch):
    monkeypatch.setattr(contamination, "_PIECE_CHARACTERS", 500)
    monkeypatch.setattr(contamination, "_OVERLAP_CHARACTERS", 300)
    rng = random.Random(5)
    one = prompt_set(rng, [13])
    for at in range(0, 120, 3):
        text = f"{sentence(rng, at)} {one.texts[0]} {sentence(rng, 120 - at)}"
        assert find([one], [text]) == [["made_up/000"]]


def test_an_index_of_nothing_finds_nothing():
    assert find([], ["some text", ""]) == [[], []]
    assert find([PromptSet("s", ("a",), ("...",))], ["some text ...", ""]) == [[], []]


def test_neither_the_index_nor_what_a_set_prints_holds_a_text():
    one = prompt_set(random.Random(6), [20])
    words = one.texts[0].split()
    for shown in (repr(one), str(index_prompts([one], 6).to_json())):
        assert not [word for word in words if word in shown]


@pytest.mark.parametrize("words", [13, 40])
def test_a_word_that_differs_ends_a_run(words):
    rng = random.Random(7)
    one = prompt_set(rng, [words])
    changed = one.texts[0].split()
    changed[::12] = ["another"] * len(changed[::12])
    assert find([one], [" ".join(changed)]) == [[]]
