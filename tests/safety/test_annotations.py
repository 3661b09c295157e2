"""Annotating a corpus: as many rows as in the input, in its order, by number, with scores and without text."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from annotation_runs import annotate, contents, find, rows, work_for
from document_files import write_rows
from scoring_runs import SCORER, make_rows

from safelm.documents import Part, annotations
from safelm.jobs.beam_runner import Runner
from safelm.safety.scorer import Verdict
from safelm.safety.scoring import annotation_plan, annotation_rows, annotation_run, answers, shard

SECRET = "a page that only its corpus holds"


def mixed_rows():
    """Rows whose ids are repeated, null or numbers, and whose texts are repeated, blank, unusable and null."""
    first = make_rows(20)
    odd = [
        ("d3", "unusable"),
        (None, ""),
        (None, "\n"),
        ("d3", f"{SECRET} level4"),
        ("", None),
        ("z", first[3]["text"]),
    ]
    return [*first, *({"id": identity, "text": text, "n": 0} for identity, text in odd), *first[:7]]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz"])
def test_every_row_has_its_annotation_in_order_and_no_text_is_copied(tmp_path, suffix):
    given = mixed_rows()
    write_rows(tmp_path / f"web/part-0{suffix}", given)
    manifest = annotate(tmp_path / "out", tmp_path / "web")
    found = rows(tmp_path / "out/part-0.parquet")
    assert [row["row"] for row in found] == list(range(1, len(given) + 1))
    assert [row["id"] for row in found] == [row["id"] for row in given]
    for row, source in zip(found, given, strict=True):
        text = source["text"]
        level = re.search(r"level(\d)", text or "")
        expected = int(level[1]) if level else 0 if text is not None and not text.strip() else None
        assert row["harm_score"] == expected
        flag = "malformed" if text is None else "empty" if not text.strip() else "" if level else "unscored"
        assert row["flags"] == flag
        assert row["score_level"] == (None if flag else expected)
        asked = flag in ("", "unscored")
        assert row["level_mean_code"] == (pytest.approx(sum(map(ord, text[:100])) / 100, rel=1e-6) if asked else None)
    schema = pyarrow.parquet.read_schema(tmp_path / "out/part-0.parquet")
    assert [(field.name, str(field.type)) for field in schema] == [
        *(("id", "string"), ("row", "int64"), ("harm_score", "int8"), ("score_level", "int8")),
        *(("level_length", "int32"), ("level_mean_code", "float"), ("flags", "string")),
    ]
    assert manifest["totals"]["rows"] == len(given)
    assert manifest["flags"] == {"empty": 2, "malformed": 1, "unscored": 1}
    assert manifest["totals"]["asked"] == 20 + 2 == len({row["text"] for row in given} - {"", "\n", None})
    assert not any(SECRET.encode() in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_names_follow_the_input_s_and_no_file_is_taken_for_documents(tmp_path):
    for name in ("a.jsonl", "a.parquet", "sub/a.jsonl.gz", "sub/b.jsonl"):
        write_rows(tmp_path / "web" / name, make_rows(3))
    annotate(tmp_path / "out", tmp_path / "web")
    assert list(contents(tmp_path / "out")) == [
        "a.jsonl.parquet",
        "a.parquet.parquet",
        "sub/a.parquet",
        "sub/b.parquet",
    ]
    with pytest.raises(FileNotFoundError, match="holds documents"):
        find(tmp_path / "out")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_large_file_in_parts_gives_the_rows_of_the_whole(tmp_path, suffix):
    path = write_rows(
        tmp_path / f"web{suffix}", [*make_rows(299), {"id": "x", "text": None, "n": 0}], row_group_size=20
    )
    (file,) = find(path)
    for name, part_bytes in (("whole", file.bytes), ("parts", file.bytes // 6)):
        manifest = annotation_run.annotate([file], work_for(tmp_path / name), Runner(workers=1), part_bytes)
        assert manifest["totals"]["rows"] == 300
        assert manifest["speed"]["shards"] == 1 if name == "whole" else manifest["speed"]["shards"] >= 4
    assert rows(tmp_path / "parts/web.parquet") == rows(tmp_path / "whole/web.parquet")
    assert not (tmp_path / "parts/_parts").exists()
    again = annotation_run.annotate([file], work_for(tmp_path / "parts"), Runner(workers=1), file.bytes // 6)
    assert again["speed"] == manifest["speed"]


def test_a_file_whose_annotations_are_lost_is_annotated_again(tmp_path):
    for name in "ab":
        write_rows(tmp_path / f"web/{name}.jsonl", make_rows(5))
    annotate(tmp_path / "out", tmp_path / "web")
    before = contents(tmp_path / "out")
    (tmp_path / "out/a.parquet").unlink()
    assert annotate(tmp_path / "out", tmp_path / "web")["speed"]["shards"] == 1
    assert contents(tmp_path / "out") == before


def test_a_text_is_remembered_until_too_many_others_came(monkeypatch, tmp_path):
    monkeypatch.setattr(answers, "REMEMBERED", 8)
    monkeypatch.setattr(shard, "BATCH_ROWS", 2)
    monkeypatch.setattr(annotation_rows, "_BLOCK_ROWS", 1)
    given = make_rows(6)
    write_rows(tmp_path / "web.jsonl", given * 3 + make_rows(20) + given)
    manifest = annotate(tmp_path / "out", tmp_path / "web.jsonl")
    assert manifest["totals"]["asked"] == 6 + 14 + 6
    found = [row["harm_score"] for row in rows(tmp_path / "out/web.parquet")]
    assert found == [*range(6)] * 3 + [i % 6 for i in range(20)] + [*range(6)]


def _number(word):
    return float(word) if word in ("nan", "inf", "-inf", "1.5") else int(word)


class Counting:
    """A scorer whose details are large numbers."""

    name, fingerprint = "counting", "1"

    def score(self, texts):
        """`whole` is the number behind a text's first word, `much` a float beyond float32 where it says so."""
        details = [
            {"whole": _number(text.split()[1]) if text[:2] == "n " else 0, "much": 1e300 if "much" in text else 0.5}
            for text in texts
        ]
        return [Verdict(0, "", each) for each in details]


def test_details_that_a_column_can_not_hold_are_refused_or_null(tmp_path):
    spec = "python:test_annotations:Counting"
    most = (1 << 31) - 1
    texts = [f"n {most}", f"n -{most}", "n 3 much"]
    write_rows(tmp_path / "web.jsonl", [{"text": text} for text in texts])
    annotate(tmp_path / "out", tmp_path / "web.jsonl", scorers=spec)
    found = rows(tmp_path / "out/web.parquet")
    assert [row["counting_whole"] for row in found] == [most, -most, 3]
    assert [row["counting_much"] for row in found] == [0.5, 0.5, None]
    write_rows(tmp_path / "more.jsonl", [{"text": "n 5"}, {"text": "n 3000000000"}])
    with pytest.raises(ValueError, match="column 'counting_whole': 3000000000: whole numbers of annotations lie"):
        annotate(tmp_path / "more", tmp_path / "more.jsonl", scorers=spec)
    write_rows(tmp_path / "odd.jsonl", [{"text": f"n {value}"} for value in ("4", "nan", "inf", "-inf", "7")])
    annotate(tmp_path / "odd", tmp_path / "odd.jsonl", scorers=spec)
    assert [row["counting_whole"] for row in rows(tmp_path / "odd/odd.parquet")] == [4, None, None, None, 7]
    write_rows(tmp_path / "half.jsonl", [{"text": "n nan"}, {"text": "n 1.5"}])
    with pytest.raises(ValueError, match="column 'counting_whole': float64 here, int64 in the scorer's first answer"):
        annotate(tmp_path / "half", tmp_path / "half.jsonl", scorers=spec)
    with pytest.raises(ValueError, match=r"column 'n': 10+: whole"):
        answers._numbers("n", "int64", [None, 10**400])


def test_a_long_text_is_scored_by_its_beginning_and_flagged(tmp_path):
    at_limit = "level2" + "é" * (annotation_rows.CHUNK_CHARACTERS - 6)
    given = [{"text": at_limit}, {"text": at_limit + " level5"}, {"text": "\U0001f600" * 2047 + "x" * 900 + "level5"}]
    for name in ("a.jsonl", "b.parquet"):
        write_rows(tmp_path / name, given)
    annotate(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.parquet", max_chunks=1)
    for name in "ab":
        found = rows(tmp_path / f"out/{name}.parquet")
        assert [(row["harm_score"], row["flags"], row["level_length"]) for row in found] == [
            *((2, "", 2048), (2, "cut", 2048), (0, "cut", 2048))
        ]


def test_bytes_that_are_not_utf8_are_flagged(tmp_path):
    texts = pyarrow.array([b"level1", b"\xff\xfe", b"\xed\xa0\x80", b"level2", b"\xff\xfe"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 5, texts.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "id": column}), tmp_path / "web.parquet")
    manifest = annotate(tmp_path / "out", tmp_path / "web.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out/web.parquet")
    assert found["flags"].to_pylist() == ["", "malformed", "malformed", "", "malformed"]
    assert manifest["malformed"] == {"not UTF-8": 3}


def test_ids_may_be_anything(tmp_path):
    for name, ids in {"ints": [1, None], "views": ["a", None], "lists": [[1], [2]], "none": [None, None]}.items():
        kind = pyarrow.string_view() if name == "views" else None
        table = pyarrow.table({"text": ["level1", "level2"], "id": pyarrow.array(ids, kind)})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    write_rows(tmp_path / "half.jsonl", ['{"id": "\\ud800", "text": "level1"}', '{"id": {}, "text": "level2"}'])
    annotate(tmp_path / "out", tmp_path / "*.parquet", tmp_path / "half.jsonl")
    found = {path: [row["id"] for row in rows(tmp_path / "out" / path)] for path in contents(tmp_path / "out")}
    assert found == {
        "half.parquet": ["\\ud800", None],
        "ints.parquet": ["1", None],
        "lists.parquet": [None, None],
        "none.parquet": [None, None],
        "views.parquet": ["a", None],
    }


def test_a_part_knows_its_rows_numbers_in_the_file(tmp_path):
    path = write_rows(tmp_path / "web.jsonl", ["", *make_rows(50), "{bad", "", *make_rows(5)])
    whole = [block.row_N for block in annotation_rows.read(str(path), None, "text", "id", 1, lambda row: None)]
    size = path.stat().st_size
    parts = []
    for start, stop in ((0, size // 3), (size // 3, size // 2), (size // 2, size)):
        read = annotation_rows.read(str(path), Part(start, stop), "text", "id", 1, lambda row: None)
        parts += [block.row_N for block in read]
    assert np.concatenate(parts).tolist() == np.concatenate(whole).tolist() == [*range(2, 53), *range(54, 59)]


def test_a_changed_input_is_named_and_one_that_nothing_is_known_of_may_be_mended(tmp_path):
    write_rows(tmp_path / "web/a.jsonl", make_rows(5))
    (tmp_path / "web/b.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: not Parquet"):
        annotate(tmp_path / "out", tmp_path / "web")
    write_rows(tmp_path / "web/b.parquet", make_rows(7))
    assert annotate(tmp_path / "out", tmp_path / "web")["speed"]["shards"] == 1
    write_rows(tmp_path / "web/b.parquet", make_rows(8))
    with pytest.raises(ValueError, match=r"was begun with --input b\.parquet of \d+ bytes.* now it is b\.parquet of"):
        annotate(tmp_path / "out", tmp_path / "web")
    write_rows(tmp_path / "web/c.jsonl", make_rows(8))
    with pytest.raises(ValueError, match="was begun with 2 files of --input, now there are 3"):
        annotate(tmp_path / "out", tmp_path / "web")


def test_a_file_that_changes_between_plan_and_work_is_an_error(tmp_path):
    path = write_rows(tmp_path / "web.jsonl", make_rows(5))
    (job,) = annotation_plan.make_plan(
        annotation_run.OutputFolder(str(tmp_path / "out")),
        work := work_for(tmp_path / "out"),
        find(path),
        1 << 20,
        None,
    ).jobs
    write_rows(path, make_rows(6))
    with pytest.raises(ValueError, match=r"web\.jsonl: it has changed since the run was planned"):
        work.run(job, work.load())


def test_the_input_of_annotations_is_in_their_metadata(tmp_path):
    path = write_rows(tmp_path / "web.parquet", make_rows(5))
    annotate(tmp_path / "out", path)
    told = json.loads(pyarrow.parquet.read_schema(tmp_path / "out/web.parquet").metadata[annotations.METADATA])
    assert told["input"] == annotations.input_facts(find(path)[0])
    assert told["scorers"] == [{"name": "level", "fingerprint": "level-0"}] and SCORER not in told
