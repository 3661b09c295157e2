"""Odd, damaged and hostile files of documents: nothing is lost without a word, nothing is held or waited for."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import os
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from annotation_runs import annotate
from document_files import PACK, write_rows
from scoring_runs import score_one

from data_tasks.readers import MalformedLimit, ReadReport, WebDocuments, read_documents
from data_tasks.sources import WebDocumentSource
from safelm import documents, generate, train_tokenizer
from safelm.documents import annotations, files, json_arrays, json_lines, opening, tables
from safelm.jobs.file_shards import ShardJob
from safelm.safety.report_card.counting import CountSettings, Piece, count_piece
from safelm.safety.scoring import annotation_rows, joining
from safelm.safety.synthesis.sources import Selection, ShardRows
from safelm.selection import reading as selection_reading

LINES = b"".join(json.dumps({"id": str(i), "text": f"Page {i}."}).encode() + b"\n" for i in range(50))


def pages(path, **flags):
    return [row for _, row in documents.read_rows(str(path), **flags)]


def used_by_tasks(path, **arguments):
    return list(read_documents(str(path), limit=MalformedLimit(), report=ReadReport(), **arguments))


def sources(path):
    selection = Selection("safeweb", (1, 2, 3))
    return [source for _, source in ShardRows(ShardJob(0, "train-0", str(path)), selection).sources()]


# ---- dates


def odd_dates():
    far = 10**12
    columns = {
        "far": pyarrow.array([far, 0], pyarrow.timestamp("s")),
        "year 0": pyarrow.array([-62_167_219_200, 0], pyarrow.timestamp("s", "UTC")),
        "nanoseconds": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        "date64": pyarrow.array([86_400_000 * 4_000_000, 0], pyarrow.date64()),
        "date32": pyarrow.array([-800_000, 3], pyarrow.date32()),
        "duration": pyarrow.array([2**50, 0], pyarrow.duration("s")),
    }
    nested = pyarrow.StructArray.from_arrays([columns["far"], pyarrow.array(["en", None])], ["date", "language"])
    listed = pyarrow.ListArray.from_arrays([0, 1, 2], columns["nanoseconds"])
    return pyarrow.table(
        {
            "id": ["a", "b"],
            "text": ["A level1 page.", "A level2 page."],
            "harm_level": [1, 2],
            "harm": pyarrow.array([1, 2]),
            **columns,
            "metadata": nested,
            "listed": listed,
        }
    )


def test_dates_that_python_does_not_have_stop_no_command(tmp_path):
    path = tmp_path / "web.parquet"
    table = odd_dates()
    pyarrow.parquet.write_table(table.append_column("harm_score", table["harm_level"]), path)
    assert [document.id for document in used_by_tasks(path, needs_score=True)] == ["a", "b"]
    assert count_piece(Piece(None, str(path), 1), CountSettings())[0].score_columns == {"harm_score": 2}
    assert [source.harm_score for source in sources(path)] == [1, 2]
    row = pages(path)[0]
    assert row["metadata"]["language"] == "en" and isinstance(row["far"], str)
    assert row["year 0"].startswith("0000-01-01") and str(row["nanoseconds"]).endswith(".000000001")
    json.dumps(row["listed"], default=str)


def test_columns_that_are_passed_on_come_out_as_they_went_in(tmp_path):
    table = odd_dates()
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet")
    score_one(tmp_path / "out", tmp_path / "web.parquet")
    for level in (1, 2):
        (path,) = (tmp_path / "out" / f"score={level}").iterdir()
        found = pyarrow.parquet.read_table(path, partitioning=None)
        given = pyarrow.parquet.read_table(tmp_path / "web.parquet").slice(level - 1, 1)
        assert found.select(given.schema.names).combine_chunks().equals(given.combine_chunks())


def test_int96_dates_behind_2262_keep_their_year(tmp_path):
    dates = [datetime.datetime(2600, 5, 6, 7, 8, 9, 123456), datetime.datetime(1500, 1, 2), None]
    table = pyarrow.table({"id": ["a", "b", "c"], "text": ["A level1 page."] * 3, "date": pyarrow.array(dates)})
    path = tmp_path / "web.parquet"
    pyarrow.parquet.write_table(table, path, use_deprecated_int96_timestamps=True)
    assert pyarrow.parquet.ParquetFile(path).schema.column(2).physical_type == "INT96"
    assert [row["date"] for row in pages(path)] == dates
    score_one(tmp_path / "out", path)
    (scored,) = (tmp_path / "out" / "score=1").iterdir()
    assert [row["date"] for row in pages(scored)] == dates


# ---- bytes that are no UTF-8


def broken(kind):
    raw = pyarrow.array([b"fine words", b"bad \xff words"], pyarrow.large_binary())
    if kind == pyarrow.large_string():
        return pyarrow.Array.from_buffers(kind, 2, raw.buffers())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.cast(pyarrow.binary()).buffers())
    if pyarrow.types.is_dictionary(kind):
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1], pyarrow.int32()), text, safe=False)
    return text


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")])
def test_the_quarantine_keeps_the_bytes_of_a_text_that_is_not_utf8(tmp_path, kind):
    column = broken(kind)
    nested = pyarrow.StructArray.from_arrays([column], ["inner"])
    table = pyarrow.table({"id": ["1", "2"], "text": column, "more": nested})
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet")
    score_one(tmp_path / "out", tmp_path / "web.parquet")
    (path,) = (tmp_path / "out" / "quarantine").iterdir()
    raws = [json.loads(path.read_text())["raw"]]
    assert [d.id for d in used_by_tasks(tmp_path / "web.parquet", quarantine=str(tmp_path / "q"))] == ["1"]
    raws.append(json.loads((tmp_path / "q").read_text())["raw"])
    assert json.loads(raws[0])["more"] == {"inner": "bad \\xff words"}
    assert [json.loads(raw)["text"] for raw in raws] == ["bad \\xff words"] * 2


# ---- packed files


@pytest.mark.parametrize("name", ["a.json.gz", "a.json.zst", "a.jsonl.gz", "a.jsonl", "a.json", "a.ndjson.bz2"])
@pytest.mark.parametrize("pack", [bytes, *dict.fromkeys(PACK.values())])
def test_what_a_file_is_packed_with_is_decided_by_its_content(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(b"\xef\xbb\xbf" + LINES))
    assert [row["id"] for row in pages(path)] == [str(i) for i in range(50)]
    assert len(used_by_tasks(path)) == 50
    counts = train_tokenizer.CorpusCounts()
    assert len(list(train_tokenizer.read_texts([str(path)], "text", counts))) == 50 and not counts.malformed


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
@pytest.mark.parametrize("part", [0, 1])
def test_a_damaged_stream_is_an_error_that_names_the_file_wherever_it_is_read(tmp_path, pack, part):
    packed, path = pack(LINES), tmp_path / "web.json.xz"
    readers = [
        lambda: list(json_lines.iter_json(str(path), pytest.fail, text_column="text")),
        lambda: list(tables.iter_tsv(str(path), lambda malformed: None)),
        lambda: json_arrays.is_array(str(path)),
        lambda: opening.read_text(str(path)),
    ]
    for place in (1, len(packed) // 2):
        damaged = bytearray(packed * (part + 1))
        damaged[part * len(packed) + place] ^= 0x55
        path.write_bytes(bytes(damaged))
        if (part, place) == (0, 1):
            continue  # not packed, as its beginning says
        for read in readers:
            with pytest.raises(ValueError, match=r"web.json.xz: "):
                read()
    path.write_bytes(packed + bytes(8) + packed)  # padding
    assert len(opening.read_text(str(path))) == 2 * len(LINES)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_json_array_gives_the_rows_of_the_same_lines_to_every_command(tmp_path, end):
    rows = [{"id": str(i), "text": f"Page level{i}, \u00fc\u2028.", "harm_score": i} for i in (1, 2, 3)]
    lines = write_rows(tmp_path / "lines.jsonl", [*rows, {"id": "no text"}, 5])
    array = tmp_path / f"array.json{end}"
    array.write_bytes(PACK.get(end, bytes)(json.dumps([*rows, {"id": "no text"}, 5], indent=1).encode()))

    def everything(path, output):
        bad = []
        blocks = annotation_rows.read(str(path), None, "text", "id", 9, bad.append)
        counted, _ = count_piece(Piece(None, str(path), 1), CountSettings(top=0))
        annotate(output / "notes", path)
        joining.join_file(str(path), annotations.parse(f"own={output / 'notes'}"), str(output / "joined"))
        shard = ShardJob(0, "train-0", str(path))
        return {
            "read_rows": [row for _, row in documents.read_rows(str(path), on_malformed=bad.append)],
            "annotations": [(block.row_N.tolist(), block.texts, block.ids.to_pylist()) for block in blocks],
            "report card": counted.to_json(),
            "synthesize": [(source.id, source.text, source.harm_score) for source in sources(path)],
            "select": [(number, json.loads(line)) for number, line in selection_reading.lines(shard)],
            "select, measured": list(selection_reading.values(shard, "text", ["id"], {}, bad.append)),
            "joined": [json.loads(line) for line in gzip.open(output / "joined")],
            "malformed": [(each.row, each.reason) for each in bad],
            "tasks": [document.id for document in used_by_tasks(path)],
        }

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    found, wanted = everything(array, tmp_path / "a"), everything(lines, tmp_path / "b")
    assert found == wanted
    assert len(found["read_rows"]) == 3 and found["malformed"][0] == (4, "field 'text' is missing or null")

    unscored = [{name: row[name] for name in ("id", "text")} for row in rows]
    array.write_bytes(PACK.get(end, bytes)(json.dumps(unscored, indent=1).encode()))
    assert score_one(tmp_path / "scored", array)["rows"] == 3


def test_rows_of_a_file_that_is_left_out_for_want_of_the_column_are_not_malformed(tmp_path, caplog):
    files = [write_rows(tmp_path / "chats.jsonl", [{"messages": [i]} for i in range(30)])]
    files.append(write_rows(tmp_path / "web.jsonl", [{"text": "a page"}, {"text": 3}, {"text": "another"}]))
    counts = train_tokenizer.CorpusCounts()
    read = train_tokenizer.read_texts([str(path) for path in files], "text", counts)
    assert (list(read), counts.malformed) == (["a page", "another"], 1)
    assert [line.partition(f"{tmp_path}/")[0::2] for line in caplog.messages] == [
        ("skipped ", "web.jsonl row 2: field 'text' is not a string but int"),
        ("left out: ", "chats.jsonl: missing column 'text'; it has messages"),
    ]


def test_prompts_behind_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b\xe2\x80\xa8c", "n": 1}')
    assert generate.read_prompts(str(path)) == [{"prompt": "a"}, {"prompt": "b\u2028c", "n": 1}]


@pytest.mark.parametrize("end", PACK)
def test_a_packed_file_that_is_cut_short_is_an_error_wherever_it_is_cut(tmp_path, end):
    whole = PACK[end](LINES)
    path = tmp_path / f"a.jsonl{end}"
    for size in {1, 7, len(whole) // 2, len(whole) - 9, len(whole) - 1}:
        path.write_bytes(whole[:size])
        found = []
        try:
            pages(path, on_malformed=found.append)
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
        else:
            assert found, size  # too short to be known as packed: no JSON


def test_zstd_of_several_frames_and_of_a_window_beyond_128_mb(tmp_path):
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=wide).stream_writer(buffer, closefd=False) as file:
        file.write(LINES)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00note"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable + buffer.getvalue() + zstandard.compress(LINES) + skippable)
    assert len(pages(path)) == 100


def test_a_large_file_that_is_packed_behind_a_plain_name_is_never_cut(tmp_path):
    from safelm.jobs.file_shards import split

    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(LINES * 40, compresslevel=0))
    (file,) = documents.find(str(path))
    assert split(file, 1000) == [None]


# ---- long lines and many keys


def test_a_line_of_any_length_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 100_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * 30_000_000 + b'"}\n' + LINES, compresslevel=1))
    counts = train_tokenizer.CorpusCounts()
    for read in (used_by_tasks, lambda path: list(train_tokenizer.read_texts([path], "text", counts))):
        tracemalloc.start()
        assert len(read(str(path))) == 50
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 5_000_000


def test_keys_that_are_others_in_every_row_do_not_add_up(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for i in range(150):
            keys = {f"key-{i}-{j}": j for j in range(200)}
            file.write(json.dumps({"id": str(i), "text": "x", **keys}) + "\n")
    tracemalloc.start()
    assert len(used_by_tasks(path)) == 150
    assert count_piece(Piece(None, str(path), 1), CountSettings())[0].rows == 150
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2_000_000
    with pytest.raises(ValueError, match="missing column 'body'") as error:
        pages(path, text_column="body", on_malformed=lambda malformed: None)
    assert len(str(error.value)) < 2000


# ---- what is no file, and names with the characters of patterns


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "train-0.jsonl").write_bytes(LINES)
    os.mkfifo(tmp_path / "web" / "train-1.jsonl")
    os.symlink("/dev/zero", tmp_path / "train-2.jsonl")
    for place in (tmp_path / "web", tmp_path / "web" / "*.jsonl", tmp_path / "web" / "train-1.jsonl"):
        with pytest.raises(ValueError, match=r"train-1.jsonl: not a file but a pipe"):
            documents.find(str(place))
    with pytest.raises(ValueError, match=r"train-1.jsonl: not a file but a pipe"):
        WebDocumentSource(str(tmp_path / "web")).list_shards("train")
    for read in (pages, used_by_tasks):
        with pytest.raises(ValueError, match=r"train-2.jsonl: not a file but a device"):
            read(tmp_path / "train-2.jsonl")


def test_folders_that_all_link_to_each_other_are_an_error_and_no_endless_search(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_NAMES", 20)
    folders = [tmp_path / name for name in "abcdef"]
    for folder in folders:
        folder.mkdir()
        (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folders[0] / "b").symlink_to(folders[1])
    assert len(documents.find(str(tmp_path))) == len(folders)
    for folder in folders:
        for other in folders:
            if other != folder and not (folder / other.name).exists():
                (folder / other.name).symlink_to(other)
    with pytest.raises(OSError, match="links lead there in more than 20 ways"):
        documents.find(str(tmp_path))


def test_links_are_followed_and_one_to_nothing_is_an_error(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blob").write_bytes(LINES)
    (tmp_path / "web" / "deep").mkdir(parents=True)
    os.symlink(tmp_path / "store" / "blob", tmp_path / "web" / "train-0.jsonl")
    os.symlink(tmp_path / "web", tmp_path / "web" / "deep" / "round")
    assert documents.list_files(str(tmp_path / "web")) == [str(tmp_path / "web" / "train-0.jsonl")]
    assert WebDocumentSource(str(tmp_path / "web")).list_shards("train") == [str(tmp_path / "web" / "train-0.jsonl")]
    os.remove(tmp_path / "store" / "blob")
    with pytest.raises(FileNotFoundError, match=r"train-0.jsonl"):
        documents.find(str(tmp_path / "web"))


@pytest.mark.parametrize("link", ["0-first", "latest", ".hidden"])
def test_a_linked_folder_takes_no_file_away_and_gives_none_twice(tmp_path, link):
    for name in ("2024-01", "2024-02", ".store"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-0.jsonl").write_bytes(LINES)
    os.symlink("2024-02", tmp_path / link)
    months = [str(tmp_path / name / "train-0.jsonl") for name in ("2024-01", "2024-02")]
    assert documents.list_files(f"{tmp_path}/2024-*/*.jsonl") == months
    assert documents.list_files(f"{tmp_path}/**/*.jsonl") == documents.list_files(str(tmp_path)) == months
    assert WebDocumentSource(str(tmp_path)).list_shards("train") == months
    if not link.startswith("."):
        assert documents.list_files(f"{tmp_path}/{link[:2]}*/*.jsonl") == [str(tmp_path / link / "train-0.jsonl")]
    os.symlink(".store", tmp_path / "web")
    assert documents.list_files(str(tmp_path)) == [*months, str(tmp_path / "web" / "train-0.jsonl")]


@pytest.mark.parametrize(("own", "neighbour"), [("web[1]", "web1"), ("web*", "web-of-others"), ("web?", "webs")])
def test_a_name_that_is_there_is_no_pattern(tmp_path, own, neighbour):
    for folder in (own, neighbour):
        (tmp_path / folder / "raw_web").mkdir(parents=True)
        (tmp_path / folder / "raw_web" / "train-0.jsonl").write_text(json.dumps({"id": folder, "text": "x"}))
    wanted = [str(tmp_path / own / "raw_web" / "train-0.jsonl")]
    for place in ("", "/raw_web", "/raw_web/train-0.jsonl", "/raw_web/*.jsonl", "/**/*.jsonl"):
        assert documents.list_files(f"{tmp_path / own}{place}") == wanted
    assert WebDocumentSource(str(tmp_path / own / "raw_web")).list_shards("train") == wanted
    both = [str(tmp_path / folder / "raw_web" / "train-0.jsonl") for folder in sorted((own, neighbour))]
    assert documents.list_files(f"{tmp_path}/web*/**/*.jsonl") == (wanted if own == "web*" else both)


def test_a_plain_json_file_is_taken_only_where_it_is_named(tmp_path):
    (tmp_path / "manifest.json").write_bytes(LINES)
    (tmp_path / "c4-train.00000-of-00001.json.gz").write_bytes(gzip.compress(LINES))
    packed = [str(tmp_path / "c4-train.00000-of-00001.json.gz")]
    assert documents.list_files(str(tmp_path)) == documents.list_files(f"{tmp_path}/*") == packed
    assert WebDocumentSource(str(tmp_path)).list_shards("train") == packed
    for place in ("manifest.json", "*.json"):
        assert documents.list_files(f"{tmp_path}/{place}") == [str(tmp_path / "manifest.json")]


# ---- damage


def flipped_footers(path, step=1):
    """The file with each byte (every `step`-th) of its footer changed, in turn: yields the byte's place."""
    whole = path.read_bytes()
    for at in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8, step):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        yield at
    path.write_bytes(whole)


def test_no_flipped_bit_of_a_parquet_footer_loses_rows_without_a_word(tmp_path):
    path = tmp_path / "web.parquet"
    table = pyarrow.table({"text": [f"page {i}" for i in range(60)]})
    pyarrow.parquet.write_table(table, path, row_group_size=30, write_statistics=False, store_schema=False)
    for at in flipped_footers(path):
        found = []
        try:
            rows = pages(path, on_malformed=found.append)
        except (ValueError, OSError):
            continue
        assert len(rows) + len(found) == 60, at


def test_facts_of_a_damaged_footer_are_errors_and_never_end_the_process(tmp_path):
    path = tmp_path / "web.parquet"
    table = pyarrow.table({"id": ["a", None] * 20, "text": [f"page {i}" for i in range(40)]})
    pyarrow.parquet.write_table(table, path, row_group_size=20, compression="zstd")

    def facts():
        return [
            documents.codec_of(str(path)),
            *(documents.may_be_null(str(path), name) for name in ("id", "text", "x")),
        ]

    assert facts() == ["zstd", True, False, True]
    raised = 0
    for at in flipped_footers(path):
        try:
            codec, *are_null = facts()
        except ValueError as error:
            raised += 1
            assert "web.parquet" in str(error), at
        else:
            assert codec in ("none", "snappy", "gzip", "lzo", "brotli", "lz4", "zstd"), at
            assert {type(each) for each in are_null} == {bool}, at
    assert raised


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
def test_a_codec_is_known_by_pyarrows_name(codec, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "web.parquet", compression=codec)
    assert documents.codec_of(str(tmp_path / "web.parquet")) == codec


def test_a_row_group_with_fewer_rows_than_the_footer_says_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "web.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 20}), path, row_group_size=10)
    read = pyarrow.parquet.ParquetFile.iter_batches

    def short(self, rows, groups, **flags):
        for batch in read(self, rows, groups, **flags):
            yield batch.slice(0, batch.num_rows - (groups == [1]))

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", short)
    for reading in (pages, used_by_tasks):
        with pytest.raises(ValueError, match=r"web.parquet: damaged: row group 1 gave 9 rows, the file says 10"):
            reading(path)


# ---- rows without an id


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_without_an_id_has_the_same_one_for_every_command_and_keeps_it(tmp_path, form):
    rows = [{"text": f"A level{i} page.", "harm_score": i} for i in (1, 2, 3)]
    for name, some in (("web", rows), ("unscored", [{"text": row["text"]} for row in rows])):
        write_rows(tmp_path / f"{name}.{form}", some)
    wanted = [documents.content_id(row["text"]) for row in rows]
    assert [document.id for document in used_by_tasks(tmp_path / f"web.{form}")] == wanted
    assert [source.id for source in sources(tmp_path / f"web.{form}")] == wanted
    selection = Selection("safeweb", (1, 2, 3))
    census = ShardRows(ShardJob(0, "train-0", str(tmp_path / f"web.{form}")), selection).ids()
    assert [identity for _, identity in census] == wanted
    score_one(tmp_path / "out", tmp_path / f"unscored.{form}")
    scored = [row for path in documents.list_files(f"{tmp_path}/out/score=*/*") for row in pages(path)]
    assert [(row["id"], row["harm_score"]) for row in scored] == list(zip(wanted, (1, 2, 3), strict=True))
    named = WebDocuments(id_column="key")
    with pytest.raises(ValueError, match="missing column 'key'"):
        used_by_tasks(tmp_path / f"web.{form}", row_format=named)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_ids_that_are_null_or_blank_are_filled_and_others_stay(tmp_path, form):
    rows = [{"id": each, "text": f"A level1 page {i}.", "n": i} for i, each in enumerate(["own", None, " "])]
    path = write_rows(tmp_path / f"web.{form}", rows)
    score_one(tmp_path / "out", path)
    (scored,) = (tmp_path / "out" / "score=1").iterdir()
    wanted = ["own", *(documents.content_id(row["text"]) for row in rows[1:])]
    assert [(row["id"], row["n"]) for row in pages(scored)] == list(zip(wanted, range(3), strict=True))


@pytest.mark.parametrize(
    ("own", "reason"), [("\ud800", "half a Unicode pair"), ([1], "list"), (True, "bool"), (1.5, "float")]
)
def test_an_id_that_can_not_be_written_makes_its_row_malformed(tmp_path, own, reason):
    path = tmp_path / "web.jsonl"
    path.write_text(json.dumps({"id": own, "text": "A level1 page.", "harm_score": 1}) + "\n")
    quarantine = tmp_path / "q"
    assert not used_by_tasks(path, quarantine=str(quarantine)) and reason in quarantine.read_text()
    assert count_piece(Piece(None, str(path), 1), CountSettings())[0].malformed.total() == 1
    assert not sources(path)
    path.write_text(json.dumps({"id": own, "text": "A level1 page."}) + "\n")
    assert score_one(tmp_path / "out", path)["folders"]["quarantine"] == 1
