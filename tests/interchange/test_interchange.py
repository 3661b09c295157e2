"""Token stores to and from other programs' files: every sequence as it was, read by independent readers too."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import side_files
import tiny_runs
import token_files as plain
import token_stores

from safelm import convert_tokens, documents
from safelm.data.channels import CHANNELS, Channel
from safelm.data.store import TokenStore
from safelm.formats import hf_datasets, megatron
from safelm.formats import token_files as blocks
from safelm.interchange import exporting, importing
from safelm.io import files

T, NUM_WINDOWS = 16, 29
LABEL = Channel("label", "int16", "document", -1)
SIGNAL = Channel("signal", "float32", "token", 0.0)


def convert(*flags):
    convert_tokens.main(convert_tokens.arguments().parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_runs.tokenizer().save(str(folder))
    return folder


@pytest.fixture(autouse=True, params=["one block", "many blocks"])
def block_tokens(request, monkeypatch):
    """Files are gone through in blocks; these hold all of them, or one or two sequences."""
    if request.param == "many blocks":
        for module in (blocks, hf_datasets, exporting):
            monkeypatch.setattr(module, "BLOCK_TOKENS", 2 * (T + 1))
        monkeypatch.setattr(blocks, "_SEQUENCES_AT_ONCE", 5)


def windows(seed=0):
    """Packed windows with ends of documents in them, and how much of each is no padding."""
    rng, tokenizer = np.random.default_rng(seed), tiny_runs.tokenizer()
    found = rng.integers(4, tokenizer.vocab_size, (NUM_WINDOWS, T + 1))
    found[rng.random(found.shape) < 0.15] = tokenizer.eos_id
    lengths = np.where(rng.random(NUM_WINDOWS) < 0.5, T + 1, rng.integers(2, T + 2, NUM_WINDOWS))
    return found.astype(np.uint16), lengths


def write_windows(folder: Path):
    """Megatron's files as a user has them, with lengths and a sidecar."""
    folder.mkdir()
    found, lengths = windows()
    plain.write_megatron(folder / "web", list(found))
    np.save(folder / "token_lengths.npy", lengths)
    pa.parquet.write_table(pa.table({"id": [f"w{i}" for i in range(NUM_WINDOWS)]}), folder / "sidecar.parquet")
    return found, lengths


def assert_same_stores(one: Path, two: Path):
    a, b = TokenStore.open(one), TokenStore.open(two)
    assert a.manifest.unit == b.manifest.unit and a.num_documents == b.num_documents and a.channels == b.channels
    for index in range(a.num_documents):
        np.testing.assert_array_equal(a.document(index), b.document(index))
    for channel in a.channels:
        np.testing.assert_array_equal(a.channel(channel.name), b.channel(channel.name))
    for name in ("vocab_hash", "vocab_size", "eos_id", "harm_tag_id", "dtype"):
        assert getattr(a.manifest, name) == getattr(b.manifest, name)
    assert a.manifest.extra["num_document_ends"] == b.manifest.extra["num_document_ends"]


def test_megatron_windows_stay_as_they_are_in_and_out(tmp_path, tokenizer_folder):
    found, lengths = write_windows(tmp_path / "in")
    store = tmp_path / "tokens/web/train"
    convert(f"--source={tmp_path}/in/web.idx", "--unit=window", f"--tokenizer={tokenizer_folder}", f"--target={store}")
    opened = TokenStore.open(store, vocab_hash=tiny_runs.tokenizer().hash)
    assert opened.manifest.unit == "window" and (opened.manifest.task, opened.manifest.split) == ("web", "train")
    assert opened.manifest.extra["settings"]["document_end"] == "<|endoftext|>"
    for index, window in enumerate(found):
        np.testing.assert_array_equal(opened.document(index), window)
    np.testing.assert_array_equal(opened.channel("real_tokens"), lengths)
    weight_NT = opened.channel("loss_weight").reshape(NUM_WINDOWS, T + 1)
    np.testing.assert_array_equal(weight_NT, np.arange(T + 1) < lengths[:, None])
    convert(f"--source={store}", "--to=megatron", f"--target={tmp_path}/out")
    for name, original in (("tokens.bin", "web.bin"), ("tokens.idx", "web.idx")):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / original).read_bytes()
    for name in ("token_lengths.npy", "sidecar.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["document_end"] == {"id": 0, "token": "<|endoftext|>"} and manifest["unit"] == "window"
    with pytest.raises(FileNotFoundError, match=r"no file there holds documents"):
        documents.list_files(str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "tokens"}  # nothing temporary is left
    for written in ("out", "tokens"):
        side_files.assert_only_documents("convert_tokens", tmp_path / written)


@pytest.mark.parametrize("kind", ["megatron", "datatrove", "datasets"])
@pytest.mark.parametrize("shard_tokens", [1 << 20, 3 * T])
def test_there_and_back_is_the_same_store(tmp_path, tokenizer_folder, kind, shard_tokens):
    write_windows(tmp_path / "in")
    common = (f"--tokenizer={tokenizer_folder}", f"--shard_tokens={shard_tokens}")
    convert(f"--source={tmp_path}/in", "--unit=window", *common, f"--target={tmp_path}/a/train")
    assert len(TokenStore.open(tmp_path / "a/train").manifest.shards) == {1 << 20: 1, 3 * T: 15}[shard_tokens]
    convert(f"--source={tmp_path}/a/train", f"--to={kind}", f"--target={tmp_path}/out")
    convert(f"--source={tmp_path}/out", *common, f"--target={tmp_path}/b/train")
    assert_same_stores(tmp_path / "a/train", tmp_path / "b/train")
    sidecars = [(tmp_path / name / "sidecar.parquet").read_bytes() for name in ("in", "out")]
    assert sidecars[0] == sidecars[1] == (tmp_path / "b/train/_sidecar.parquet").read_bytes()


def channel_store(tmp_path):
    """Documents of our own vocabulary with channels of every form, over three shards of which one is empty."""
    tokenizer, rng = tiny_runs.tokenizer(), np.random.default_rng(3)
    texts = [np.append(rng.integers(4, 250, rng.integers(1, 60)), tokenizer.eos_id) for _ in range(2)]
    numbers = [
        {"loss_weight": rng.integers(0, 3, len(text)).astype(np.float32), "label": i, "signal": rng.random(len(text))}
        for i, text in enumerate(texts)
    ]
    token_stores.write_store(
        tmp_path / "mine/train",
        texts,
        num_shards=3,
        vocab_size=280,
        channels=(*CHANNELS, LABEL, SIGNAL),
        numbers=numbers,
    )
    path = tmp_path / "mine/train/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_hash": tokenizer.hash, "extra": {}}))
    return TokenStore.open(tmp_path / "mine/train"), texts


@pytest.mark.parametrize("kind", ["megatron", "datatrove", "datasets"])
def test_channels_come_along(tmp_path, tokenizer_folder, kind):
    store, texts = channel_store(tmp_path)
    convert(f"--source={store.directory}", f"--to={kind}", f"--target={tmp_path}/out")
    convert(f"--source={tmp_path}/out", f"--tokenizer={tokenizer_folder}", f"--target={tmp_path}/again/train")
    again = TokenStore.open(tmp_path / "again/train")
    assert set(again.channels) == set(store.channels) and again.num_documents == len(texts)
    for channel in store.channels:
        np.testing.assert_array_equal(store.channel(channel.name), again.channel(channel.name))


def test_independent_readers_find_the_same_documents(tmp_path):
    store, texts = channel_store(tmp_path)
    for kind in ("megatron", "datatrove", "datasets"):
        convert(f"--source={store.directory}", f"--to={kind}", f"--target={tmp_path}/{kind}")
    found, places = plain.read_megatron(tmp_path / "megatron/tokens")
    assert places == list(range(len(texts) + 1))
    by_datatrove = [
        each for path in sorted((tmp_path / "datatrove").glob("*.ds")) for each in plain.read_datatrove(path)
    ]
    rows = pa.parquet.read_table(tmp_path / "datasets/data").to_pylist()
    by_table = [row["input_ids"] for row in rows]
    assert [row["label"] for row in rows] == list(range(len(texts)))
    assert all(len(row["signal"]) == len(row["input_ids"]) for row in rows)
    for other in (found, by_datatrove, by_table):
        assert len(other) == len(texts)
        for one, two in zip(other, texts, strict=True):
            np.testing.assert_array_equal(one, two)


def test_documents_of_several_sequences_keep_their_places(tmp_path, tokenizer_folder):
    (tmp_path / "in").mkdir()
    found, _ = windows()
    plain.write_megatron(tmp_path / "in/web", list(found), documents=[0, 1, 4, 5, 20, NUM_WINDOWS])
    convert(
        f"--source={tmp_path}/in", "--unit=window", f"--tokenizer={tokenizer_folder}", f"--target={tmp_path}/a/train"
    )
    convert(f"--source={tmp_path}/a/train", "--to=megatron", f"--target={tmp_path}/out")
    assert (tmp_path / "out/tokens.idx").read_bytes() == (tmp_path / "in/web.idx").read_bytes()


@pytest.mark.parametrize("code", [4, 5, 8])
def test_int_sizes_follow_the_vocabulary_and_not_the_source(tmp_path, tokenizer_folder, code):
    (tmp_path / "in").mkdir()
    found, _ = windows()
    plain.write_megatron(tmp_path / "in/web", list(found), code=code)
    convert(
        f"--source={tmp_path}/in", "--unit=window", f"--tokenizer={tokenizer_folder}", f"--target={tmp_path}/a/train"
    )
    assert TokenStore.open(tmp_path / "a/train").manifest.dtype == "uint16"
    np.testing.assert_array_equal(TokenStore.open(tmp_path / "a/train").document(3), found[3])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(49_153, "<u2"), (65_499, "<u2"), (65_500, "<i4"), (151_936, "<i4")])
def test_megatrons_int_sizes(tmp_path, vocab_size, dtype):
    texts = [np.array([vocab_size - 1, 7, 0]), np.array([0])]
    store = token_stores.write_store(tmp_path / "large", texts, vocab_size=vocab_size)
    for kind in ("megatron", "datatrove", "datasets"):
        exporting.export_store(store, new(tmp_path / kind), kind, document_end=None)
    assert megatron.token_dtype(vocab_size) == np.dtype(dtype)
    found, _ = plain.read_megatron(tmp_path / "megatron/tokens")
    by_datatrove = plain.read_datatrove(tmp_path / "datatrove/00000_tokens.ds")
    assert found[0].dtype == dtype and by_datatrove[0].dtype == store.manifest.dtype
    (table,) = (tmp_path / "datasets/data").iterdir()
    column = pa.parquet.read_table(table).column("input_ids")
    assert str(column.type.value_type) == store.manifest.dtype
    for other in (found, by_datatrove, column.to_pylist()):
        assert [list(map(int, each)) for each in other] == [[vocab_size - 1, 7, 0], [0]]


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_datatrove_files_in_order_and_without_metadata(tmp_path, tokenizer_folder):
    texts = [np.append(np.arange(5, 5 + length), 0) for length in (3, 9, 1, 30)]
    (tmp_path / "in").mkdir()
    plain.write_datatrove(tmp_path / "in/00001_b.ds", texts[2:])
    plain.write_datatrove(tmp_path / "in/00000_a.ds", texts[:2])
    (tmp_path / "in/00000_a.ds.metadata").unlink()
    flags = (f"--source={tmp_path}/in", "--unit=document", f"--tokenizer={tokenizer_folder}")
    with pytest.raises(ValueError, match=r"00000_a.ds: no 00000_a.ds.metadata .* give --token_bytes"):
        convert(*flags, f"--target={tmp_path}/a/train")
    convert(*flags, "--token_bytes=2", f"--target={tmp_path}/a/train")
    store = TokenStore.open(tmp_path / "a/train")
    assert [list(store.document(index)) for index in range(4)] == [list(text) for text in texts]


def test_the_library_datasets_reads_ours_and_we_read_what_it_saves(tmp_path, tokenizer_folder):
    datasets = pytest.importorskip("datasets", reason="needs the library datasets, which comes with the extra eval")
    found, lengths = write_windows(tmp_path / "in")
    common = ("--unit=window", f"--tokenizer={tokenizer_folder}")
    convert(f"--source={tmp_path}/in", *common, "--shard_tokens=100", f"--target={tmp_path}/a/train")
    convert(f"--source={tmp_path}/a/train", "--to=datasets", f"--target={tmp_path}/out")
    read = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.column_names == ["input_ids", "loss_weight", "real_tokens"]
    np.testing.assert_array_equal(np.array(read["input_ids"]), found)
    np.testing.assert_array_equal(read["real_tokens"], lengths)
    read.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    convert(f"--source={tmp_path}/saved", *common, f"--target={tmp_path}/b/train")
    again = TokenStore.open(tmp_path / "b/train")
    np.testing.assert_array_equal(np.stack([again.document(i) for i in range(NUM_WINDOWS)]), found)
    np.testing.assert_array_equal(again.channel("loss_weight").reshape(found.shape), np.array(read["loss_weight"]))


def test_datatrove_itself_reads_ours(tmp_path, tokenizer_folder):
    dataset = pytest.importorskip("datatrove.utils.dataset", reason="needs the library datatrove")
    pytest.importorskip("torch")
    found, _ = write_windows(tmp_path / "in")
    convert(
        f"--source={tmp_path}/in", "--unit=window", f"--tokenizer={tokenizer_folder}", f"--target={tmp_path}/a/train"
    )
    convert(f"--source={tmp_path}/a/train", "--to=datatrove", f"--target={tmp_path}/out")
    read = dataset.DatatroveFolderDataset(str(tmp_path / "out"), T, filename_pattern="*.ds", token_size=2)
    assert len(read) == NUM_WINDOWS
    np.testing.assert_array_equal([read[i]["input_ids"].numpy() for i in range(NUM_WINDOWS)], found)


class Killed(BaseException):
    """Ends a conversion as a kill would, after so many tokens."""


def killed_after(monkeypatch, num_tokens):
    """Patches the progress bar so that the next conversion dies, then counts its tokens; gives those of the second."""
    seen = []

    def update(bar, count):
        seen.append(count)
        if num_tokens and sum(seen) >= num_tokens:
            raise Killed

    monkeypatch.setattr("safelm.io.progress.Bar.update", update)
    return seen


@pytest.mark.parametrize("kind", ["megatron", "datatrove", "datasets"])
def test_a_stopped_conversion_goes_on_and_ends_the_same(tmp_path, tokenizer_folder, kind, monkeypatch):
    """Finished shards aren't converted again, other settings begin anew, and a second writer is refused."""
    write_windows(tmp_path / "in")
    common = [f"--tokenizer={tokenizer_folder}", f"--shard_tokens={3 * T}"]
    read = ["--unit=window", *common, f"--source={tmp_path}/in", f"--target={tmp_path}/a/train"]
    written = [f"--source={tmp_path}/b/train", f"--to={kind}", f"--target={tmp_path}/out"]
    convert(*read[:-1], f"--target={tmp_path}/b/train")
    convert(*written[:-1], f"--target={tmp_path}/whole")
    for flags, module, function in ((read, importing, "_write_shard"), (written, exporting, "_blocks")):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            killed_after(patched, 20 * T)
            convert(*flags)
        calls, real = [], getattr(module, function)
        with monkeypatch.context() as patched:
            patched.setattr(module, function, lambda *args, calls=calls, real=real: calls.append(1) or real(*args))
            convert(*flags)
        assert 0 < len(calls) < 15 - 5  # of 15 shards
    assert_same_stores(tmp_path / "a/train", tmp_path / "b/train")
    for path in (each for each in (tmp_path / "whole").rglob("*") if each.is_file()):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "a", "b", "out", "whole"}

    other = [*read[:-1], f"--target={tmp_path}/c/train"]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_after(patched, 20 * T)
        convert(*other)
    with (
        files.locked(tmp_path / "c/.train.partial/.lock", "held"),
        pytest.raises(files.BusyError, match=r"--target=.*c/train: another process is writing it"),
    ):
        convert(*other)
    convert(*other, f"--shard_tokens={2 * T}")
    assert_same_stores(tmp_path / "c/train", tmp_path / "b/train")


def test_the_parts_of_a_file_in_any_order_read_every_length_a_few_times(monkeypatch):
    monkeypatch.setattr(blocks, "_SEQUENCES_AT_ONCE", 8)
    lengths_n = np.random.default_rng(0).integers(1, 9, 1000)
    tokens, asked = np.arange(lengths_n.sum()), []

    def lengths(start, stop):
        asked.append(len(lengths_n[start:stop]))
        return lengths_n[start:stop]

    file = blocks.FlatFile("web.bin", tokens, len(lengths_n), lengths)
    parts = file.parts(64)
    assert len(parts) > 50
    asked.clear()
    found = {part: np.concatenate([block.tokens for block in file.blocks(part)]) for part in reversed(parts)}
    np.testing.assert_array_equal(np.concatenate([found[part] for part in parts]), tokens)
    assert sum(asked) <= 2 * len(lengths_n) + 8 * len(parts)
