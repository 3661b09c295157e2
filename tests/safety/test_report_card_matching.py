"""The report card's matching: equal to a slow count written from the stated rules, on hostile text too."""

import json
import random
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelm.safety.report_card import matching, normal_form, queries
from safelm.synthetic_web import corpus as synthetic_corpus

ABSTRACT = {
    "categories": {
        "one": ["grey kettle", "kettle", "grey", "Kettle-of Straße", "of"],
        "two": ["Grey Kettle", "café noir", "kettle of", "ko ko", "ko ko ko", "данные два"],
    }
}
APOSTROPHES = "'`´‘’‛ʼʹ′＇"
HYPHENS = "-_‐‑‒–−﹣－＿"


def slow_fold(text: str) -> str:
    """Rules 1 and 2 over a whole text; words stay as they are, apostrophes and marks are gone."""
    text = re.sub(f"[{APOSTROPHES}]", "", text)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c)[0] != "M")
    text = unicodedata.normalize("NFKD", text.casefold())
    gone = {c for c in text if unicodedata.category(c)[0] == "M" or unicodedata.category(c) == "Cf"}
    return "".join(c for c in text if c not in gone and c not in APOSTROPHES)


def slow_words(text: str) -> list[tuple[str, str]]:
    """(what stands before the word, word) for each word."""
    found, between, word = [], "", ""
    for c in slow_fold(text):
        if unicodedata.category(c)[0] in "LN":
            word += c
            continue
        if word:
            found.append((between, word))
            between, word = "", ""
        between += c
    return [*found, (between, word)] if word else found


def joins(between: str) -> bool:
    return bool(between) and (all(c.isspace() for c in between) or (len(between) == 1 and between in HYPHENS))


def slow_count(query: str, words: list[tuple[str, str]]) -> int:
    wanted = [word for _, word in slow_words(query)]
    return sum(
        [word for _, word in words[at : at + len(wanted)]] == wanted
        and all(joins(between) for between, _ in words[at + 1 : at + len(wanted)])
        for at in range(len(words))
    )


def check(texts: list[str], query_set: queries.QuerySet) -> int:
    found = matching.Matcher(query_set).find(texts)
    counts = np.zeros((len(texts), len(query_set.queries)), int)
    np.add.at(counts, (found.document_M, found.query_M), 1)
    for text, row, words in zip(texts, counts, found.words_D, strict=True):
        expected = slow_words(text)
        assert words == len(expected), ascii(text)
        assert row.tolist() == [slow_count(query, expected) for query in query_set.queries], ascii(text)
    return int(counts.sum())


QUERIES = queries.parse(ABSTRACT, "abstract")
PIECES = [
    *("grey", "Grey", "GREY", "gr\u200bey", "g\u0301rey", "ｇｒｅｙ", "kettle", "KETTLE", "kettle's", "ket\u00adtle"),
    *("kettles", "of", "ﬁ", "strasse", "Straße", "STRASSE", "ko", "KO", "café", "cafe\u0301", "noir", "данные", "ДВА"),
    *(
        "два",
        "½",
        "ŉ",
        "漢字",
        "\ufdfa",
        "İ",
        "ı",
        "\u0345",
        "\u212a",
        "ǆ",
        " ",
        "  ",
        "\n",
        "\r\n\t",
        "\u00a0",
        "\u2003",
    ),
    *("\u2028", "-", "--", "_", "‑", "–", "—", "−", " - ", ",", ".", "…", "'", "’", "´", "¨", "\x00", "\x1f", "\x7f"),
    *("\u200d", "\ufeff", "\ud800", "\U0001f600", "|", "\xff"),
]
hostile = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(st.characters(), max_size=3)), max_size=30).map("".join),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(hostile, max_size=6))
def test_counts_equal_a_slow_count_on_hostile_text(texts):
    check(texts, QUERIES)


def test_characters_fold_as_the_rules_say():
    """Of the planes' parts with marks, spaces, compatibility forms and odd cases every third, of the rest some."""
    odd = [
        *range(0x3400),
        *range(0xA000, 0xAC00),
        *range(0xD800, 0x10000),
        *range(0x1D400, 0x1D800),
        *range(0xE0000, 0xE0200),
    ]
    characters = [chr(code) for code in [*range(0x300), *odd[::3], *range(0x3400, 0x110000, 997)]]
    for character in characters:
        words = [word for _, word in slow_words(character)]
        assert re.findall(r"[^ .-]+", normal_form.fold_character(character)) == words, ascii(character)
    assert normal_form.normal(characters) == b"".join(
        re.sub(" +", " ", normal_form.fold_character(character)).encode() + b"\n" for character in characters
    )


def test_counts_equal_a_slow_count_on_the_papers_queries():
    """Their own words in random order, whole and cut, with whatever may or may not stand between."""
    paper, rng = queries.load_queries(), random.Random(0)
    words = sorted({word for query in paper.queries for word in query.split()})
    joints = [" ", " ", " ", "-", "\n ", " - ", ", ", "’ ", "", "s "]
    texts = []
    for _ in range(10):
        chosen = [rng.choice(paper.queries) if rng.random() < 0.5 else rng.choice(words) for _ in range(50)]
        texts.append("".join(part.title() + rng.choice(joints) for part in chosen))
    assert check(texts, paper) > 100


def test_counts_equal_a_slow_count_on_the_synthetic_web():
    drafts = [synthetic_corpus.draft(0, "train", number) for number in range(20)]
    assert check([draft.text for draft in drafts], queries.load_queries()) > 0


@pytest.mark.parametrize(
    "text, hits",
    [
        ("grey kettle", 1),
        ("GREY\n\n\tKettle!", 1),
        ("grey-kettle, grey_kettle, grey‑kettle, grey–kettle", 4),
        ("grey - kettle grey—kettle grey, kettle grey--kettle grey.kettle", 0),
        ("grey kettles ungrey kettle grey kettle's grey kettle2", 0),
        ("'grey kettle' “grey kettle”", 2),
        ("gr\u00adey \u200bkettle", 1),
        ("grěy kéttle", 1),
        ("grey kettle" * 3, 0),
        ("grey kettle " * 3, 3),
    ],
)
def test_rules_by_example(text, hits):
    found = matching.Matcher(queries.parse({"c": ["grey kettle"]}, "here")).find([text])
    assert len(found.query_M) == hits


def test_matches_never_cross_documents():
    found = matching.Matcher(queries.parse({"c": ["grey kettle"]}, "here")).find(["grey", "kettle", "", "grey kettle"])
    assert found.document_M.tolist() == [3]
    assert found.words_D.tolist() == [1, 1, 0, 2]


def test_windows_lose_and_double_nothing(monkeypatch):
    text = "ko ko ko grey kettle of strasse " * 20
    whole = sorted(zip(*(array.tolist() for array in _pairs(text)), strict=True))
    for size in range(1, 30):
        monkeypatch.setattr(matching, "WINDOW_BYTES", size)
        assert sorted(zip(*(array.tolist() for array in _pairs(text)), strict=True)) == whole


def _pairs(text):
    found = matching.Matcher(QUERIES).find([text])
    return found.position_M, found.query_M


def test_the_papers_queries():
    paper = queries.load_queries()
    assert len(paper.categories) == 14 and sum(paper.listed) == 697 and len(paper.queries) == 694
    assert sum(len(categories) == 2 for categories in paper.categories_of) == 3


def test_queries_with_one_normal_form_are_one_query():
    assert QUERIES.queries.count("grey kettle") == 1
    assert QUERIES.categories_of[QUERIES.queries.index("grey kettle")] == (0, 1)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("[]", "expected an object"),
        ("{", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="nested too deep"),
        ('{"categories": {}}', "no categories"),
        ('{"c": "kettle"}', "holds no list"),
        ('{"c": [3]}', "not a string"),
        ('{"c": ["a, b"]}', "words separated by spaces"),
        ('{"c": ["--"]}', "words separated by spaces"),
        ('{"c": ["a b c d e f g h i"]}', "more than 8 words"),
    ],
)
def test_a_bad_list_of_queries_is_one_clear_error(tmp_path, content, complaint):
    path = tmp_path / "queries.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        queries.load_queries(str(path))
    assert str(path) in str(caught.value)


def test_the_hash_is_of_what_is_counted():
    same = json.loads(json.dumps(ABSTRACT)) | {"name": "another"}
    same["categories"]["one"][0] = "GREY-kettle"
    assert queries.parse(same, "x").sha256 == QUERIES.sha256
    same["categories"]["one"][0] = "grey kettles"
    assert queries.parse(same, "x").sha256 != QUERIES.sha256
