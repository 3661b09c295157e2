"""Scoring a corpus: every row comes out once, as it was, with its scores; runs are resumed, refused and checked."""

import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
from document_files import write_rows
from scoring_runs import FOLDERS, SCORER, data, make_rows, rows_of, run, score_one, work_for

from safelm import documents, score
from safelm.jobs.beam_runner import Runner
from safelm.safety.scorer import Verdict
from safelm.safety.scoring import columns, shard
from safelm.safety.scoring.plan import split

ODD_TEXTS = {
    "empty": "",
    "blank": " \r\n\t",
    "random": bytes(range(256)).decode("utf-8", "replace") + " level2",
    "nul": "\x00level1\x00",
    "lines": "level3\r\nof\rmany\n\u2028lines",
    "large": "level4 " + "long " * 2_000_000,
    "astral": "level5 \U0001f600 \u00e9",
    "none": "unusable",
}
ODD_FOLDERS = {"empty": 0, "blank": 0, "random": 2, "nul": 1, "lines": 3, "large": 4, "astral": 5, "none": None}


def test_rows_come_out_once_as_they_were_with_their_scores(tmp_path):
    rows = [{"id": name, "text": text, "meta": {"a": [1, None], "b": 1e300}} for name, text in ODD_TEXTS.items()]
    lines = [json.dumps(row, ensure_ascii=index % 2 == 0).encode() for index, row in enumerate(rows)]
    lines[1] = lines[1].replace(b'"meta"', b'"big" : 12345678901234567890123, "meta"') + b"  \r"
    malformed = [b"", b'{"id": "bad", "text": "level5', b'{"id": "null", "text": null}', b'{"id": "x", "text": "\xff"}']
    malformed += [b'{"id": "taken", "text": "a", "harm_score": 1}']
    (tmp_path / "web.jsonl").write_bytes(b"\n".join([*lines, *malformed]))
    record = score_one(tmp_path / "out", tmp_path / "web.jsonl")

    assert record["rows"] == len(lines) + 4 == sum(record["folders"].values())
    assert (record["empty"], record["agreement"]["unusable"], record["agreement"]["documents"]) == (2, {"level": 1}, 6)
    seen = {}
    for folder in columns.FOLDERS:
        for row in rows_of(tmp_path / "out", folder):
            seen[row["id"]] = folder
            assert {key: row[key] for key in ("id", "text", "meta")} in rows
            expected = ODD_FOLDERS[row["id"]]
            empty = row["id"] in ("empty", "blank")
            assert row["harm_score"] == expected
            assert row["score_level"] == (None if empty else expected)
            assert row["level_length"] == (None if empty else len(ODD_TEXTS[row["id"]]))
            assert (row["harm_reason"] == "empty") == empty
    assert seen == {name: columns.folder(ODD_FOLDERS[name]) for name in ODD_TEXTS}
    kept = gzip.decompress((tmp_path / "out" / "score=0" / "000000-whole.jsonl.gz").read_bytes()).splitlines()
    assert all(line.startswith(former.rstrip()[:-1]) for line, former in zip(kept, lines[:2], strict=True))

    lines = (tmp_path / "out" / "quarantine" / "000000-whole.malformed").read_text().splitlines()
    assert [(r["row"], r["id"], r["reason"]) for r in map(json.loads, lines)] == [
        (10, None, "not JSON at column 23"),
        (11, "null", "field 'text' is missing or null"),
        (12, None, "not UTF-8"),
        (13, "taken", "field 'harm_score' is there, which scoring would add"),
    ]
    assert all(r["file"] == str(tmp_path / "web.jsonl") for r in map(json.loads, lines))


def test_parquet_keeps_schema_nested_columns_and_what_datasets_reads(tmp_path):
    struct = pyarrow.struct(
        [("url", pyarrow.large_string()), ("tags", pyarrow.list_(pyarrow.dictionary("int8", "string")))]
    )
    fields = [
        pyarrow.field("text", pyarrow.large_string(), nullable=False, metadata={"unit": "words"}),
        pyarrow.field("meta", struct),
        pyarrow.field("when", pyarrow.timestamp("us", "UTC")),
        pyarrow.field("vector", pyarrow.list_(pyarrow.float32(), 2)),
        pyarrow.field("map", pyarrow.map_("string", "int16")),
        pyarrow.field("price", pyarrow.decimal128(9, 2)),
    ]
    features = {"info": {"features": {"text": {"dtype": "large_string", "_type": "Value"}}}}
    schema = pyarrow.schema(fields, metadata={"huggingface": json.dumps(features), "own": "kept"})
    rows = [
        {
            "text": text,
            "meta": {"url": None, "tags": ["x", name]} if i % 3 else None,
            "when": i,
            "vector": [i, 0.5],
            "map": [("k", i)],
            "price": i,
        }
        for i, (name, text) in enumerate(ODD_TEXTS.items())
    ]
    table = pyarrow.Table.from_pylist(rows, schema)
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet", compression="zstd", row_group_size=3)
    record = score_one(tmp_path / "out", tmp_path / "web.parquet")
    assert record["rows"] == len(rows)
    back = []
    for folder in columns.FOLDERS:
        for path in (tmp_path / "out" / folder).glob("*.parquet"):
            found = pyarrow.parquet.ParquetFile(path)
            assert found.schema_arrow.names[-5:] == [
                "harm_score",
                "harm_reason",
                "score_level",
                "level_length",
                "level_mean_code",
            ]
            for index in range(len(schema)):
                assert found.schema_arrow.field(index).equals(table.schema.field(index), check_metadata=False)
            assert found.schema_arrow.field("text").metadata[b"unit"] == b"words"
            metadata = found.schema_arrow.metadata
            assert metadata[b"own"] == b"kept"
            assert json.loads(metadata[b"huggingface"])["info"]["features"]["harm_score"]["dtype"] == "int64"
            assert found.metadata.row_group(0).column(0).compression == "ZSTD"
            back.append(found.read().select(schema.names))
    merged = pyarrow.concat_tables([part.cast(table.schema) for part in back]).sort_by("when")
    assert merged.equals(table)


def test_parquet_rows_that_are_malformed_are_quarantined(tmp_path):
    texts = pyarrow.array([b"level1", b"\xff\xfe", None, b"level1 again"], pyarrow.binary())
    table = pyarrow.table(
        {"id": [1, 2, 3, 4], "text": pyarrow.Array.from_buffers(pyarrow.string(), 4, texts.buffers())}
    )
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet")
    record = score_one(tmp_path / "out", tmp_path / "web.parquet")
    assert record["folders"] | {"rows": record["rows"]} == {
        **dict.fromkeys(FOLDERS, 0),
        "score=1": 2,
        "quarantine": 2,
        "rows": 4,
    }
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine/000000-whole.malformed").read_text().splitlines()]
    assert [(line["row"], line["id"], line["reason"]) for line in lines] == [
        (2, 2, "not UTF-8"),
        (3, 3, "field 'text' is missing or null"),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_large_file_is_scored_in_parts_with_the_same_rows(tmp_path, suffix):
    rows = make_rows(300)
    path = tmp_path / f"web{suffix}"
    write_rows(path, [*rows, {"id": "bad", "text": 5}] if suffix == ".jsonl" else rows, row_group_size=25)
    (file,) = documents.find(str(path))
    parts = split(file, file.bytes // 5)
    assert len(parts) >= 4
    for part in parts:
        score_one(tmp_path / "parts", path, part)
    score_one(tmp_path / "whole", path)
    for folder in columns.FOLDERS:
        both = [sorted(rows_of(tmp_path / name, folder), key=lambda row: row["n"]) for name in ("parts", "whole")]
        assert both[0] == both[1]
    if suffix == ".jsonl":
        (line,) = (tmp_path / "parts" / "quarantine").glob("*")
        assert json.loads(line.read_text())["row"] == 301


def test_a_run_ends_in_a_manifest_and_is_not_done_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_rows(tmp_path / "a.jsonl", [*make_rows(30), {"id": "bad"}, {"id": "e", "text": ""}])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(make_rows(12, 30)), tmp_path / "b.parquet")
    inputs = [str(tmp_path / "*.jsonl"), str(tmp_path / "b.parquet")]
    two = f"{SCORER},higher={SCORER}?offset=1&loads={tmp_path}/loads"
    manifest = run(tmp_path / "out", *inputs, scorers=two)
    totals = manifest["totals"]
    assert totals["rows"] == 44 == sum(totals[name] for name in FOLDERS)
    assert {name: totals[name] for name in FOLDERS} == {
        "score=0": 1,
        "score=1": 7,
        "score=2": 7,
        "score=3": 7,
        "score=4": 7,
        "score=5": 14,
        "unscored": 0,
        "quarantine": 1,
    }
    assert [s["rows"] for s in manifest["shards"]] == [32, 12]
    assert [(s["name"], s["fingerprint"]) for s in manifest["scorers"]] == [("level", "level-0"), ("higher", "level-1")]
    assert [i["bytes"] for i in manifest["input"]] == [(tmp_path / n).stat().st_size for n in ("a.jsonl", "b.parquet")]
    row = rows_of(tmp_path / "out", "score=5")[0]
    assert (row["score_level"], row["score_higher"], row["harm_score"]) == (4, 5, 5)
    assert len((tmp_path / "loads").read_text().splitlines()) == 1

    before = data(tmp_path / "out")
    assert run(tmp_path / "out", *inputs, scorers=two) == manifest
    (tmp_path / "out" / "score=5" / "train-000001-b.parquet").write_bytes(b"cut")
    (tmp_path / "out" / "score=0" / "train-000001-b.parquet").write_bytes(b"left by another try")
    again = run(tmp_path / "out", *inputs, scorers=two)
    assert again["speed"]["shards"] == 1
    assert data(tmp_path / "out") == before
    assert again["totals"] == totals
    assert "Document" not in caplog.text


def test_an_output_that_holds_something_else_is_refused(tmp_path):
    path = write_rows(tmp_path / "web.jsonl", make_rows(3))
    run(tmp_path / "out", path)
    before = data(tmp_path / "out")
    other = write_rows(tmp_path / "more.jsonl", make_rows(4))
    for change, message in [
        ({"inputs": [path, other]}, r"begun with --input .*web.jsonl.*"),
        ({"scorers": f"{SCORER}?offset=1"}, r"--scorers .*level-0.*level-1"),
        ({"scorers": f"{SCORER},b={SCORER}"}, r"--scorers nothing more, now it is .*'b'"),
        ({"text_column": "id"}, r"--text_column text, now it is id"),
        ({"part_mb": 1}, r"--part_mb, in bytes: 67108864, now it is 1048576"),
    ]:
        inputs = change.pop("inputs", [path])
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", *inputs, **change)
    write_rows(path, make_rows(3, first=1))
    with pytest.raises(ValueError, match="begun with --input"):
        run(tmp_path / "out", path)
    assert data(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("x")
    with pytest.raises(ValueError, match="full: it holds other files"):
        run(tmp_path / "full", path)


def test_input_and_flags_that_cannot_be_used_are_clear_errors(tmp_path):
    path = write_rows(tmp_path / "web.jsonl", make_rows(3))
    scored = write_rows(tmp_path / "scored.jsonl", [{"text": "x", "score_level": 1}])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "url": ["u"]}), tmp_path / "web.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for inputs, flags, message in [
        ([path], {"text_column": "body"}, r"web.jsonl: missing column 'body'; it has id, n, text"),
        ([tmp_path / "web.parquet"], {}, r"web.parquet: missing column 'text'; it has body, url"),
        ([path], {"id_column": "url"}, r"web.jsonl: missing column 'url'"),
        ([scored], {}, r"scored.jsonl: it already has a column 'score_level'"),
        ([tmp_path / "cut.parquet"], {}, r"cut.parquet: not Parquet"),
        ([path], {"scorers": "magic:x"}, r"scorer 'magic:x': expected one of"),
        ([path], {"scorers": "python:scorers_for_tests:None"}, r"expected python:MODULE:FACTORY"),
        ([path], {"scorers": f"{SCORER},{SCORER}?offset=1"}, r"two are named 'level'; name one by NAME="),
        ([path], {"part_mb": 0}, r"--part_mb must be at least 1"),
        ([path], {"workers": -1}, r"--workers must be 0"),
        ([path], {"runner": "DaskRunner"}, r"loses records"),
        ([path], {"runner": "DirectRunner"}, r"`local` runs on this machine"),
        ([path], {"runner": "storm"}, r"--runner=storm: choose one of local"),
        ([path], {"runner": "flink"}, r"--runner=flink needs --flink_master=... or --job_endpoint=... behind --"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            run(tmp_path / "out", *inputs, **flags)
        assert not list((tmp_path / "out").glob("score=*"))


@pytest.mark.parametrize("word", ["crash", "refused"])
def test_a_failing_shard_ends_the_run_without_a_word_of_a_document(tmp_path, word, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secret = "an abstract secret"
    write_rows(tmp_path / "a.jsonl", make_rows(2))
    write_rows(tmp_path / "b.jsonl", [{"id": "b", "text": f"{secret} {word}"}])
    with pytest.raises(ValueError, match=r"scorer level: .*finished shards are kept") as error:
        run(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert not any(secret in text for text in (str(error.value), caplog.text, *capfd.readouterr()))
    assert len(list((tmp_path / "out" / "_shards").iterdir())) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_batches_are_bounded_by_rows_and_characters(monkeypatch):
    monkeypatch.setattr(shard, "BATCH_CHARACTERS", 10)
    monkeypatch.setattr(shard, "BATCH_ROWS", 3)
    lengths = [1, 1, 1, 1, 9, 2, 30, 1, 10]
    found = [[len(text) for text, _ in batch] for batch in shard.batches(("x" * n, None) for n in lengths)]
    assert found == [[1, 1, 1], [1, 9], [2], [30], [1], [10]]


def test_details_of_another_name_or_type_are_refused():
    made = columns.Columns({"s_a": "int64", "s_b": "float64"}, {"s": ("a", "b")})
    values = made.values(Verdict(1), {"s": Verdict(1, "", {"a": 1, "b": float("nan")})})
    assert (values["s_a"], values["s_b"]) == (1, None)
    for details, message in [({"a": 1.5}, "column 's_a': float64 here"), ({"c": 1}, "detail 'c'")]:
        with pytest.raises(ValueError, match=message):
            made.values(Verdict(1), {"s": Verdict(1, "", details)})


def test_a_runner_is_not_asked_where_nothing_is_to_do(tmp_path):
    path = write_rows(tmp_path / "web.jsonl", make_rows(3))
    first = run(tmp_path / "out", path)
    work = work_for(tmp_path / "out")
    files = documents.find(str(path))
    assert score.score(files, work, Runner("dataflow"), 64 << 20) == first
