"""Rows without an id, with a damaged one or with another's, and too many malformed rows: every command alike."""

import json

import pytest
from document_files import write_rows as write
from synthesis_runs import SCORER, no_charts, published, rows_of, run

from safelm import documents, report_card, synthesize


@pytest.fixture(autouse=True)
def without_charts(monkeypatch):
    no_charts(monkeypatch)


def without_ids(rows):
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]


def card(inputs, output, *more):
    report_card.main(
        report_card._parser().parse_args([f"--input={inputs}", f"--output={output}", "--workers=1", *more])
    )
    return json.loads((output / "card.json").read_text())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_documents_without_an_id_are_named_by_their_text_and_copies_left_out(tmp_path, suffix, caplog):
    rows = rows_of((2, 3), 8)
    copies = [rows[1], rows[4], rows[1]]
    first = write(tmp_path / f"a{suffix}", without_ids([*rows, copies[0]]))
    second = write(tmp_path / f"b{suffix}", [rows[0], *without_ids(copies[1:])])
    manifest = run(tmp_path / "out", [first, second])
    assert (manifest["totals"]["rows"], manifest["totals"]["repeats"], manifest["totals"]["malformed"]) == (9, 3, 0)
    assert "3 copies of documents without an id were left out" in caplog.text
    ids = {documents.content_id(row["text"]) for row in rows} | {rows[0]["id"]}
    assert published(tmp_path / "out").keys() <= ids
    once = run(tmp_path / "once", write(tmp_path / f"c{suffix}", without_ids(rows)))
    assert once["totals"]["rows"] == 8 and once["totals"]["repeats"] == 0


def test_an_id_of_their_own_twice_is_refused_and_one_of_their_text_is_a_copy(tmp_path):
    rows = rows_of((2, 3), 3)
    with pytest.raises(ValueError, match=r"row 1 and .*row 4 have one id, 'doc-"):
        run(tmp_path / "out", write(tmp_path / "a.jsonl", [*rows, rows[0]]))
    scored = [row | {"id": documents.content_id(row["text"])} for row in rows]  # as safelm.score names them
    manifest = run(tmp_path / "out", write(tmp_path / "b.jsonl", [*scored, scored[0], *without_ids(rows[1:2])]))
    assert (manifest["totals"]["rows"], manifest["totals"]["repeats"]) == (3, 2)


@pytest.mark.parametrize("bad", ["\ud800", ["a"], True, 1.5])
def test_a_damaged_id_is_a_malformed_row_where_rows_are_read(tmp_path, bad):
    rows = rows_of((2, 3), 4)
    path = write(tmp_path / "a.jsonl", [*rows[:3], rows[3] | {"id": bad}])
    manifest = run(tmp_path / "out", path)
    assert (manifest["totals"]["rows"], manifest["totals"]["malformed"]) == (3, 1)
    (line,) = (tmp_path / "out/quarantine").glob("*")
    assert "field 'id'" in json.loads(line.read_text())["reason"]
    found = card(path, tmp_path / "card")
    assert found["slices"][0]["documents"] == 3
    assert [(one["rows"], one["malformed_rows"]) for one in found["inputs"]] == [(4, 1)]


def test_half_pairs_elsewhere_in_a_row_end_nothing(tmp_path):
    odd = {
        "url": "https://web.invalid/\udfff",
        "category": "a\ud800b",
        "language": "en",
        "language_score": 10**400,
        "date": "0001-01-01T00:00:00+05:00",
        "dump": "\ud800",
    }
    rows = [row | {"metadata": odd} for row in rows_of((4, 5), 4)]
    write(tmp_path / "a.jsonl", rows)
    manifest = run(tmp_path / "refuseweb", tmp_path / "a.jsonl", "--review=2", kind="refuseweb")
    assert manifest["totals"]["rows"] == 4 and manifest["totals"]["published"] > 0
    made = next(iter(published(tmp_path / "refuseweb").values()))
    assert made["metadata"]["url"] == "https://web.invalid/\ufffd" and made["metadata"]["date"] is None
    damaged = [row | {"source_id": "\ud800"} for row in [made]]
    moral = write(tmp_path / "b.jsonl", [*damaged, made])
    manifest = run(tmp_path / "moral", moral, kind="moral_education")
    assert (manifest["totals"]["rows"], manifest["totals"]["malformed"]) == (1, 1)


def test_too_many_malformed_rows_stop_before_anything_is_written(tmp_path):
    rows = rows_of((2, 3), 4)
    path = write(tmp_path / "a.jsonl", [*rows, *([{"id": ["x"], "text": "a", "harm_score": 2}] * 101)])
    message = "a.jsonl: 101 of 105 rows are malformed, more than 100 rows and 1.00%; .*field 'id'"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", path)
    with pytest.raises(ValueError, match=message):
        card(path, tmp_path / "card")
    assert not (tmp_path / "out/_settings.json").exists()
    empty = [{"id": f"empty-{number}", "text": None, "harm_score": 2} for number in range(101)]
    with pytest.raises(ValueError, match=r"b.parquet: 101 of 105 rows are malformed"):
        run(tmp_path / "parquet", write(tmp_path / "b.parquet", [*rows, *empty]))
    write(path, rows)
    assert run(tmp_path / "out", path)["totals"]["rows"] == 4


def test_a_column_of_ids_that_is_named_must_be_there(tmp_path):
    path = write(tmp_path / "a.jsonl", without_ids(rows_of((2, 3), 2)))
    with pytest.raises(ValueError, match=r"a.jsonl: missing column 'url'; it has harm_score, metadata, text"):
        run(tmp_path / "out", path, "--id_column=url")
    with pytest.raises(ValueError, match=r"a.jsonl: missing column 'url'; it has harm_score, metadata, text"):
        card(path, tmp_path / "card", "--id_column=url")
    flags = synthesize.arguments().parse_args(
        [
            "--kind=safeweb",
            f"--input={path}",
            f"--output={tmp_path}/out",
            "--writer=template:",
            f"--scorer={SCORER}",
            "--max_malformed_fraction=2",
        ]
    )
    with pytest.raises(ValueError, match=r"--max_malformed_fraction=2.0: must be from 0 to 1"):
        synthesize.main(flags)
