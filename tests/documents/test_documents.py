"""Files of documents: what an input names, and rows with every column, malformed ones reported, whatever the bytes."""

import json
import re

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from document_files import write_rows

from safelm import documents
from safelm.documents import Part, iter_json, iter_parquet, json_lines, lines_before, list_files, read_rows
from safelm.io import remote

ROWS = [
    {"id": "a", "text": "One.", "meta": {"tags": ["x", None], "n": None}, "score": 1.5},
    {"id": "b", "text": "", "meta": {"tags": [], "n": 3}, "score": None},
    {"id": "c", "text": "Zwei\r\nLines \x00 \ufffd", "meta": {"tags": ["y"], "n": 1}, "score": 0.25},
]


def write(path, rows=ROWS):
    return str(write_rows(path, rows, row_group_size=None))


@pytest.mark.parametrize("suffix", documents.SUFFIXES)
def test_every_format_gives_whole_rows_with_their_numbers(tmp_path, suffix):
    path = write(tmp_path / f"web{suffix}")
    assert list(read_rows(path)) == list(enumerate(ROWS, 1))
    assert list(read_rows(path, ["id"])) == [(i, {"id": r["id"], "text": r["text"]}) for i, r in enumerate(ROWS, 1)]
    assert [row for _, row in read_rows(path, ["score"], text_column=None)] == [{"score": r["score"]} for r in ROWS]


@pytest.mark.parametrize("suffix", documents.SUFFIXES)
def test_a_file_without_a_text_column_names_those_there_are(tmp_path, suffix):
    path = write(tmp_path / f"web{suffix}", [{"id": "a", "body": "x"}] * 300)
    with pytest.raises(ValueError, match=r"web\.\S+: missing column 'text'; it has body, id"):
        list(read_rows(path, on_malformed=lambda malformed: None))


def test_malformed_json_rows_are_reported_with_number_and_reason(tmp_path):
    secret = "abstract words"
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"text": "first, after a byte order mark"}).encode(),
        b"",
        b'{"text": "' + secret.encode() + b'", ',
        b'["text"]',
        b'{"id": 4}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "\\ud800 ' + secret.encode() + b'"}',
        b'{"text": "\xff\xfe"}',
        b"[" * 100_000,
        b"\x00\x00\x00{",
        json.dumps({"text": "x" * 10_000_000}).encode() + b"\r",
        b'{"text": "no line end"}',
    ]
    path = tmp_path / "web.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = []
    rows = list(read_rows(str(path), on_malformed=found.append))
    assert [number for number, _ in rows] == [1, 12, 13]
    assert len(rows[1][1]["text"]) == 10_000_000
    reasons = {malformed.row: malformed.reason for malformed in found}
    assert reasons == {
        3: "not JSON at column 27",
        4: "not an object but list",
        5: "field 'text' is missing or null",
        6: "field 'text' is missing or null",
        7: "field 'text' is not a string but int",
        8: "field 'text' holds half a Unicode pair",
        9: "not UTF-8",
        10: "not JSON: nested too deep",
        11: "not JSON at column 1",
    }
    assert found[6].raw == '{"text": "\\xff\\xfe"}'
    assert not any(secret in repr(malformed) for malformed in found)
    with pytest.raises(ValueError, match=r"web.jsonl: row 3 is malformed: not JSON") as error:
        list(read_rows(str(path)))
    assert secret not in str(error.value)


def test_a_row_longer_than_the_limit_is_malformed_and_the_next_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 1000)
    path = write(tmp_path / "web.jsonl", [{"text": "a"}, {"text": "b" * 5000}, {"text": "c"}])
    found = []
    assert [number for number, _ in read_rows(path, on_malformed=found.append)] == [1, 3]
    assert [(malformed.row, len(malformed.raw)) for malformed in found] == [(2, 1001)]


def test_malformed_parquet_rows_are_reported_and_the_others_kept(tmp_path):
    texts = pyarrow.array([b"good", b"\xff\xfebad", None, b"\xef\xbf\xbd\x00"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, texts.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": text}), tmp_path / "web.parquet")
    found = []
    rows = list(read_rows(str(tmp_path / "web.parquet"), on_malformed=found.append))
    assert rows == [(1, {"id": 1, "text": "good"}), (4, {"id": 4, "text": "\ufffd\x00"})]
    assert [(m.row, m.reason) for m in found] == [(2, "not UTF-8"), (3, "field 'text' is missing or null")]
    assert json.loads(found[0].raw) == {"id": 2, "text": "\\xff\\xfebad"}
    with pytest.raises(ValueError, match=r"column 'id' holds int64, not strings"):
        list(read_rows(str(tmp_path / "web.parquet"), text_column="id"))


@pytest.mark.parametrize("suffix", documents.SUFFIXES)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"web{suffix}"
    write(path, [{"id": str(i), "text": f"{i * 7919} words"} for i in range(3000)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises((ValueError, OSError), match=rf"web{suffix}"):
        for _ in read_rows(str(path)):
            pass


def test_parts_of_a_file_hold_every_row_once(tmp_path):
    rows = [{"id": i, "text": "word " * (i % 7)} for i in range(200)]
    path = write(tmp_path / "web.jsonl", rows)
    size = (tmp_path / "web.jsonl").stat().st_size
    for step in (1, 17, 40, 1000, size):
        found = []
        for start in range(0, size, step):
            before = lines_before(path, start)
            for row in iter_json(path, pytest.fail, text_column="text", part=Part(start, min(start + step, size))):
                found.append((before + row.number, row.row))
        assert found == list(enumerate(rows, 1))

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "web.parquet", row_group_size=30)
    found = []
    for groups in (Part(0, 2), Part(2, 3), Part(3, 7)):
        for first, batch in iter_parquet(str(tmp_path / "web.parquet"), None, text_column="text", groups=groups):
            found += list(enumerate(batch.to_pylist(), first))
    assert found == list(enumerate(rows, 1))


def test_an_input_names_files_folders_and_patterns_here_and_behind_urls(tmp_path, monkeypatch):
    for name in ("web/a.jsonl", "web/sub/b.parquet", "web/_shards/c.jsonl", "web/notes.txt", "web/.d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name) if name.endswith(("jsonl", "parquet")) else (tmp_path / name).write_text("x")
    folder = tmp_path / "web"
    both = [f"{folder}/a.jsonl", f"{folder}/sub/b.parquet"]
    assert list_files(str(folder)) == both
    assert list_files([f"{folder}/sub/*.parquet", str(folder), both[0]]) == both
    assert list_files(f"{folder}/_shards/*.jsonl") == [f"{folder}/_shards/c.jsonl"]
    assert list_files(f"{folder}/**/*.*") == both
    odd = write(tmp_path / "part[1].jsonl")
    assert list_files(str(odd)) == [str(odd)]
    monkeypatch.chdir(tmp_path)
    assert list_files("web") == ["web/a.jsonl", "web/sub/b.parquet"]
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/documents_web", recursive=True)
    try:
        assert list_files("memory://documents_web") == [f"memory:///documents_web{f[len(str(folder)) :]}" for f in both]
        assert len(list(read_rows("memory://documents_web/a.jsonl"))) == len(ROWS)
        assert remote.is_remote(list_files("memory://documents_web/*.jsonl")[0])
    finally:
        memory.rm("/documents_web", recursive=True)


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "none: no such file"),
        ("none/*.jsonl", r"none/\*.jsonl: no such file"),
        ("notes.txt", "notes.txt: not a file this can read"),
        ("empty", "empty: no file there ends in"),
    ],
)
def test_an_input_that_names_nothing_is_an_error(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        list_files(str(tmp_path / name))
    with pytest.raises(ValueError, match="no input is named"):
        list_files([])


def test_files_of_an_input_that_are_not_read_are_named(tmp_path, caplog):
    folder = tmp_path / "web"
    for name in ("a.json", "b.csv", "c.txt", "sub/d.csv", "README.md", "_log/e.csv", ".f.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[]")
    named = r"4 files there aren't read: a.json, b.csv, c.txt and 1 more; .json is read where an input names it"
    with pytest.raises(FileNotFoundError, match=rf"no file there ends in (?![^;]*\.json, ).*; {named}"):
        list_files(str(folder))
    read = write(folder / "g.jsonl")
    for pattern in (folder, f"{folder}/**/*"):
        caplog.clear()
        assert list_files(str(pattern)) == [read]
        (line,) = caplog.messages
        assert re.search(named, line)
    caplog.clear()
    assert list_files(f"{folder}/*.jsonl") == [read] and not caplog.messages
    documents.declare_no_documents(str(folder / "sub"), "safelm.test")  # a folder of ours: it says what is in it
    assert list_files(str(folder)) == [read] and "3 files there aren't read" in caplog.text
    caplog.clear()
    (folder / "train-1.csv").write_text("")
    assert documents.find_named(str(folder), ["g*", "train-*"]) == [read]
    assert "1 file there isn't read: train-1.csv" in caplog.text


def test_a_file_is_described_by_its_size_and_content(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate([ROWS, ROWS, ROWS[::-1]])]
    first, same, other = (documents.describe(file) | {"path": ""} for file in documents.find(paths))
    assert first == same != other
