"""The harm score of a row: from columns that say so, the same for every command, and what was used is recorded."""

import collections
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
from annotation_runs import annotate
from document_files import write_rows
from scoring_runs import run as run_score
from selection_runs import ids
from selection_runs import run as select
from synthesis_runs import no_charts, rows_of
from synthesis_runs import run as synthesize

from data_tasks.readers import MalformedLimit, ReadReport, WebDocuments, read_documents
from safelm import documents, report_card
from safelm.documents import annotations, harm
from safelm.jobs.file_shards import ShardJob
from safelm.safety.labelling import pool
from safelm.safety.report_card import charts
from safelm.safety.report_card.counting import CountSettings, Piece, count_piece
from safelm.safety.scoring import joining
from safelm.safety.synthesis.sources import Selection, ShardRows

EDUCATION = {
    "dump": "CC",
    "url": "u",
    "date": "2024-01-01",
    "file_path": "f",
    "language": "en",
    "language_score": 0.9,
    "token_count": 9,
    "score": 3.4,
    "int_score": 3,
}
ROW = {"id": "a", "text": "An abstract page about a harbour."}
# what a row has beside the id and the text, the folder it stands in, --score_column -> what is read, and from where
SOURCES = {
    "a column that says so": (EDUCATION | {"harm_score": 4}, "web", None, 4, "harm_score"),
    "a field that says so": ({"metadata": EDUCATION | {"harm_score": 5}}, "web", None, 5, "metadata.harm_score"),
    "what synthesize wrote": (
        {"metadata": EDUCATION | {"int_score": 5}, "prompt_version": "refuseweb-v2-0", "source_id": "a"},
        "web",
        None,
        5,
        "metadata.int_score",
    ),
    "a published set": ({"metadata": EDUCATION}, "score_4_refusal", None, 4, "folder score_4_refusal"),
    "published pages": ({"metadata": EDUCATION}, "score_5", None, 5, "folder score_5"),
    "published annotations": ({"safety_score": 5, "safety_probs": [0.0] * 5 + [1.0]}, "web", None, 5, "safety_score"),
    "a column the user names": (EDUCATION | {"level": {"mine": 3.5}}, "web", "level.mine", 4, "level.mine"),
    "an educational column that the user names": (EDUCATION | {"int_score": 4}, "web", "int_score", 4, "int_score"),
}
REWRITTEN = ("what synthesize wrote", "a published set")
NONE = {
    "FineWeb-Edu": (EDUCATION, "web", "int_score"),
    "FineWeb-Edu by datatrove": ({"metadata": EDUCATION}, "web", "metadata.int_score"),
    "FineWeb-Edu in a folder of one of its scores": (EDUCATION, "score_4", "int_score"),
    "an annotation without its probabilities": ({"safety_score": 4}, "web", "--score_column"),
    "nothing": ({}, "web", "--score_column"),
}
FORMATS = ("jsonl", "parquet")


def write(root, more, folder, form, count=3):
    return write_rows(root / folder / f"train-0.{form}", [ROW | {"id": str(i)} | more for i in range(count)])


def dialogues(path, column):
    selection = Selection("moral_education", (4, 5), score_column=column, are_dialogues=True)
    return ShardRows(ShardJob(0, "train-0", str(path)), selection)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_command_reads_the_same_score_and_says_from_where(tmp_path, name, form):
    more, folder, column, score, used = SOURCES[name]
    path = write(tmp_path, more, folder, form)
    rows = [row for _, row in documents.read_rows(str(path))]
    assert [(s.value, s.column) for s in (documents.harm_score(row, str(path), column) for row in rows)] == [
        (score, used)
    ] * 3

    report, web = ReadReport(), WebDocuments(needs_score=True, score_column=column)
    found = list(read_documents(str(path), limit=MalformedLimit(), report=report, row_format=web))
    assert {document.harm_score for document in found} == {score} and report.score_columns == {used: 3}

    count, _ = count_piece(Piece(None, str(path), 1), CountSettings(score_column=column))
    if name in REWRITTEN:  # the score is the source's, not that of the text that the card counts
        assert not count.score_columns and list(count.tallies) == ["unscored"]
    else:
        assert count.score_columns == {used: 3} and list(count.tallies) == ["score 4 to 5"]

    shard = dialogues(path, column)
    assert {source.harm_score for _, source in shard.sources()} == {score} and shard.score_columns == {used: 3}
    assert len(list(dialogues(path, column).ids())) == 3


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NONE)
def test_how_educational_a_page_is_never_counts_as_harm(tmp_path, name, form):
    more, folder, advised = NONE[name]
    path = write(tmp_path, more, folder, form)
    rows = [row for _, row in documents.read_rows(str(path))]
    assert {documents.harm_score(row, str(path)).value for row in rows} == {None}

    arguments = {"limit": MalformedLimit(), "report": ReadReport()}
    with pytest.raises(ValueError, match=rf"train-0.{form}: missing column 'harm score'.*{advised}"):
        list(read_documents(str(path), needs_score=True, **arguments))
    assert {document.harm_score for document in read_documents(str(path), **arguments)} == {-1}

    count, _ = count_piece(Piece(None, str(path), 1), CountSettings())
    assert list(count.tallies) == ["unscored"] and not count.score_columns
    assert (advised in count.passed_over) == ("int_score" in advised)

    with pytest.raises(ValueError, match=r"row 1 has no harm score .*safelm.score"):
        list(dialogues(path, None).sources())


@pytest.mark.parametrize("value", ["4", True, 5.2, -1, float("nan"), [4]])
def test_what_is_no_score_is_unusable_and_never_another_column(value):
    found = documents.harm_score({"harm_score": value, "metadata": {"harm_score": 5}})
    assert found.value is None and found.column == "harm_score"
    assert "not a harm score from 0 to 5" in found.problem and "4" not in found.problem.replace("int", "")


@pytest.mark.parametrize(("value", "score"), [(0, 0), (0.5, 1), (2.49, 2), (4.5, 5), (5, 5)])
def test_a_fraction_is_rounded_a_half_up(value, score):
    assert documents.harm_score({"harm_score": value}).value == score


def test_a_table_of_fields_gives_the_column_of_all_rows():
    assert harm.choose_column(["text", "harm_score", "int_score"]) == "harm_score"
    assert harm.choose_column(["metadata.int_score", "prompt_version", "source_id"]) == "metadata.int_score"
    assert harm.choose_column(["metadata.int_score", "score", "int_score"]) is None
    assert harm.choose_column(["score", "harm_score"], "score") == "score"


def test_the_card_and_its_command_say_what_was_used_and_what_was_not(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(charts, "draw_png", lambda path, card: path.write_bytes(b""))
    monkeypatch.setattr(charts, "of_page", lambda card: ())
    caplog.set_level(logging.INFO)
    write(tmp_path / "scored", EDUCATION | {"harm_score": 1}, "a", "jsonl")
    write(tmp_path / "scored", EDUCATION, "b", "parquet")
    report_card.main(
        report_card._parser().parse_args([f"--input={tmp_path / 'scored'}", f"--output={tmp_path / 'card'}"])
    )
    (one,) = json.loads((tmp_path / "card" / "card.json").read_text())["inputs"]
    assert one["score_columns"] == {"harm_score": 3}
    assert one["columns_not_taken_for_harm"] == {"int_score": 3, "score": 3}
    assert "harm scores were read from harm_score (3 rows)" in caplog.text
    assert "3 rows have no harm score: 'int_score' is not taken for harm" in caplog.text


def test_the_manifest_of_synthetic_documents_and_its_command_say_what_was_used(tmp_path, monkeypatch, caplog):
    no_charts(monkeypatch)
    caplog.set_level(logging.INFO)
    rows = [{name: value for name, value in row.items() if name != "harm_score"} for row in rows_of((1, 2), 3)]
    place = write_rows(tmp_path / "web.jsonl", [row | {"level": 2, "int_score": 5} for row in rows])
    manifest = synthesize(tmp_path / "out", place, "--score_column=level")
    assert manifest["score_columns"] == {"level": 3} and manifest["settings"]["score_column"] == "level"
    assert "harm scores were read from level (3 rows)" in caplog.text
    with pytest.raises(ValueError, match=r"row 1 has no harm score .*--score_column=int_score"):
        synthesize(tmp_path / "other", place)


def test_the_scores_of_a_published_folder_need_its_columns(tmp_path):
    table = pyarrow.table({"id": ["1"], "text": ["x"], "metadata": [{"dump": "CC", "int_score": 2}]})
    for folder, score in (("score_0", 0), ("score_5_morals", 5), ("score_6", None), ("score_5-x", None)):
        (tmp_path / folder).mkdir()
        path = str(tmp_path / folder / "a.parquet")
        pyarrow.parquet.write_table(table, path)
        ((_, row),) = documents.read_rows(path)
        assert documents.harm_score(row, path).value == score


def rewrites(count):
    """Texts of a level, rewritten from pages of score 5, of which another scorer said 4."""
    made = {"prompt_version": "safeweb-v1", "source_id": "a", "metadata": {"int_score": 5, "text_harm_score": 4}}
    return [{"id": str(i), "text": f"Retelling {i}, level{i % 4}.", "tokens": 10, **made} for i in range(count)]


def scores_counted(files, folders=()):
    """Harm score -> documents of the report card."""
    counts = [count_piece(Piece(None, str(path), 1), CountSettings(annotations=folders))[0] for path in files]
    tallies = [tally for count in counts for tally in count.tallies.values()]
    return dict(sum((tally.documents_by_score for tally in tallies), collections.Counter()))


@pytest.mark.parametrize("form", FORMATS)
def test_what_the_users_own_scorer_says_of_a_text_comes_before_what_the_corpus_says(tmp_path, form):
    web = write_rows(tmp_path / "web" / f"train-0.{form}", rewrites(8))
    run_score(tmp_path / "scored", web)
    annotate(tmp_path / "notes", web)
    folders = annotations.parse(str(tmp_path / "notes"))
    joined = tmp_path / f"joined.{'jsonl.gz' if form == 'jsonl' else form}"
    joining.join_file(str(web), folders, str(joined))
    scored = documents.list_files(str(tmp_path / "scored"))

    assert scores_counted([web]) == {"4": 8}
    own = {str(level): 2 for level in range(4)}
    assert scores_counted(scored) == scores_counted([web], folders) == scores_counted([joined]) == own

    for files in (scored, [str(joined)]):
        found = pool.read(pool.PoolSettings(tuple(files)))
        assert sorted(each.harm_score for each in found) == [0, 0, 1, 1, 2, 2, 3, 3]
    low = sorted(str(i) for i in range(8) if i % 4 <= 1)
    select(tmp_path / "a", *scored, max_score=1)
    select(tmp_path / "b", web, max_score=1, annotations=tmp_path / "notes")
    select(tmp_path / "c", joined, max_score=1)
    assert [sorted(ids(tmp_path / each)) for each in "abc"] == [low] * 3


def test_a_text_that_the_users_scorer_gave_no_score_has_none():
    row = {"harm_score": None, "harm_reason": "no answer", "metadata": {"harm_score": 5, "text_harm_score": 4}}
    assert harm.text_harm_score(row) == documents.HarmScore()
    assert harm.text_harm_score({"harm_score": 3, "text_harm_score": 1}).value == 1  # nothing says who wrote the 3


@pytest.mark.parametrize("form", FORMATS)
def test_a_selection_judges_rewrites_by_their_own_scores(tmp_path, form, caplog):
    own = [row | {"metadata": {"int_score": 5, "text_harm_score": i % 3}} for i, row in enumerate(rewrites(6))]
    bare = [row | {"metadata": {"int_score": 5}} for row in rewrites(6)]
    made = write_rows(tmp_path / "made" / f"train-0.{form}", own)
    chosen = select(tmp_path / "a", made, max_score=1)
    assert ids(tmp_path / "a") == ["0", "1", "3", "4"]
    assert chosen["score_columns"] == {"metadata.text_harm_score": 6}
    matched = select(tmp_path / "b", made, matched_safe=1)["matched"]
    assert matched["harmful"]["documents"] == 0

    unscored = write_rows(tmp_path / "bare" / f"train-0.{form}", bare)
    with pytest.raises(ValueError, match=r"6 of 6 rows are rewritten texts without a score of their own .*score them"):
        select(tmp_path / "c", unscored, max_score=1)
    assert select(tmp_path / "d", made, unscored, max_score=1)["selected"]["documents"] == 4
    assert "6 of 12 rows are rewritten texts without a score of their own" in caplog.text
    assert select(tmp_path / "e", unscored, strata="id")["selected"]["documents"] == 6
