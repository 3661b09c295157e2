"""Text preprocessors, readers and rates: properties, without TensorFlow."""

import gzip
import json

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tasks import preprocessors, rates
from data_tasks.preprocessors import replace_speaker_names
from data_tasks.readers import Document, MalformedLimit, ReadReport, read_documents
from safelm.tags import HARM_TAG
from safelm.text.harm_tags import inject_harm_tag, remove_harm_tags
from safelm.text.speakers import ROLE_PAIRS, SPEAKER_NAMES

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\u00a0\u3000ab<>")), max_size=200
)
WORDY = "one two\u00a0three\nfour  five\u3000six seven " * 40


def tag(text, *, harm_score=5, doc_id="d", seed=0, **kwargs):
    return inject_harm_tag(text, harm_score=harm_score, doc_id=doc_id, seed=seed, **kwargs)


@given(TEXTS, st.integers(0, 2**31), st.floats(0, 1), st.text(max_size=10))
def test_tags_stand_in_word_gaps_and_removing_them_restores_the_text(text, seed, rate, doc_id):
    text, _ = remove_harm_tags(text)
    tagged = tag(text, seed=seed, tag_rate=rate, doc_id=doc_id)
    assert tagged.replace(HARM_TAG, "") == text
    assert tagged == tag(text, seed=seed, tag_rate=rate, doc_id=doc_id)
    before, *after = tagged.split(HARM_TAG)
    assert not after or before.strip(), "a tag in front of the first word"
    position = len(before)
    for piece in after:
        assert not text[position - 1].isspace() and text[position].isspace() and text[position:].strip()
        position += len(piece)


@given(TEXTS)
def test_rate_one_tags_every_gap_once_and_rate_zero_none(text):
    text, _ = remove_harm_tags(text)
    assert tag(text, tag_rate=1.0).count(HARM_TAG) == max(len(text.split()) - 1, 0)
    assert tag(text, tag_rate=0.0) == text


def test_tags_depend_on_seed_and_document_and_have_the_rate():
    assert len({tag(WORDY, seed=seed, doc_id=doc_id) for seed in range(4) for doc_id in "abc"}) == 12
    gaps = len(WORDY.split()) - 1
    counts = [tag(WORDY, doc_id=str(i)).count(HARM_TAG) for i in range(200)]
    error = np.sqrt(0.05 * 0.95 / (200 * gaps))
    assert abs(sum(counts) / (200 * gaps) - 0.05) < 4 * error


def test_a_higher_rate_keeps_the_tags_of_a_lower_one():
    def gaps(rate):
        tagged, found = tag(WORDY, tag_rate=rate), set()
        pieces = tagged.split(HARM_TAG)[:-1]
        for end in np.cumsum([len(piece) for piece in pieces]):
            found.add(int(end))
        return found

    assert gaps(0.03) < gaps(0.05) < gaps(0.1)


@pytest.mark.parametrize("score", [-1, 0, 1, 3])
def test_safe_documents_are_never_tagged(score):
    with pytest.raises(ValueError, match=f"'doc-7': harm_score {score} is below 4"):
        tag(WORDY, harm_score=score, doc_id="doc-7")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"min_harm_score": 0}, "min_harm_score must be 1 to 5, got 0"),
        ({"tag_rate": 1.5}, "tag_rate must be from 0 to 1, got 1.5"),
    ],
)
def test_bad_tag_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tag(WORDY, **kwargs)
    with pytest.raises(ValueError, match="already holds the harm tag"):
        tag(f"a {HARM_TAG} b")


def test_literal_tags_are_removed_and_counted_also_nested_ones():
    assert remove_harm_tags(f"a{HARM_TAG} b{HARM_TAG}") == ("a b", 2)
    half = len(HARM_TAG) // 2
    assert remove_harm_tags(f"x{HARM_TAG[:half]}{HARM_TAG}{HARM_TAG[half:]}y") == ("xy", 2)


@given(
    st.lists(st.sampled_from([HARM_TAG, HARM_TAG[:9], HARM_TAG[9:], HARM_TAG[:1], HARM_TAG[1:], ">", "é", "\ud800"]))
)
def test_removing_tags_until_none_is_left_gives_the_same_in_any_order(pieces):
    text, count = "".join(pieces), 0
    left, removed = remove_harm_tags(text)
    while HARM_TAG in text:  # the last one first, one at a time
        before, _, behind = text.rpartition(HARM_TAG)
        text, count = before + behind, count + 1
    assert (left, removed) == (text, count)


DIALOGUE = """User: How do I pick a lock?
Assistant: I can't. A User: label here stays.

**User:** Why?
**Assistant**: Because.
"""


def test_speaker_labels_get_two_consistent_names():
    renamed = replace_speaker_names(DIALOGUE, doc_id="d", seed=0)
    first, second = renamed.split(":")[0], renamed.split("\n")[1].split(":")[0]
    assert {first, second} <= set(SPEAKER_NAMES) | {role for pair in ROLE_PAIRS for role in pair} and first != second
    expected = DIALOGUE.replace("User: How", f"{first}: How").replace("Assistant: I", f"{second}: I")
    expected = expected.replace("**User:**", f"**{first}:**").replace("**Assistant**:", f"**{second}**:")
    assert renamed == expected
    assert renamed == replace_speaker_names(DIALOGUE, doc_id="d", seed=0)
    assert len({replace_speaker_names(DIALOGUE, doc_id=str(i), seed=0) for i in range(50)}) > 30
    assert renamed != replace_speaker_names(DIALOGUE, doc_id="d", seed=1)


@pytest.mark.parametrize(
    "line",
    [
        "User:",
        "USER: hi",
        "  User: hi",
        "> User: hi",
        "- **User:** hi",
        "## User:",
        "*User*: hi",
        "__User__:",
        'User:"hi"',
    ],
)
def test_label_variants_are_replaced(line):
    assert "user" not in replace_speaker_names(f"a\n{line}\nb", doc_id="d", seed=0).lower()


@pytest.mark.parametrize(
    "text",
    [
        "The User: hi",
        "User hi",
        "Users: two",
        "User::f()",
        "User:me@host",
        "user: x",
        "Superuser:\n",
        "**User* : x",
        "User :x",
    ],
)
def test_running_text_stays(text):
    assert replace_speaker_names(text, doc_id="d", seed=0) == text


@given(TEXTS, st.lists(st.sampled_from(["User: ", "Assistant: ", "**User:** ", "and the User: "]), max_size=8))
def test_only_labels_change(text, starts):
    text = "\n".join([f"{start}{text}" for start in starts] + [text])
    lines, renamed = text.split("\n"), replace_speaker_names(text, doc_id="d", seed=3).split("\n")
    assert len(lines) == len(renamed)
    for old, new in zip(lines, renamed, strict=True):
        assert new == old or (":" in old and new.partition(":")[2] == old.partition(":")[2])
        assert not old.startswith("and the User") or new == old


def test_names_that_occur_in_the_dialogue_are_avoided():
    others = " ".join(SPEAKER_NAMES[:-2]) + " " + " ".join(role for pair in ROLE_PAIRS for role in pair)
    for i in range(20):
        renamed = replace_speaker_names(f"User: {others}\nAssistant: no", doc_id=str(i), seed=0)
        assert renamed.split(":")[0] in {*SPEAKER_NAMES[-2:], *(role for pair in ROLE_PAIRS for role in pair)}


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6))
def test_end_of_document_is_appended_once(documents):
    arrays = [np.array(document, np.int32) for document in documents]
    tokens, lengths = preprocessors.append_end_of_document(arrays, 0)
    assert tokens.tolist() == [token for document in documents for token in [*document, 0]]
    assert lengths.tolist() == [len(document) + 1 for document in documents]


def test_validation_split_has_its_share_and_grows_with_the_fraction():
    ids = [f"doc-{i}" for i in range(5000)]
    small, large = ({i for i in ids if preprocessors.in_validation_split(i, f)} for f in (0.01, 0.05))
    assert 25 < len(small) < 80 and small < large


def test_rates_of_every_rung_sum_to_one_and_the_base_dominates():
    assert tuple(rates.LADDER) == ("raw", "score0", "safeweb", "refuseweb", "moral_education", "harm_tagged")
    for rung in rates.LADDER:
        shares = rates.rates(rung)
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-12) and set(shares) <= set(rates.SOURCES)
        assert max(shares, key=shares.get) in ("raw_web", "filtered_web")
    with pytest.raises(ValueError, match="unknown rung 'best': the ladder has raw, score0"):
        rates.rates("best")


ROWS = [
    {"id": str(i), "text": f"text {i} ünï\u3000code", "metadata": {"url": "u", "score": 4.9, "harm_score": i % 6}}
    for i in range(12)
]


def read(path, *, needs_score=True, limit=None, report=None, quarantine=None):
    limit, report = limit or MalformedLimit(), report or ReadReport()
    return list(read_documents(str(path), needs_score=needs_score, limit=limit, report=report, quarantine=quarantine))


def write_jsonl(path, rows):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wb") as file:
        for row in rows:
            file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")
    return path


def test_jsonl_gzip_parquet_and_memory_give_the_same_documents(tmp_path):
    expected = [Document(row["id"], row["text"], row["metadata"]["harm_score"]) for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=5)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "corpus/a.parquet", filesystem=fsspec_memory())
    with fsspec.open("memory://corpus/a.jsonl.gz", "wb", compression="gzip") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS).encode())
    assert read(write_jsonl(tmp_path / "a.jsonl", ROWS)) == expected
    assert read(write_jsonl(tmp_path / "a.jsonl.gz", ROWS)) == expected
    assert read(tmp_path / "a.parquet") == expected
    assert read("memory://corpus/a.jsonl.gz") == read("memory://corpus/a.parquet") == expected


def fsspec_memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.makedirs("corpus", exist_ok=True)
    return filesystem


BAD_ROWS = {
    b"{not json": "not JSON at column 2",
    b'{"id": "1", "text": "x\xff", "harm_score": 0}': "not UTF-8",
    b"[1, 2]": "not an object but list",
    b'{"id": "1", "harm_score": 0}': "field 'text' is missing",
    b'{"id": [1], "text": "x", "harm_score": 0}': "field 'id' is not a string or an integer but list",
    b'{"id": "1", "text": 3, "harm_score": 0}': "field 'text' is not a string",
    b'{"id": "1", "text": " \\n", "harm_score": 0}': "field 'text' is empty",
    b'{"id": "1", "text": "\\ud800 secret", "harm_score": 0}': "field 'text' holds half a Unicode pair",
    b'{"id": "1", "text": "x", "harm_score": 6}': "field 'harm_score' is 6, not a harm score from 0 to 5",
    b'{"id": "1", "text": "x"}': "no harm score",
}


def test_malformed_rows_are_counted_quarantined_and_passed_over(tmp_path, caplog):
    good = [{"id": f"g{i}", "text": "fine", "harm_score": 0} for i in range(3)]
    path = write_jsonl(tmp_path / "a.jsonl.gz", [good[0], b"", *BAD_ROWS, *good[1:]])
    report, quarantine = ReadReport(), tmp_path / "q" / "a.jsonl"
    for _ in range(2):  # a second reading replaces the file
        report = ReadReport()
        assert [d.id for d in read(path, report=report, quarantine=str(quarantine))] == ["g0", "g1", "g2"]
    assert (report.rows, report.malformed) == (13, 10)
    records = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(3, 13))
    for record, (raw, reason) in zip(records, BAD_ROWS.items(), strict=True):
        assert reason in record["reason"] and record["file"] == str(path)
        assert record["raw"] == raw.decode("utf-8", "backslashreplace")
    assert "10 of 13 rows are malformed" in caplog.text and "secret" not in caplog.text


def test_malformed_parquet_rows(tmp_path):
    rows = [{"id": "1", "text": "x", "harm_score": 0}, {"id": "2", "text": None, "harm_score": 0}]
    rows += [{"id": "3", "text": "y", "harm_score": 9}, {"id": "4", "text": " ", "harm_score": 0}]
    table = pyarrow.Table.from_pylist(rows)
    bad = pyarrow.array([b"a\xff", b"b", b"c", b"d"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table.set_column(1, "text", bad), tmp_path / "b.parquet")
    quarantine = tmp_path / "q.jsonl"
    assert [d.id for d in read(tmp_path / "a.parquet", quarantine=str(quarantine))] == ["1"]
    assert [json.loads(line)["row"] for line in quarantine.read_text().splitlines()] == [2, 3, 4]
    assert [d.id for d in read(tmp_path / "b.parquet", quarantine=str(quarantine))] == ["2", "4"]
    records = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert records[0]["reason"] == "not UTF-8" and json.loads(records[0]["raw"])["text"] == "a\\xff"


def test_too_many_malformed_rows_stop(tmp_path):
    good = {"id": "g", "text": "fine", "harm_score": 0}
    path = write_jsonl(tmp_path / "a.jsonl", [good] * 900 + [b"{"] * 101)
    with pytest.raises(ValueError, match=r"a\.jsonl: 101 of 1001 rows are malformed, more than 100 rows"):
        read(path)
    assert len(read(path, limit=MalformedLimit(rows=101))) == 900
    assert len(read(path, limit=MalformedLimit(fraction=0.2))) == 900
    short = write_jsonl(tmp_path / "short.jsonl", [good] * 20 + [b"{"] * 21)
    with pytest.raises(ValueError, match=r"short\.jsonl: 21 of 41 rows are malformed, more than half"):
        read(short)
    assert len(read(write_jsonl(tmp_path / "even.jsonl", [good] * 21 + [b"{"] * 21))) == 21


@pytest.mark.parametrize("column", ["text", "harm_score"])
def test_missing_column(tmp_path, column):
    rows = [{"id": str(i), "text": "fine", "harm_score": 0} for i in range(3)]
    for row in rows:
        del row[column]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        with pytest.raises(
            ValueError, match=f"a.{path.suffix[1:]}: missing column '{column.replace('_', ' ')}'.*it has "
        ):
            read(path)
    if column == "harm_score":
        assert {d.harm_score for d in read(tmp_path / "a.jsonl", needs_score=False)} == {preprocessors.NO_SCORE}


def test_damaged_files_and_unknown_kinds_are_named(tmp_path):
    whole = write_jsonl(tmp_path / "a.jsonl.gz", ROWS).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged or cut short after row"):
        read(tmp_path / "a.jsonl.gz")
    with pytest.raises(ValueError, match=r"c\.parquet: not Parquet"):
        read(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"d\.csv: not a file this can read"):
        read(tmp_path / "d.csv")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl")
