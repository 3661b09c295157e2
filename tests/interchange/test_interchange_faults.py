"""Bad input of an import: one line that names file, sequence and value; nothing is left behind."""

import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_runs
import token_files as plain

from safelm import convert_tokens
from safelm.data.store import TokenStore
from safelm.text.tokenizer import Tokenizer

WINDOWS = [np.array([5, 6, 7, 0, 8]), np.array([9, 0, 4, 5, 6]), np.array([4, 4, 4, 0, 0])]


@pytest.fixture
def folder(tmp_path):
    """Three windows as Megatron's files, and a tokenizer."""
    tiny_runs.tokenizer().save(str(tmp_path / "tokenizer"))
    (tmp_path / "in").mkdir()
    plain.write_megatron(tmp_path / "in/web", WINDOWS)
    return tmp_path


def convert(folder, *flags, source="in", target="tokens/web/train"):
    given = [f"--source={folder}/{source}", f"--tokenizer={folder}/tokenizer", f"--target={folder}/{target}"]
    convert_tokens.main(convert_tokens.arguments().parse_args([*given, *flags]))


def truncate(path, count):
    path.write_bytes(path.read_bytes()[:count])


def poke(path, at, layout, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, at, *values)
    path.write_bytes(bytes(data))


def cut_bin(path):
    truncate(path / "web.bin", 28)


def grow_bin(path):
    (path / "web.bin").write_bytes((path / "web.bin").read_bytes() + b"\0\0")


def cut_idx(path):
    truncate(path / "web.idx", 90)


def cut_header(path):
    truncate(path / "web.idx", 20)


def other_count(path):
    poke(path / "web.idx", 18, "<Q", 4)


def float_tokens(path):
    poke(path / "web.idx", 17, "<B", 7)


def other_version(path):
    poke(path / "web.idx", 9, "<Q", 2)


def other_place(path):
    poke(path / "web.idx", 34 + 12 + 8, "<q", 8)


def empty_window(path):
    poke(path / "web.idx", 34 + 4, "<i", 0)


def backward_documents(path):
    poke(path / "web.idx", 34 + 36 + 8, "<q", 3)


def no_bin(path):
    (path / "web.bin").unlink()


def large_id(path):
    poke(path / "web.bin", 2 * 7, "<H", 280)


def few_lengths(path):
    np.save(path / "token_lengths.npy", [5, 5])


def long_length(path):
    np.save(path / "token_lengths.npy", [5, 6, 5])


def float_lengths(path):
    np.save(path / "token_lengths.npy", [5.0, 5.0, 5.0])


def no_npy(path):
    (path / "token_lengths.npy").write_text("5 5 5")


def few_rows(path):
    pa.parquet.write_table(pa.table({"id": ["a", "b"]}), path / "sidecar.parquet")


def no_parquet(path):
    (path / "sidecar.parquet").write_text("a\nb\nc\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_bin, "web.bin: truncated: 28 bytes, the index has 3 sequences of 30 bytes"),
        (grow_bin, "web.bin: longer than its index says: 32 bytes"),
        (cut_idx, "web.idx: 90 bytes, 3 sequences and 4 document places take 102"),
        (cut_header, "web.idx: not a Megatron index: .* cut in its header"),
        (other_count, "web.idx: 102 bytes, 4 sequences and 4 document places take 114"),
        (float_tokens, "web.idx: dtype code 7: tokens have one of 1, 2, 3, 4, 5, 8"),
        (other_version, "web.idx: version 2, this program reads 1"),
        (other_place, "web.idx: sequence 1 is at byte 8 of the .bin; end to end it is at 10"),
        (empty_window, "web.idx: sequence 1 has 0 tokens"),
        (backward_documents, "web.idx: its document places don't increase"),
        (no_bin, "web.bin"),
        (large_id, "web.bin: window 1 has token id 280 at place 2, the vocabulary has 280 ids"),
        (few_lengths, "token_lengths.npy: has 2 lengths, there are 3 windows"),
        (long_length, "token_lengths.npy: window 1 has length 6, it has 5 tokens in .*web.bin"),
        (float_lengths, "token_lengths.npy: numbers of float64, must be integers"),
        (no_npy, "token_lengths.npy: damaged, or no .npy file"),
        (few_rows, "sidecar.parquet: has 2 rows, there are 3 sequences"),
        (no_parquet, "sidecar.parquet: damaged, or no Parquet file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_files_are_named_and_nothing_is_left(folder, damage, message):
    damage(folder / "in")
    with pytest.raises((ValueError, OSError), match=message):
        convert(folder, "--unit=window")
    assert not list((folder / "tokens").rglob("*.npy")) if (folder / "tokens").exists() else True
    assert not (folder / "tokens/web/train").exists()


def test_a_document_without_its_end_is_named(folder):
    plain.write_megatron(folder / "in/web", [np.array([5, 6, 0]), np.array([5, 2])])
    with pytest.raises(ValueError, match=r"web.bin: document 1 ends with id 2 '<\|im_end\|>', not with .*endoftext"):
        convert(folder, "--unit=document")
    with pytest.raises(ValueError, match=r"web.bin: document 0 ends with id 0 '<\|endoftext\|>', not with .*im_end"):
        convert(folder, "--unit=document", "--document_end=<|im_end|>")


def test_windows_of_another_end_of_document_are_refused(folder):
    plain.write_megatron(folder / "in/web", [np.array([5, 6, 2, 7]), np.array([5, 2, 4, 2])])
    message = r"no token is the end of document '<\|endoftext\|>' \(id 0\), 3 are '<\|im_end\|>' \(id 2\)"
    with pytest.raises(ValueError, match=message):
        convert(folder, "--unit=window")
    convert(folder, "--unit=window", "--document_end=<|im_end|>")
    manifest = TokenStore.open(folder / "tokens/web/train").manifest
    assert manifest.eos_id == 2 and manifest.extra["settings"]["document_end"] == "<|im_end|>"
    with pytest.raises(ValueError, match=r"end of document '<x>' is no special token"):
        convert(folder, "--unit=window", "--document_end=<x>", target="other/train")


def test_an_export_is_taken_back_only_as_it_was(folder):
    convert(folder, "--unit=window")
    given = ["--source", f"{folder}/tokens/web/train", "--to=megatron", f"--target={folder}/out"]
    convert_tokens.main(convert_tokens.arguments().parse_args(given))
    other = Tokenizer.train(["another vocabulary of other words"] * 9, 280)
    other.save(str(folder / "other"))
    with pytest.raises(ValueError, match=r"was written with vocabulary"):
        convert(folder, f"--tokenizer={folder}/other", source="out", target="again")
    with pytest.raises(ValueError, match=r"was written with unit window, asked for is document"):
        convert(folder, "--unit=document", source="out", target="again")
    with pytest.raises(ValueError, match=r"was written with end of document 0, asked for is 2"):
        convert(folder, "--document_end=<|im_end|>", source="out", target="again")
    poke(folder / "out/tokens.bin", 2, "<H", 9)
    with pytest.raises(ValueError, match=r"tokens.bin: damaged: its SHA-256"):
        convert(folder, source="out", target="again")
    truncate(folder / "out/tokens.bin", 6)
    with pytest.raises(ValueError, match=r"tokens.bin: truncated: 6 bytes, manifest.json says 30"):
        convert(folder, source="out", target="again")
    (folder / "out/tokens.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens.bin: missing"):
        convert(folder, source="out", target="again")
    assert not (folder / "again").exists()


def test_datatrove_files_that_contradict_each_other(folder):
    place = folder / "ds"
    place.mkdir()
    plain.write_datatrove(place / "a.ds", WINDOWS)
    for damage, message in (
        (lambda: truncate(place / "a.ds", 28), "a.ds: 28 bytes, its metadata says 15 tokens of 2 bytes"),
        (lambda: truncate(place / "a.ds.index", 20), "a.ds.index: 20 bytes: not a list of uint64"),
        (lambda: poke(place / "a.ds.index", 8, "<Q", 4), "a.ds.index: document 1 ends at token 4 and begins at 5"),
        (lambda: truncate(place / "a.ds.index", 16), "a.ds: longer than its index says: 30 bytes"),
        (lambda: (place / "a.ds.metadata").write_text("a|3\n15\n"), "a.ds.metadata: its lines must be"),
    ):
        plain.write_datatrove(place / "a.ds", WINDOWS)
        damage()
        with pytest.raises(ValueError, match=message):
            convert(folder, "--unit=window", source="ds")


@pytest.mark.parametrize(
    ("column", "name", "message"),
    [
        ([[5, 0], [6, None, 0]], "input_ids", "a.parquet: column 'input_ids' has nulls"),
        ([[5, 0], None], "input_ids", "a.parquet: column 'input_ids' has nulls, row 1"),
        ([["a"], ["b"]], "input_ids", "a.parquet: column 'input_ids' is .*, no ids"),
        ([5, 0], "input_ids", "a.parquet: column 'input_ids' is int64, no ids"),
        ([[5, 0], []], "input_ids", "a.parquet: document 1 has no tokens"),
        ([[5, 0], [6, -1, 0]], "input_ids", "a.parquet: document 1 has token id -1 at place 1"),
        ([[5, 0], [0]], "tokens", "a.parquet: no column 'input_ids': it has tokens, .*--ids_column"),
    ],
)
def test_tables_without_ids(folder, column, name, message):
    (folder / "table").mkdir()
    weights = pa.array([[1.0] * len(row) if isinstance(row, list) else [] for row in column])
    pa.parquet.write_table(pa.table({name: column, "loss_weight": weights}), folder / "table/a.parquet")
    with pytest.raises(ValueError, match=message):
        convert(folder, "--unit=document", source="table")


def test_numbers_that_a_channel_refuses_name_file_and_sequence(folder):
    (folder / "table").mkdir()
    weights = [[1.0, 1.0], [1.0, float("nan"), 1.0]]
    table = pa.table({"input_ids": [[5, 0], [6, 7, 0]], "loss_weight": weights})
    pa.parquet.write_table(table, folder / "table/a.parquet")
    with pytest.raises(ValueError, match=r"table/a\.parquet: sequence 1: loss_weight\[1\] is nan, must be"):
        convert(folder, "--unit=document", source="table")


def test_a_source_without_sequences_is_named_before_anything_is_written(folder):
    (folder / "table").mkdir()
    empty = pa.table({"input_ids": pa.array([], pa.list_(pa.int32()))})
    pa.parquet.write_table(empty, folder / "table/a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no documents in 1 files"):
        convert(folder, "--unit=document", source="table")
    assert not list((folder / "tokens").rglob("*.npy"))


def test_flags_that_do_not_go_together(folder):
    plain.write_megatron(folder / "in/more", WINDOWS)
    for flags, message in (
        ([], "--source=.*: holds 2 .idx files: name one"),
        (["--to=megatron"], "--to=megatron: .* is no token store"),
        (["--shard_tokens=0"], "--shard_tokens=0"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(folder, "--unit=window", *flags)
    (folder / "in/more.idx").unlink()
    with pytest.raises(ValueError, match=r"--unit: is each sequence of .* a document or a window"):
        convert(folder)
    with pytest.raises(ValueError, match=r"--lengths=x.npy: only windows are padded"):
        convert(folder, "--unit=document", "--lengths=x.npy")
    with pytest.raises(FileNotFoundError, match=r"nothere: no such file"):
        convert(folder, "--unit=window", source="nothere")
    with pytest.raises(ValueError, match=r"holds no token store"):
        convert(folder, "--unit=window", source="tokenizer")
    convert(folder, "--unit=window")
    with pytest.raises(FileExistsError, match=r"exists already; nothing was written"):
        convert(folder, "--unit=window")
    with pytest.raises(ValueError, match=r"--to: .* is a token store: give one of megatron, datatrove, datasets"):
        convert(folder, source="tokens/web/train", target="out")
    (folder / "tokens/web/train/manifest.json").write_text(json.dumps({"shards": []}))
    with pytest.raises(ValueError, match=r"unreadable manifest"):
        convert(folder, "--to=megatron", source="tokens/web/train", target="out")
