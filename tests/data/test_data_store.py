"""Token stores: what was written is read back, and nothing damaged, foreign or half written is taken for a store."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_stores import HARM_TAG_ID, write_store

from safelm.data.channels import CHANNELS, Channel
from safelm.data.store import (
    ShardWriter,
    TokenStore,
    read_manifest,
    read_shard_info,
    shard_file,
    token_dtype,
    write_manifest,
)

DOCUMENTS = [[5, 6, 0], [0], [7, HARM_TAG_ID, HARM_TAG_ID, 8, 0], [9, 0], [999, 0]]


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", DOCUMENTS, num_shards=2)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=9), min_size=1, max_size=12),
    num_shards=st.integers(1, 14),
)
def test_every_document_is_read_back(tmp_path_factory, documents, num_shards):
    store = write_store(tmp_path_factory.mktemp("s"), documents, num_shards=num_shards, vocab_size=70_001)
    stream = np.concatenate([np.asarray(d) for d in documents])
    assert store.num_documents == len(documents) and store.num_tokens == len(stream)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(store.document(i), document)
    np.testing.assert_array_equal(store.tokens(0, len(stream)), stream)
    middle = len(stream) // 2
    np.testing.assert_array_equal(store.tokens(middle, len(stream) + 9), stream[middle:])


def test_files_are_plain_numpy_and_the_manifest_counts(store):
    path = os.path.join(store.directory, shard_file("tokens", 0, 2))
    np.testing.assert_array_equal(np.load(path), np.concatenate(DOCUMENTS[:3]))
    assert np.load(path).dtype == np.uint16 == token_dtype(65_536) and token_dtype(65_537) == np.uint32
    assert store.manifest.num_tag_tokens == 2
    assert [shard.num_documents for shard in store.manifest.shards] == [3, 2]
    assert not [name for name in os.listdir(store.directory) if name.endswith(".tmp")]


def test_pickle_is_small_and_opens_the_same_files(tmp_path):
    store = write_store(tmp_path, [np.arange(50_000) % 900])
    copy = pickle.dumps(store)
    assert len(copy) < 5_000
    np.testing.assert_array_equal(pickle.loads(copy).document(0), store.document(0))


def test_indices_outside_are_refused(store):
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"document {index} of 5"):
            store.document(index)
    with pytest.raises(IndexError):
        store.tokens(-1, 2)


def test_missing_manifest_is_not_a_store(store):
    os.remove(os.path.join(store.directory, "manifest.json"))
    with pytest.raises(FileNotFoundError, match=r"manifest\.json.*caching it did not finish"):
        TokenStore.open(store.directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "[]",
        lambda _: "{}",
        lambda _: "\udcff",
        lambda text: text.replace('"format_version": 2', '"format_version": 99'),
        lambda text: text.replace('"num_documents": 5', '"num_documents": 6'),
        lambda text: text.replace('"dtype": "uint16"', '"dtype": "float32"'),
        lambda text: text.replace('"eos_id"', '"end_id"'),
    ],
)
def test_unreadable_manifest(store, change):
    path = os.path.join(store.directory, "manifest.json")
    with open(path) as file:
        text = change(file.read())
    with open(path, "w", errors="surrogateescape") as file:
        file.write(text)
    with pytest.raises(ValueError, match=re.escape(path)):
        TokenStore.open(store.directory)


def test_another_vocabulary(store):
    ours = store.manifest.vocab_hash
    assert TokenStore.open(store.directory, vocab_hash=ours).num_documents == 5
    with pytest.raises(ValueError, match=f"{re.escape(store.directory)}.*{ours}.*wanted 1234"):
        TokenStore.open(store.directory, vocab_hash="1234")


@pytest.mark.parametrize("kind", ["tokens", "bounds"])
def test_truncated_missing_or_altered_shard(store, kind):
    path = os.path.join(store.directory, shard_file(kind, 1, 2))
    size = os.path.getsize(path)
    with open(path, "r+b") as file:  # the same size, another content
        file.seek(size - 1)
        byte = file.read(1)
        file.seek(size - 1)
        file.write(bytes([byte[0] ^ 64]))
    with pytest.raises(ValueError, match=f"{re.escape(path)}: (damaged|not the bounds)"):
        TokenStore.open(store.directory, verify_checksums=True)
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=f"{re.escape(path)}: truncated.*{size - 1} bytes.*{size}"):
        TokenStore.open(store.directory)
    os.remove(path)
    with pytest.raises(FileNotFoundError, match=re.escape(path)):
        TokenStore.open(store.directory)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["tokens", "bounds"]), at=st.integers(0, 60), byte=st.integers(0, 255))
def test_a_damaged_header_is_told_with_its_file(store, kind, at, byte):
    path = os.path.join(store.directory, shard_file(kind, 1, 2))
    with open(path, "r+b") as file:
        whole = file.read()
        file.seek(at)
        file.write(bytes([byte]))
    try:
        damaged = TokenStore.open(store.directory)
        assert [damaged.document(i).tolist() for i in range(5)] == DOCUMENTS  # numpy doesn't look at all of it
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "pickle" not in str(error)
    finally:
        with open(path, "wb") as file:
            file.write(whole)


def test_manifest_must_agree_with_its_shards(store):
    manifest = store.manifest
    with pytest.raises(ValueError, match="empty store"):
        write_manifest(store.directory, dataclasses.replace(manifest, shards=(), num_documents=0))
    with pytest.raises(ValueError, match="num_tokens is 1"):
        write_manifest(store.directory, dataclasses.replace(manifest, num_tokens=1))
    with pytest.raises(ValueError, match="token id 999, vocab_size is 999"):
        write_manifest(store.directory, dataclasses.replace(manifest, vocab_size=999))
    for name, value in (("eos_id", 1000), ("eos_id", -1), ("harm_tag_id", 1000)):
        with pytest.raises(ValueError, match=f"{name} {value}.*vocab_size is 1000"):
            write_manifest(store.directory, dataclasses.replace(manifest, **{name: value}))
    assert read_manifest(store.directory) == manifest


@pytest.mark.parametrize("document", [[], [[1, 2]], [1.5], [-1], [70_000]])
def test_writer_refuses_bad_documents_and_leaves_nothing(tmp_path, document):
    with pytest.raises(ValueError, match="document 1"), ShardWriter(tmp_path, 0, 1, np.uint16, harm_tag_id=1) as writer:
        writer.add([1, 0])
        writer.add(document)
    assert os.listdir(tmp_path) == []


def test_a_second_run_finds_whole_shards_only(store):
    info = store.manifest.shards[0]
    assert read_shard_info(store.directory, 0, 2) == info
    assert read_shard_info(store.directory, 0, 2, fingerprint="other") is None
    assert read_shard_info(store.directory, 0, 3) is None
    os.truncate(os.path.join(store.directory, shard_file("tokens", 0, 2)), 10)
    assert read_shard_info(store.directory, 0, 2) is None
    ShardWriter(store.directory, 1, 2, np.uint16, harm_tag_id=1).abort()  # begun anew, then stopped
    assert read_shard_info(store.directory, 1, 2) is None


FULL_DISK = """
import resource, sys
import numpy as np
from safelm.data.store import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    with ShardWriter(sys.argv[1], 0, 1, np.uint16, harm_tag_id=1) as writer:
        for _ in range(200):
            writer.add(np.arange(50))
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("limit", [16, 1_000, 15_000])
def test_full_disk_leaves_nothing_that_looks_whole(tmp_path, limit):
    """A limit on file size stands in for a full disk: the write fails at the same places."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "cannot write token shard" in result.stderr and "tokens-00000-of-00001.npy" in result.stderr
    assert os.listdir(tmp_path) == []


def test_killed_while_writing_leaves_no_final_name(tmp_path):
    code = FULL_DISK.replace("writer.add(", "_ == 150 and __import__('os')._exit(9); writer.add(")
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path), "9999999"])
    assert result.returncode == 9
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".tmp")] == []
    assert read_shard_info(tmp_path, 0, 1) is None
    with pytest.raises(FileNotFoundError):
        TokenStore.open(tmp_path)


MANY_SHARDS = """
import resource, sys
from safelm.data.store import TokenStore
resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[2])))
try:
    print(TokenStore.open(sys.argv[1]).num_documents)
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(("most", "opens"), [(300, True), (60, False)])
def test_more_shards_than_open_files_raise_the_limit_and_beyond_it_say_so(tmp_path, most, opens):
    write_store(tmp_path, [[5, 0]] * 50, num_shards=50)
    done = subprocess.run([sys.executable, "-c", MANY_SHARDS, tmp_path, str(most)], capture_output=True, text=True)
    assert (done.returncode == 0) == opens, done.stderr
    said = done.stdout if opens else done.stderr
    assert "50" in said if opens else re.search(r"more shards than this process may map.*-of-00050\.npy", said)


def test_remote_store_is_copied_once_and_checked(store, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFELM_CACHE", str(tmp_path / "cache"))
    url = f"file://{store.directory}"
    copy = TokenStore.open(url, verify_checksums=True)
    assert copy.directory.startswith(str(tmp_path / "cache"))
    np.testing.assert_array_equal(copy.tokens(0, 99), store.tokens(0, 99))
    path = os.path.join(store.directory, shard_file("tokens", 1, 2))
    os.truncate(path, 40)
    assert TokenStore.open(url).directory == copy.directory  # whole already: nothing is fetched
    os.remove(os.path.join(copy.directory, shard_file("tokens", 1, 2)))
    with pytest.raises(ValueError, match=r"tokens-00001-of-00002\.npy: truncated or replaced: 40 bytes"):
        TokenStore.open(url)
    assert not [name for name in os.listdir(copy.directory) if "tokens-00001" in name]
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest\.json"):
        TokenStore.open(f"file://{tmp_path}/nowhere")


def test_manifest_is_json_with_sorted_keys(store):
    with open(os.path.join(store.directory, "manifest.json")) as file:
        values = json.load(file)
    assert values["vocab_size"] == 1000 and list(values) == sorted(values)


def test_documents_added_together_are_the_same_shard(tmp_path):
    rng = np.random.default_rng(0)
    label, signal = Channel("label", "int16", "document", -1), Channel("signal", "float32", "token", 0.0)
    lengths = rng.integers(1, 30, 50)
    tokens, weight = rng.integers(0, 900, lengths.sum()), rng.integers(0, 3, lengths.sum()).astype(np.float32)
    numbers = {"loss_weight": weight, "signal": rng.random(lengths.sum()), "label": rng.integers(-1, 400, 50)}
    infos = []
    for name in ("one by one", "together"):
        channels = (*CHANNELS, label, signal)
        with ShardWriter(tmp_path / name, 0, 1, np.uint16, harm_tag_id=7, channels=channels) as writer:
            stops = np.cumsum(lengths)
            for i, stop in enumerate(stops) if name == "one by one" else ():
                part = slice(stop - lengths[i], stop)
                given = {key: array[i] if key == "label" else array[part] for key, array in numbers.items()}
                writer.add(tokens[part], **given)
            for first, last in ((0, 20), (20, 50)) if name == "together" else ():
                chosen, part = slice(first, last), slice(stops[first] - lengths[first], stops[last - 1])
                given = {key: array[chosen] if key == "label" else array[part] for key, array in numbers.items()}
                writer.add_many(tokens[part], lengths[chosen], **given)
            infos.append(writer.close())
    one, two = infos
    for name in ("num_documents", "num_tokens", "num_tag_tokens", "max_token"):
        assert getattr(one, name) == getattr(two, name)
    assert (one.files, one.channels) == (two.files, two.channels)
    for channel in one.channels:
        file = np.load(tmp_path / "one by one" / shard_file(channel.name, 0, 1))
        np.testing.assert_array_equal(
            channel.read(file, 0, one.count(channel)), numbers[channel.name].astype(channel.dtype)
        )
    with ShardWriter(tmp_path / "bad", 0, 1, np.uint16, harm_tag_id=7) as writer:
        for tokens, lengths, given in (([1, 2], [2, 0], {}), ([1, 2], [3], {}), ([1, 2], [2], {"loss_weight": [1.0]})):
            with pytest.raises(ValueError, match="document 0 and th"):
                writer.add_many(np.array(tokens), np.array(lengths), **{k: np.array(v) for k, v in given.items()})
        writer.abort()
