"""Spans of texts: their checks, the units and terms they come from, the files that safelm.annotate writes of them."""

import itertools
import json

import pyarrow.parquet
import pytest
from document_files import write_rows
from hypothesis import given
from hypothesis import strategies as st

from safelm import annotate, documents
from safelm.documents import annotations, spans
from safelm.documents.spans import Span
from safelm.safety.scoring import span_files
from safelm.safety.scoring.units import Lexicon, Unit, parse_unit, read_lexicon

TEXT = "Fünf Bäume. 😀 two!"


def one(**values):
    return [{"start": 0, "end": 4, "kind": "k", "label": "l", "score": None} | values]


def test_spans_come_sorted_and_once():
    found = spans.parse([*one(start=5, end=9), *one(), *one(score=0.5)], TEXT, "f, row 1")
    assert found == (Span(0, 4, "k", "l"), Span(5, 9, "k", "l"))
    assert spans.from_json(spans.to_json(found)) == found
    assert spans.parse(None, TEXT, "f, row 1") == spans.parse([], TEXT, "f, row 1") == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (one(start=-1), "f, row 3, span 1: goes from -1 to 4"),
        (one(end=0), "goes from 0 to 0"),
        (one(end=19), "ends at 19, the text has 18 characters: these look like bytes of UTF-8"),
        (one(end=99), "ends at 99, the text has 18 characters$"),
        (one(start=1.5), "start 1.5 is no whole number"),
        (one(start=True), "start True is no whole number"),
        (one(label=[]), "label is no string but list"),
        (one(score=float("nan")), "score nan is no finite number"),
        ([3], "span 1: no object with start and end but int"),
        ("ab", "spans is no list but str"),
        (one(start=0, end=5, text="Fünf"), "0 to 5 is not what its text says: its offsets are of bytes of UTF-8"),
        (one(start=15, end=18, text="two"), "is not what its text says: its offsets are of units of UTF-16"),
        (one(text="Bäum"), "0 to 4 is not what its text says$"),
        ([*one(), *one(label="other")], "two spans of kind 'k' at 0 to 4 disagree: 'l' and 'other'"),
    ],
)
def test_a_bad_span_is_named_without_the_text(values, message):
    with pytest.raises(ValueError, match=message) as error:
        spans.parse(values, TEXT, "f, row 3")
    assert "Bäume" not in str(error.value) and "\n" not in str(error.value)


@given(st.text(alphabet="ab.!?\"' \n\u3000。é😀", max_size=60), st.integers(0, 4))
def test_units_hold_every_word_once_and_in_order(text, words):
    found = list(Unit(words).spans(text))
    assert "".join("".join(text[start:end] for start, end in found).split()) == "".join(text.split())
    assert all(text[start:end] == text[start:end].strip() != "" for start, end in found)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(found))
    if words:
        counts = [len(text[start:end].split()) for start, end in found]
        assert all(count == words for count in counts[:-1]) and all(0 < count <= words for count in counts)


def test_sentences():
    text = 'One. "Two!" Three?  four\nfive… v1.5 is out'
    found = [text[start:end] for start, end in Unit().spans(text)]
    assert found == ["One.", '"Two!"', "Three?", "four", "five…", "v1.5 is out"]
    for bad in ("window", "window:0", "window:-1", "words", "sentence:2", "window:²"):
        with pytest.raises(ValueError, match="--unit"):
            parse_unit(bad)


def test_terms_of_a_lexicon_at_borders_of_words():
    terms = read_lexicon("bad\tmild\n bad thing\tworse\n\nc++\n", "f")
    text = "Bad, badly a BAD THING, c++"
    found = [(text[s.start : s.end], s.label) for s in Lexicon(terms).find(text)]
    assert found == [("Bad", "mild"), ("BAD THING", "worse"), ("c++", "")]
    with pytest.raises(ValueError, match="f: line 2: a term for the second time"):
        read_lexicon("a\tx\nA\ty", "f")
    with pytest.raises(ValueError, match="f: no term there"):
        read_lexicon(" \n\tlabel", "f")


@pytest.mark.parametrize("term", ["İstanbul", "ısı", "Straße", "ΣΟΦΟΣ", "ﬁne", "µm", "ſame", "K2", "Ⅷ", "ǅ"])
def test_a_term_is_found_as_it_is_written_and_has_its_label(term):
    """Also where its small letters are others than one finds by `lower`, or more."""
    lexicon = Lexicon(read_lexicon(f"{term}\tits label\nother\t\n", "f"))
    for text in {term, *(each for each in (term.lower(), term.upper()) if len(each) == len(term))}:
        assert [(span.end, span.label) for span in lexicon.find(f"{text} there")] == [(len(text), "its label")], text


def test_terms_that_are_one_but_for_case_are_all_found():
    lexicon = Lexicon(read_lexicon("Straße\tway\nstrasse\tway", "f"))
    assert [span.label for span in lexicon.find("straße, STRASSE")] == ["way", "way"]


@given(st.text(min_size=1, max_size=6).map(str.strip).filter(lambda term: term and len(term.split()) == 1))
def test_any_term_is_found_with_its_label(term):
    lexicon = Lexicon(read_lexicon(f"{term}\tits label", "f"))
    assert [span.label for span in lexicon.find(term)] == ["its label"]


# ---- the command


def run(*argv):
    annotate.main(annotate.arguments().parse_args([*map(str, argv), "--workers=1"]))


def rows_of(folder, name="train-0"):
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(params=["parquet", "jsonl"])
def corpus(tmp_path, request):
    texts = ["Safe. It has level4 here! Again level1.", None, "", "Ümlaut level5."]
    for name in ("train-0", "train-1"):
        write_rows(tmp_path / f"web/{name}.{request.param}", [{"id": str(i), "text": t} for i, t in enumerate(texts)])
    return tmp_path / "web"


def test_sentences_scored_by_any_scorer(corpus, tmp_path):
    flags = (f"--input={corpus}", "--scorers=python:scorers_for_tests:LevelScorer", f"--output={tmp_path}/spans")
    run("--unit=sentence", *flags, "--max_malformed_rows=5")
    found = rows_of(tmp_path / "spans")
    assert [row["row"] for row in found] == [1, 2, 3, 4]
    first, *others = [[(s["start"], s["end"], s["kind"], s["label"]) for s in row["spans"]] for row in found]
    assert first == [(0, 5, "sentence", "0"), (6, 25, "sentence", "4"), (26, 39, "sentence", "1")]
    assert others == [[], [], [(0, 14, "sentence", "5")]]
    manifest = json.loads((tmp_path / "spans/manifest.json").read_text())
    assert manifest["totals"] == {"rows": 8, "spans": 8, "unscored": 0, "malformed": 2}
    assert manifest["labels"] == {"0": 2, "1": 2, "4": 2, "5": 2}
    run("--check", f"--input={corpus}", f"--annotations={tmp_path}/spans")
    folders = annotations.parse(f"mine={tmp_path}/spans")
    path = documents.list_files(str(corpus))[0]
    read = documents.iter_rows(path, lambda _: None, text_column="text", columns=["mine_spans"], annotated=folders)
    row = next(iter(read))
    assert spans.parse(row.values["mine_spans"], row.values["text"], "x")[1].label == "4"
    with pytest.raises(ValueError, match="--min_score"):
        run("--unit=sentence", *flags, "--min_score=3")


def test_own_files_are_checked_against_the_text(corpus, tmp_path):
    for name in ("train-0", "train-1"):
        write_rows(tmp_path / f"own/{name}.jsonl", [{"row": 4, "spans": [{"start": 0, "end": 6, "text": "Ümlaut"}]}])
    flags = (f"--input={corpus}", f"--spans={tmp_path}/own", f"--output={tmp_path}/spans", "--max_malformed_rows=5")
    run(*flags)
    assert [len(row["spans"]) for row in rows_of(tmp_path / "spans", "train-1")] == [0, 0, 0, 1]
    for row, message in (
        (9, "row 9: .*has no such row"),
        (2, "row 2, span 1: ends at 6, the text has 0"),
        (0, "row 0"),
    ):
        write_rows(tmp_path / "own/train-1.jsonl", [{"row": row, "spans": [{"start": 0, "end": 6}]}])
        with pytest.raises(ValueError, match=message):
            run(*flags[:2], f"--output={tmp_path}/other{row}", flags[3])
        assert not (tmp_path / f"other{row}/manifest.json").exists()
    (tmp_path / "own/train-1.jsonl").unlink()
    write_rows(tmp_path / "own/train-2.jsonl", [{"row": 4, "spans": []}])
    with pytest.raises(ValueError, match=r"--spans: no file there has the name of .*train-1"):
        run(*flags[:2], f"--output={tmp_path}/more")


def test_spans_are_written_before_there_are_too_many(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(span_files, "_GROUP_SPANS", 3)
    flags = (f"--input={corpus}", "--scorers=python:scorers_for_tests:LevelScorer", f"--output={tmp_path}/spans")
    run("--unit=sentence", *flags, "--max_malformed_rows=5")
    found = pyarrow.parquet.ParquetFile(tmp_path / "spans/train-0.parquet")
    assert [found.metadata.row_group(at).num_rows for at in range(found.num_row_groups)] == [1, 3]


@pytest.mark.parametrize("order", ["rising", "mixed"])
def test_own_spans_come_to_their_rows_and_rising_ones_in_step(tmp_path, order):
    rows = [{"row": row, "spans": one(end=row % 7 + 1)} for row in range(2, 601, 3)]
    rows = rows if order == "rising" else rows[::-1]
    path = write_rows(tmp_path / "own.jsonl", rows)
    finder, most = span_files._OwnSpans(str(path), "web"), 0
    for first in range(1, 601, 20):
        numbers = list(range(first, first + 20))
        for number, found in zip(numbers, finder.find(numbers, [TEXT] * 20), strict=True):
            assert [span.end for span in found] == ([number % 7 + 1] if number % 3 == 2 else [])
        most = max(most, len(finder._by_row))
    finder.finish()
    assert most <= 1 if order == "rising" else most > 100
    write_rows(tmp_path / "own.jsonl", [*rows, rows[3]])
    with pytest.raises(ValueError, match=f"row {rows[3]['row']} comes twice"):
        span_files._OwnSpans(str(path), "web")
    write_rows(tmp_path / "own.jsonl", [*rows[:0], {"row": 601, "spans": []}, {"row": 700, "spans": []}])
    behind = span_files._OwnSpans(str(path), "web")
    behind.find([1, 2], [TEXT] * 2)
    with pytest.raises(ValueError, match="row 601: web has no such row"):
        behind.finish()


def test_a_lexicon_in_a_corpus(corpus, tmp_path):
    (tmp_path / "terms.txt").write_text("ümlaut\tword\nsafe\n")
    run(f"--lexicon={tmp_path}/terms.txt", f"--input={corpus}", f"--output={tmp_path}/spans", "--max_malformed_rows=5")
    assert [[s["label"] for s in row["spans"]] for row in rows_of(tmp_path / "spans")] == [[""], [], [], ["word"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unit=sentence"], "--unit needs --output"),
        (["--lexicon=x", "--output=y", "--scorers=bundled"], "--scorers goes with --unit"),
        (["--unit=sentence", "--output=y", "--annotations=z"], "--annotations goes with --join or --check"),
        (["--unit=sentence", "--output=y", "--min_score=6"], "--min_score must be 0 to 5, got 6"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, flags, message):
    write_rows(tmp_path / "web/train-0.jsonl", [{"text": "a"}])
    flags = [flag.replace("=y", f"={tmp_path}/y") for flag in flags]
    with pytest.raises(ValueError, match=message):
        run(f"--input={tmp_path}/web", *flags)
