"""`safelm.label` from flags to the training file: what it reads, what it refuses, in one line each."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import side_files
from document_files import write_rows
from scoring_runs import SCORER, make_rows
from scoring_runs import run as score

from safelm import documents, label
from safelm.safety.classifier import examples
from safelm.safety.labelling import folder
from safelm.safety.labelling.folder import LabelFolder
from safelm.serving import label_page

TWO = f"{SCORER},higher={SCORER}?offset=1"


@pytest.fixture
def answers(monkeypatch):
    """Scores that an annotator gives, one a document, in place of the page."""
    given: list[int] = []

    async def serve(session, port, *, started):
        started(f"http://127.0.0.1:{port}")
        for answer in given:
            if session.at is None:
                break
            session.label(session.at, answer, [], "")

    monkeypatch.setattr(label_page, "serve", serve)
    return given


def run(output, *inputs, **flags):
    argv = [f"--output={output}", *(f"--input={path}" for path in inputs)]
    argv += [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    label.main(label.arguments().parse_args(argv))


def scored_rows(count):
    return [
        {"id": f"d{i}", "text": f"Document {i} is about topic{i}.", "harm_score": i % 6, "score_a": i % 6, "score_b": 0}
        for i in range(count)
    ]


def test_from_a_scored_folder_to_a_training_file_that_training_reads(tmp_path, answers, capsys, caplog):
    score(tmp_path / "scored", write_rows(tmp_path / "web.jsonl", make_rows(60)), scorers=TWO)
    answers += [0, 5, 3]
    caplog.set_level("INFO", "safelm")
    run(tmp_path / "labels", tmp_path / "scored", documents=12, random_share=0.25)
    assert capsys.readouterr().out == "listening on http://127.0.0.1:8010\n"
    found = LabelFolder(tmp_path / "labels")
    assert found.settings["choose_by"] == "disagreement" and len(found.documents) == 12
    assert sum(each.random for each in found.documents) == 3
    assert all(each.scores.keys() == {"level", "higher"} for each in found.documents)
    assert not any("level5" in each.text for each in found.documents if not each.random), "both say 5"
    read = examples.read(f"harm_score:{tmp_path / 'labels'}")
    assert [each.score for each in read] == [0, 5, 3]
    assert "error of harm_score on" in caplog.text and "Document" not in caplog.text
    side_files.assert_only_documents(
        "label", tmp_path, *(tmp_path / name for name in ("web.jsonl", "scored", "labels"))
    )
    answers[:] = [1] * 12
    run(tmp_path / "labels", annotator="bob")
    assert len(examples.read(f"harm_score:{tmp_path / 'labels'}")) == 12
    rows = [json.loads(line) for line in (tmp_path / "labels/labels.jsonl").read_text().splitlines()]
    assert rows[1]["harm_votes"] == [0, 1, 0, 0, 0, 1] and rows[1]["harm_score"] == 3, "5 and 1"
    run(tmp_path / "labels", tmp_path / "scored", export=True, documents=12)
    assert json.loads((tmp_path / "labels/manifest.json").read_text())["measured"]["alpha"]["cases"] == 3


def test_plain_documents_are_scored_now_a_sample_of_them(tmp_path, answers, caplog):
    rows = [{"text": f"Page {i} of words{i} has level{i % 6}."} for i in range(30)]
    rows += [{"text": "  "}, {"text": "unusable"}]
    path = write_rows(tmp_path / "web.jsonl", rows)
    caplog.set_level("INFO", "safelm")
    run(tmp_path / "labels", path, scorers=TWO, sample=20, documents=5)
    found = LabelFolder(tmp_path / "labels")
    assert len(found.documents) == 5 and all(documents.is_content_id(each.id) for each in found.documents)
    for each in found.documents:
        level = int(each.text.partition("level")[2][0])
        assert each.scores == {"level": level, "higher": min(5, level + 1)} and each.harm_score == each.scores["higher"]
    assert "of 20 documents chosen by disagreement" in caplog.text or "of 19 documents" in caplog.text


def test_parquet_of_published_annotations_is_chosen_by_entropy(tmp_path, answers):
    sure, unsure = [1.0, 0, 0, 0, 0, 0], [0.3, 0.3, 0.2, 0.1, 0.1, 0.0]
    table = {
        "text": [f"Page {i} of topic{i}" for i in range(20)],
        "id": [None, *range(1, 20)],
        "safety_score": pa.array([0] * 20, pa.int8()),
        "safety_probs": [unsure if i in (4, 9) else sure for i in range(20)],
        "other": [{"deep": [i]} for i in range(20)],
    }
    pq.write_table(pa.table(table), tmp_path / "web.parquet")
    run(tmp_path / "labels", tmp_path / "web.parquet", documents=2, random_share=0)
    found = LabelFolder(tmp_path / "labels")
    assert sorted(each.row for each in found.documents) == [5, 10] and found.settings["choose_by"] == "entropy"


def test_what_was_chosen_stays_and_another_choice_is_refused(tmp_path, answers):
    path, output = write_rows(tmp_path / "web.jsonl", scored_rows(30)), tmp_path / "labels"
    run(output, path, documents=6)
    before = (output / folder.DOCUMENTS).read_bytes()
    run(output, path)
    assert (output / folder.DOCUMENTS).read_bytes() == before
    for flags, told in (({"documents": 7}, "--documents 6, now it is 7"), ({"seed": 1}, "--seed 0, now it is 1")):
        with pytest.raises(ValueError, match=told) as error:
            run(output, path, **flags)
        assert "choose another --output" in str(error.value) and "remove" not in str(error.value)
    with pytest.raises(ValueError, match="was begun with --input"):
        run(output, write_rows(tmp_path / "other.jsonl", scored_rows(31)))
    run(tmp_path / "again", path, documents=6)
    assert (tmp_path / "again" / folder.DOCUMENTS).read_bytes() == before, "the same choice by the same seed"


@pytest.mark.parametrize(
    ("rows", "flags", "told"),
    [
        (None, {}, r"nothing\.jsonl: no such file"),
        ([{"text": "a"}] * 3, {}, r"web\.jsonl: no row has a harm score: .*by --scorers=bundled"),
        ([{"body": "a", "harm_score": 1}] * 3, {}, r"web\.jsonl: missing column 'text'"),
        ([{"text": " ", "harm_score": 0}] * 3, {}, r"no document there has a text and a score"),
        ([{"text": "a", "harm_score": 0}], {"choose_by": "disagreement"}, "--choose_by=disagreement: needs"),
        ([{"text": "a", "harm_score": 0}], {"documents": 0}, "--documents=0"),
        ([{"text": "a", "harm_score": 0}], {"random_share": 1.5}, "--random_share=1.5"),
        ([{"text": "a", "harm_score": 0}], {"sample": 0}, "--sample=0"),
        ([{"text": "a", "harm_score": 0}], {"port": 70000}, "--port=70000"),
        ([{"text": "a", "harm_score": 0}], {"annotator": "a/b"}, "--annotator=a/b"),
        ([{"text": "a", "harm_score": 0}], {"scorers": "nothing"}, "scorer 'nothing': expected one of"),
        (
            [{"text": "a", "harm_score": 0, "score_a": 9}] * 30,
            {"max_malformed_rows": 3},
            r"30 of 30 rows are malformed.*field 'score_a' is 9, not a harm score",
        ),
    ],
)
def test_bad_input_is_one_line_and_begins_nothing(tmp_path, answers, rows, flags, told):
    path = tmp_path / "nothing.jsonl" if rows is None else write_rows(tmp_path / "web.jsonl", rows)
    with pytest.raises((ValueError, OSError), match=told) as error:
        run(tmp_path / "labels", path, **flags)
    assert "\n" not in str(error.value)
    assert not [name for name in (tmp_path / "labels").glob("*") if name.name != ".lock"]


def test_folders_that_are_none_of_ours_are_refused_and_stay_as_they_are(tmp_path, answers):
    with pytest.raises(ValueError, match="no such folder; give --input"):
        run(tmp_path / "labels")
    assert not (tmp_path / "labels").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing was chosen there yet: give --input"):
        run(tmp_path / "empty", export=True)
    path = write_rows(tmp_path / "web.jsonl", scored_rows(6))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt', which isn't labels"):
        run(tmp_path / "full", path)
    documents.declare_no_documents(str(tmp_path / "full"), "safelm.score")
    with pytest.raises(ValueError, match=r"no folder of safelm\.label"):
        run(tmp_path / "full", path)
    with pytest.raises(ValueError, match="is written to this machine only"):
        run("gs://bucket/labels", path)
    run(tmp_path / "labels", path, documents=3)
    with pytest.raises(ValueError, match="no document has a label yet"):
        run(tmp_path / "labels", export=True)
    with (
        folder.only_process(tmp_path / "labels"),
        pytest.raises(ValueError, match="another process is labelling there"),
    ):
        run(tmp_path / "labels")
    assert sorted(os.listdir(tmp_path / "full")) == [".lock", "manifest.json", "notes.txt"]
