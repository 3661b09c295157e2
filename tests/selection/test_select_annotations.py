"""`safelm.select --annotations`: scores beside the corpus choose its rows, and go with them."""

import json

import pyarrow.parquet
import pytest
from annotation_runs import annotate
from document_files import write_rows
from selection_runs import corpus, ids, run

from safelm import documents, select


def pages(count, first=0):
    """Rows without scores, whose texts name a level; some are repeated and one has no text."""
    rows = [
        {key: value for key, value in row.items() if key != "harm_score"} | {"text": f"level{at % 6} page {at // 2}"}
        for at, row in enumerate(corpus(count, first))
    ]
    return [*rows, {"id": f"none{first}", "text": None, "tokens": 5, "language": "en"}]


@pytest.fixture
def web(tmp_path):
    write_rows(tmp_path / "web/a.parquet", pages(60))
    write_rows(tmp_path / "web/b.jsonl", pages(60, first=60))
    annotate(tmp_path / "scores", tmp_path / "web")
    return tmp_path / "web"


def scored(path):
    return [row for file in documents.list_files(str(path)) for _, row in documents.read_rows(file)]


SPLITS = {
    ".parquet": [documents.Part(0, 4), documents.Part(4, 9)],
    ".jsonl": [documents.Part(0, 2000), documents.Part(2000, 1 << 20)],
}


@pytest.mark.parametrize("is_split", [False, True])
def test_rows_are_chosen_by_scores_beside_them_as_by_scores_of_their_own(tmp_path, web, is_split, monkeypatch):
    """Whole files or parts of them; the rows keep their annotations."""
    if is_split:
        monkeypatch.setattr("safelm.selection.plan.split", lambda file, size: SPLITS[documents.suffix(file.path)])
    manifest = run(tmp_path / "out", web, annotations=tmp_path / "scores", min_score=2, max_score=4)
    wanted = [f"d{at}" for at in range(120) if at % 6 in (2, 3, 4)]
    assert ids(tmp_path / "out") == wanted and manifest["selected"]["documents"] == len(wanted)
    for row in scored(tmp_path / "out"):
        at = int(row["id"][1:])
        assert (row["harm_score"], row["score_level"], row["flags"]) == (at % 6, at % 6, "")
        assert row["text"] == f"level{at % 60 % 6} page {at % 60 // 2}"
    assert manifest["score_columns"] == {"harm_score": 120}


def test_types_of_annotations_and_marks_stand_beside_the_rows_columns(tmp_path, web):
    run(tmp_path / "out", web, annotations=f"first={tmp_path}/scores,{tmp_path}/scores", matched_safe=1)
    (table,) = [pyarrow.parquet.read_table(path) for path in (tmp_path / "out").glob("*.parquet")]
    own = ["id", "text", "language", "tokens"]
    assert table.schema.names[: len(own)] == own and table.schema.names[-1] == "matched"
    assert str(table.schema.field("first_harm_score").type) == "int8" == str(table.schema.field("harm_score").type)
    lines = [row for row in scored(tmp_path / "out") if int(row["id"][1:]) >= 60]
    assert {"first_level_length", "level_length", "matched"} <= lines[0].keys() and len(lines) == 60


def test_six_columns_of_probabilities_stand_for_a_list(tmp_path):
    write_rows(tmp_path / "web.jsonl", [{"id": str(at), "text": f"page {at}", "tokens": 3} for at in range(4)])
    annotate(tmp_path / "six", tmp_path / "web.jsonl", scorers="python:test_select_annotations:Sure")
    flags = {"class_threshold": "5=0.5,4=0.5", "probabilities_column": "sure_probability", "max_score": 3}
    run(tmp_path / "out", tmp_path / "web.jsonl", annotations=tmp_path / "six", **flags)
    assert ids(tmp_path / "out") == ["0", "1"]


class Sure:
    """Gives 5, with probabilities that hold for texts 2 and 3 only."""

    name, fingerprint = "sure", "1"

    def score(self, texts):
        from safelm.safety.scorer import Verdict

        found = []
        for text in texts:
            is_sure = text[-1] in "23"
            shares = [0, 0.1, 0.2, 0.5, 0.1, 0.1] if not is_sure else [0, 0, 0, 0, 0.3, 0.7]
            found.append(Verdict(5, details={f"probability_{k}": float(p) for k, p in enumerate(shares)}))
        return found


def test_annotations_that_do_not_fit_are_named_and_guard_the_folder(tmp_path, web):
    annotate(tmp_path / "other", web, scorers="python:scorers_for_tests:LevelScorer?offset=1")
    manifest = run(tmp_path / "out", web, annotations=tmp_path / "scores")
    with pytest.raises(ValueError, match="was begun with --annotations"):
        run(tmp_path / "out", web, annotations=tmp_path / "other")
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    with pytest.raises(ValueError, match="no harm score found"):
        run(tmp_path / "none", web)
    write_rows(web / "a.parquet", pages(61))
    with pytest.raises(ValueError, match=r"a\.parquet: was made from another input"):
        run(tmp_path / "changed", web, annotations=tmp_path / "scores")
    assert "annotations" in select.arguments().format_help()
