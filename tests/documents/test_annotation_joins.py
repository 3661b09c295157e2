"""Annotations joined to a corpus by row: written beside it, or on the fly wherever harm scores are read."""

import contextlib
import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
import side_files
from annotation_runs import annotate, rows
from document_files import write_rows
from scoring_runs import make_rows

from data_tasks.readers import MalformedLimit, ReadReport, WebDocuments, read_documents
from safelm import annotate as annotate_command
from safelm import documents
from safelm.documents import Part, annotations
from safelm.jobs.file_shards import ShardJob, split
from safelm.safety.report_card.corpus import SliceInput, count_corpus
from safelm.safety.report_card.counting import CountSettings, Piece, count_piece
from safelm.safety.scoring import joining
from safelm.safety.synthesis.sources import Selection, ShardRows

FORMS = ("parquet", "jsonl")
HIGHER = "python:scorers_for_tests:LevelScorer?offset=1"


@pytest.fixture(params=FORMS)
def corpus(tmp_path, request):
    """A corpus of two files and its annotations; a row without a text in the first."""
    write_rows(tmp_path / f"web/train-0.{request.param}", [*make_rows(30), {"id": "d3", "text": None, "n": 0}])
    write_rows(tmp_path / f"web/train-1.{request.param}", make_rows(20, 4))
    annotate(tmp_path / "scores", tmp_path / "web")
    return tmp_path / "web"


def run(*argv):
    annotate_command.main(annotate_command.arguments().parse_args([*map(str, argv), "--workers=1"]))


def folders(*named):
    return annotations.parse(",".join(map(str, named)))


def test_joined_rows_are_those_of_the_corpus_with_their_columns(corpus, tmp_path):
    annotate(tmp_path / "higher", corpus, scorers=HIGHER)
    both = f"--annotations={tmp_path}/scores,more={tmp_path}/higher"
    run("--join", f"--input={corpus}", both, f"--output={tmp_path}/joined")
    names = []
    for path in sorted(corpus.iterdir()):
        is_parquet = path.suffix == ".parquet"
        names.append(str(tmp_path / "joined" / (path.stem + (".parquet" if is_parquet else ".jsonl.gz"))))
        found = [row for _, row in documents.read_rows(names[-1], text_column=None)]
        given = [row for _, row in documents.read_rows(str(path), text_column=None)]
        assert [{name: row[name] for name in ("id", "text", "n")} for row in found] == given
        for row in found:
            level = None if row["text"] is None else row["n"] % 6
            assert (row["harm_score"], row["more_harm_score"]) == (level, level if level is None else min(5, level + 1))
            assert row["flags"] == row["more_flags"] == ("malformed" if level is None else "")
        if not is_parquet:
            lines = zip(gzip.open(names[-1]), path.open("rb"), strict=True)
            assert all(line.startswith(own.rstrip()[:-1]) for line, own in lines)
    assert documents.list_files(str(tmp_path / "joined")) == names
    side_files.assert_only_documents("annotate", tmp_path / "joined", tmp_path / "joined")
    side_files.assert_only_documents("score", tmp_path / "scores")
    before = {name: open(name, "rb").read() for name in names}
    run("--join", f"--input={corpus}", both, f"--output={tmp_path}/joined")
    assert before == {name: open(name, "rb").read() for name in names}
    with pytest.raises(ValueError, match="was begun with --annotations"):
        run("--join", f"--input={corpus}", f"--annotations={tmp_path}/scores", f"--output={tmp_path}/joined")


def test_a_check_counts_and_writes_nothing(corpus, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    before = sorted(tmp_path.rglob("*"))
    run("--check", f"--input={corpus}", f"--annotations={tmp_path}/scores")
    assert "2 files, 51 rows: every row has its annotations" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before


def rewrite(path, change):
    """A file of annotations with other rows and the metadata that it had."""
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(change(table), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 30), r"train-0\.parquet: (has 30 rows, .* has 31|lacks row 31 of)"),
        (
            lambda table: pyarrow.concat_tables([table.slice(0, 3), table.slice(4)]),
            r"train-0\.parquet: (has 30|lacks row 4)",
        ),
        (lambda table: pyarrow.concat_tables([table, table.slice(30)]), r"train-0\.parquet: has 32 rows, .* has 31"),
        (lambda table: table.drop_columns("row"), r"train-0\.parquet: missing column 'row': these are no annotations"),
        (lambda table: table.replace_schema_metadata({}), r"train-0\.parquet: these are no annotations"),
    ],
)
def test_annotations_that_miss_rows_or_have_too_many_are_one_line(corpus, tmp_path, change, message):
    rewrite(tmp_path / "scores/train-0.parquet", change)
    for argv in (["--check"], ["--join", f"--output={tmp_path}/joined"]):
        with pytest.raises(ValueError, match=message):
            run(*argv, f"--input={corpus}", f"--annotations={tmp_path}/scores")


@pytest.mark.parametrize("form", FORMS)
def test_annotations_of_another_input_are_one_line(tmp_path, form):
    path = write_rows(tmp_path / f"web/a.{form}", make_rows(9))
    annotate(tmp_path / "scores", path)
    check = ["--check", f"--annotations={tmp_path}/scores"]
    moved = write_rows(tmp_path / f"elsewhere/deep/a.{form}", make_rows(9))
    run(*check, f"--input={moved}")
    write_rows(path, [row | {"text": row["text"].replace("has", "HAS")} for row in make_rows(9)])
    with pytest.raises(ValueError, match=r"a\.parquet: was made from another input, of (as many|\d+) bytes"):
        run(*check, f"--input={path}")
    write_rows(path, make_rows(10))
    with pytest.raises(ValueError, match=rf"was made from another input, of \d+ bytes, and .*a\.{form} has \d+:"):
        run(*check, f"--input={path}")
    other = write_rows(tmp_path / f"web/b.{form}", make_rows(9))
    with pytest.raises(FileNotFoundError, match=rf"scores: no annotations of .*b\.{form}: no file there has its name"):
        run(*check, f"--input={other}")


def test_flags_that_can_not_be_are_one_line(corpus, tmp_path):
    annotate(tmp_path / "higher", corpus, scorers=HIGHER)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/_settings.json").write_text("{}")
    scores, check = tmp_path / "scores", ["--check", f"--input={corpus}"]
    for argv, message in {
        (
            *check,
            f"--annotations={scores},{tmp_path}/higher",
        ): "both have a column 'harm_score'; name the folder, NAME=",
        (*check, f"--annotations={scores},{scores}"): "scores is named twice",
        (*check, f"--annotations={tmp_path}/begun"): "begun is not finished",
        (*check, f"--annotations={tmp_path}/none"): "none: no annotations there",
        (*check, "--annotations=,"): "--annotations names no folder",
        (*check, f"--annotations={scores}", "--output=x"): "leave out --output",
        ("--join", f"--input={corpus}", f"--annotations={scores}"): "--join needs --output",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            run(*argv)


def test_a_corpus_that_has_the_column_itself_is_one_line(tmp_path):
    path = write_rows(tmp_path / "web.jsonl", [row | {"harm_score": 1} for row in make_rows(3)])
    annotate(tmp_path / "scores", path)
    with pytest.raises(ValueError, match=r"already has a column 'harm_score', as .*scores has; name the folder, NAME="):
        run("--check", f"--input={path}", f"--annotations={tmp_path}/scores")
    run("--check", f"--input={path}", f"--annotations=ours={tmp_path}/scores")


def test_every_reader_of_harm_scores_takes_them_from_annotations(corpus, tmp_path):
    beside, path = folders(tmp_path / "scores"), str(min(corpus.iterdir()))
    web, report = WebDocuments(needs_score=True, annotations=beside), ReadReport()
    found = list(read_documents(path, limit=MalformedLimit(), report=report, row_format=web))
    assert [document.harm_score for document in found] == [i % 6 for i in range(30)]
    assert report.score_columns == {"harm_score": 30}

    (counted,) = count_corpus(
        [SliceInput(None, (str(corpus),))], CountSettings(annotations=beside), str(tmp_path / "counted")
    )
    tallies = {name: tally.documents for name, tally in counted.count.tallies.items()}
    levels = [i % 6 for i in (*range(30), *range(4, 24))]
    assert tallies == {
        "score 0": levels.count(0),
        "score 1 to 3": sum(1 <= level <= 3 for level in levels),
        "score 4 to 5": sum(level >= 4 for level in levels),
    }

    selection = Selection("refuseweb", (4, 5), leaves_out=True, annotations=beside)
    shard = ShardRows(ShardJob(0, "train-0", path), selection)
    assert [(number, source.harm_score) for number, source in shard.sources()] == [
        (i + 1, i % 6) for i in range(30) if i % 6 >= 4
    ]
    assert [number for number, _ in ShardRows(ShardJob(0, "train-0", path), selection).ids()] == [
        i + 1 for i in range(30) if i % 6 >= 4
    ]


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_file_find_their_rows(tmp_path, form):
    path = write_rows(tmp_path / f"web.{form}", make_rows(200), row_group_size=20)
    annotate(tmp_path / "scores", path)
    (file,) = documents.find(str(path))
    beside, parts = folders(tmp_path / "scores"), split(file, file.bytes // 5)
    assert len(parts) >= 4
    settings, total = CountSettings(annotations=beside), 0
    for part in parts:
        count, _ = count_piece(Piece(None, str(path), 1, part), settings)
        total += count.tallies["score 4 to 5"].documents
        shard = ShardRows(ShardJob(0, "x", str(path), part), Selection("refuseweb", (4, 5), True, annotations=beside))
        assert all(number % 6 in (5, 0) and source.harm_score >= 4 for number, source in shard.sources())
    assert total == sum(i % 6 >= 4 for i in range(200))


def test_a_later_row_is_found_without_reading_what_stands_before(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "web.parquet", make_rows(100), row_group_size=10)
    annotate(tmp_path / "scores", path)
    place = tmp_path / "scores/web.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(place), place, row_group_size=10)
    read = []
    real = annotations.parquet.iter_parquet
    monkeypatch.setattr(
        annotations.parquet,
        "iter_parquet",
        lambda path, columns, **o: read.append(o["groups"]) or real(path, columns, **o),
    )
    with contextlib.ExitStack() as files:
        joined = annotations.FileAnnotations(str(path), folders(tmp_path / "scores"), files)
        assert joined.join(73, {})["harm_score"] == 72 % 6
    assert read == [Part(7, 10)]


def test_lines_that_are_no_objects_are_kept(tmp_path):
    path = write_rows(tmp_path / "web.jsonl", ["", "{bad", *make_rows(2), "[1]", "", "{}"])
    annotate(tmp_path / "scores", path, max_malformed_fraction=1)
    assert [row["row"] for row in rows(tmp_path / "scores/web.parquet")] == [2, 3, 4, 5, 7]
    count = joining.join_file(str(path), folders(tmp_path / "scores"), str(tmp_path / "joined"))
    lines = gzip.open(tmp_path / "joined").read().splitlines()
    assert count == 5 and lines[0] == b"{bad" and lines[3] == b"[1]"
    assert [json.loads(lines[i])["harm_score"] for i in (1, 2, 4)] == [0, 1, None]
