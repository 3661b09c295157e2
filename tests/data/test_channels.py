"""Channels of token stores: kept in few bytes, checked, read from afar, and in the batch where their token is."""

import dataclasses
import json
import os
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import EOS_ID, HARM_TAG_ID, assert_equal_batches, numbered_documents, write_store

from safelm.data import remote_shards
from safelm.data.batch import abstract_batch
from safelm.data.batches import Batches
from safelm.data.channels import CHANNELS, LOSS_WEIGHT, Channel
from safelm.data.loader import eval_batches, make_loader
from safelm.data.schedule import MixtureSchedule, Phase
from safelm.data.shard import ShardInfo, ShardWriter, read_shard_info, shard_file
from safelm.data.store import TokenStore
from safelm.io import cache

LABEL = Channel("label", "int16", "token", -1)
ORIGIN = Channel("origin", "int32", "document", 7)


def file_size(store: TokenStore, name: str) -> int:
    """Bytes of a channel's files without their headers."""
    paths = [store.shard_path(name, shard.index) for shard in store.manifest.shards if name in shard.files]
    return sum(np.load(path).nbytes for path in paths)


# ---- forms


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_shards=st.integers(1, 3), per=st.sampled_from(["token", "document"]))
def test_numbers_come_back_whatever_their_form(tmp_path_factory, data, num_shards, per):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))
    dtype, pool = data.draw(st.sampled_from([("float32", 3000), ("float32", 3), ("int8", 2), ("uint16", 200)]))
    values = np.arange(pool) / (8 if dtype == "float32" else 1)
    values = values.astype(dtype) if dtype != "int8" else np.array([-3, 5], dtype)
    channel = Channel("number", dtype, per, values[0].item())
    rng, numbers, wanted = np.random.default_rng(data.draw(st.integers(0, 99))), [], []
    for length in lengths:
        count = length if per == "token" else 1
        given = data.draw(st.booleans())
        drawn = rng.choice(values[: data.draw(st.integers(1, pool))], count) if given else np.repeat(values[:1], count)
        numbers.append({"number": (drawn if per == "token" else drawn[0]) if given else None})
        wanted.append(drawn)
    folder = tmp_path_factory.mktemp("s")
    options = {"num_shards": num_shards, "channels": (LOSS_WEIGHT, channel), "numbers": numbers}
    store = write_store(folder, numbered_documents(lengths), **options)
    wanted = np.concatenate(wanted)
    found = store.channel("number")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted)
    for shard, part in zip(store.manifest.shards, np.array_split(np.arange(len(lengths)), num_shards), strict=True):
        count = shard.count(channel)
        if count:
            index = rng.permutation(count)
            at = sum(lengths[: part[0]]) if per == "token" else part[0]
            np.testing.assert_array_equal(store.take_channel("number", shard.index, index), wanted[at + index])
    assert not [name for name in os.listdir(folder) if "tmp" in name]


def test_a_shard_keeps_few_values_in_few_bits(tmp_path):
    rng, documents = np.random.default_rng(0), numbered_documents([4000])

    def size_of(name, weights):
        numbers = None if weights is None else [{"loss_weight": weights}]
        store = write_store(tmp_path / name, documents, numbers=numbers, vocab_size=5000)
        np.testing.assert_array_equal(store.channel("loss_weight"), np.ones(4000) if weights is None else weights)
        return file_size(store, "loss_weight"), store.manifest.shards[0].channels[0].values

    assert size_of("none", None) == (0, (1.0,)) == size_of("ones", np.ones(4000, np.float32))
    assert size_of("mask", rng.integers(0, 2, 4000).astype(np.float32)) == (500, (0.0, 1.0))
    assert size_of("table", rng.choice([0, 0.25, 0.1, 3], 4000).astype(np.float32))[0] == 4000
    assert size_of("any", rng.random(4000, np.float32)) == (16_000, None)


def test_the_manifest_says_what_is_constant(tmp_path):
    store = write_store(tmp_path, [[5, 6, 0]], channels=(LOSS_WEIGHT, ORIGIN), numbers=[{"loss_weight": [0.5] * 3}])
    (shard,) = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert {each["name"]: each["values"] for each in shard["channels"]} == {"loss_weight": [0.5], "origin": [7]}
    assert set(shard["files"]) == {"tokens", "bounds", "sums"} and store.channels == (LOSS_WEIGHT, ORIGIN)


# ---- what is refused


@pytest.mark.parametrize(
    "weights, problem",
    [
        ([1, -0.5, 1], r"loss_weight\[1\] is -0.5, must be a finite number of at least 0"),
        ([1, 1, np.nan], r"loss_weight\[2\] is nan"),
        ([np.inf, 1, 1], r"loss_weight\[0\] is inf"),
        ([1e300, 1, 1], r"loss_weight\[0\] is 1e\+300"),
        ([1, 0], r"3 tokens and a loss_weight of shape \(2,\), not \(3,\)"),
        (["a", "b", "c"], r"must be numbers"),
    ],
)
def test_bad_weights_name_file_document_and_place_and_leave_nothing(tmp_path, weights, problem):
    named = re.escape(str(tmp_path / shard_file("tokens", 0, 1))) + ": document 1 has "
    with (
        pytest.raises(ValueError, match=named + f".*{problem}") as error,
        ShardWriter(tmp_path, 0, 1, np.uint16, harm_tag_id=HARM_TAG_ID) as writer,
    ):
        writer.add([5, 6, 7, 0], loss_weight=[1, 0, 0.5, 1])
        writer.add([5, 6, 0], loss_weight=np.array(weights))
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("wrong", [300, 1.5, [1, 2]])
def test_numbers_that_do_not_fit_their_dtype_and_channels_that_are_not_declared(tmp_path, wrong):
    small = Channel("small", "uint8", "document", 0)
    with ShardWriter(tmp_path, 0, 1, np.uint16, harm_tag_id=HARM_TAG_ID, channels=[small]) as writer:
        with pytest.raises(ValueError, match=r"document 0 has .*small"):
            writer.add([5, 0], small=wrong)
        with pytest.raises(ValueError, match=r"document 0 has channel 'lable', declared are small"):
            writer.add([5, 0], lable=1)
        writer.add([5, 0], small=255)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "loss_weight", "dtype": "uint8"},
        {"name": "tokens"},
        {"name": "No"},
        {"dtype": "int64"},
        {"default": np.nan},
        {"minimum": 2.0},
    ],
)
def test_declarations_that_cannot_be(fields):
    with pytest.raises(ValueError, match=r"channel|x\[0\]|tokens"):
        Channel(**({"name": "x", "dtype": "float32", "per": "token", "default": 1.0} | fields))


def test_stores_that_declare_a_channel_differently_are_named(tmp_path):
    other = dataclasses.replace(LABEL, default=0)
    stores = [write_store(tmp_path / str(i), [[5, 0]], channels=(each,)) for i, each in enumerate((LABEL, other))]
    schedule = MixtureSchedule([Phase(0.0, {"a": 0.5, "b": 0.5})], batch_size=2, seq_len=4, total_steps=2)
    with pytest.raises(ValueError, match=rf"channel label: {tmp_path}/0 has .*-1.*{tmp_path}/1 has .*default=0"):
        Batches(dict(zip("ab", stores, strict=True)), schedule)


def test_a_shard_without_its_channel_is_made_again_and_a_damaged_one_named(tmp_path):
    weights = np.linspace(0, 1, 300).astype(np.float32)
    write_store(tmp_path, [[*range(2, 301), 0]], numbers=[{"loss_weight": weights}])
    assert isinstance(read_shard_info(tmp_path, 0, 1), ShardInfo)
    path = tmp_path / shard_file("loss_weight", 0, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(ValueError, match=r"loss_weight-00000-of-00001.npy: damaged: its SHA-256"):
        TokenStore.open(tmp_path)
    store = TokenStore.open(tmp_path, verify_checksums=False)
    with pytest.raises(ValueError, match=r"loss_weight-00000-of-00001.npy: damaged: loss_weight\[\d+\] is nan"):
        list(eval_batches(store, batch_size=1, seq_len=64))
    path.unlink()
    assert read_shard_info(tmp_path, 0, 1) is None
    with pytest.raises(FileNotFoundError, match=r"loss_weight.*shard is missing"):
        TokenStore.open(tmp_path)
    with ShardWriter(tmp_path, 0, 1, np.uint16, harm_tag_id=HARM_TAG_ID) as writer:
        path.write_bytes(whole)  # left by a run that was stopped
        writer.add([5, 6, 0])
        assert set(writer.close().files) == {"tokens", "bounds", "sums"}


def test_a_store_of_another_format_says_how_to_make_it_anew(tmp_path):
    write_store(tmp_path, [[5, 6, 0]])
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(ValueError, match="format_version 1, this program reads 2; the command that cached"):
        TokenStore.open(tmp_path)


# ---- in batches


@st.composite
def weighted_documents(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))
    weight = st.sampled_from([0.0, 1.0]) if draw(st.booleans()) else st.floats(0, 4, width=32)
    return lengths, [draw(st.none() | st.lists(weight, min_size=n, max_size=n)) for n in lengths]


@settings(max_examples=25, deadline=None)
@given(weighted_documents(), st.integers(1, 3), st.integers(2, 9), st.sampled_from(["concat", "fit"]))
def test_every_token_of_weight_above_0_is_a_target_with_its_weight(tmp_path_factory, drawn, shards, length, packing):
    lengths, weights = drawn
    documents = numbered_documents(lengths)
    numbers = [{"loss_weight": weight} for weight in weights]
    store = write_store(tmp_path_factory.mktemp("s"), documents, num_shards=shards, numbers=numbers)
    plain = write_store(tmp_path_factory.mktemp("s"), documents, num_shards=shards)
    kept = np.concatenate([np.ones(n, np.float32) if w is None else w for n, w in zip(lengths, weights, strict=True)])
    found = []
    options = {"batch_size": 2, "seq_len": length, "packing": packing}
    for batch, other in zip(eval_batches(store, **options), eval_batches(plain, **options), strict=True):
        learned = batch.loss_weight_BT > 0
        found += zip(batch.targets_BT[learned].tolist(), batch.loss_weight_BT[learned].tolist(), strict=True)
        np.testing.assert_array_equal(batch.targets_BT, np.where(learned, other.targets_BT, 0))
        for name in ("inputs_BT", "positions_BT", "segment_ids_BT"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))
    stream, chosen = np.concatenate(documents), kept > 0
    assert sorted(found) == sorted(zip(stream[chosen].tolist(), kept[chosen].tolist(), strict=True))


def two_sources(folder, channels):
    """A source with every channel, and one written before the last two were declared."""
    rng = np.random.default_rng(0)
    documents = numbered_documents(rng.integers(1, 40, 60))
    numbers = [
        {"label": rng.integers(0, 9, len(d)), "origin": i, "loss_weight": rng.choice([0, 0.5, 2], len(d))}
        if i % 3
        else {}
        for i, d in enumerate(documents)
    ]
    options = {"num_shards": 3, "vocab_size": 5000}
    rich = write_store(folder / "rich", documents, channels=channels, numbers=numbers, **options)
    first = 1 + max(int(d.max()) for d in documents)
    plain = write_store(folder / "plain", numbered_documents(rng.integers(1, 40, 20), first), **options)
    return {"rich": rich, "plain": plain}, documents, numbers


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_channels_added_at_the_writer_travel_to_the_batch_with_no_other_change(tmp_path, packing):
    stores, documents, numbers = two_sources(tmp_path, (*CHANNELS, LABEL, ORIGIN))
    wanted = {}  # by token: its weight, label and document's number
    for document, given_numbers in zip(documents, numbers, strict=True):
        default = {"loss_weight": np.ones(len(document)), "label": np.full(len(document), -1), "origin": 7}
        of = default | given_numbers
        columns = zip(document[:-1].tolist(), of["loss_weight"], of["label"], strict=False)
        wanted |= {token: (weight, label, of["origin"]) for token, weight, label in columns}
    schedule = MixtureSchedule([Phase(0.0, {"rich": 0.7, "plain": 0.3})], batch_size=8, seq_len=16, total_steps=20)
    plan = {"seed": 5, "batch_size": 8, "seq_len": 16, "packing": packing}
    loader = make_loader(stores, schedule, **plan)
    seen, described = 0, abstract_batch(8, 16, (LABEL, ORIGIN))
    for batch in loader:
        assert set(batch.channels) == {"label", "origin"}
        assert [(a.shape, a.dtype) for a in batch[:6]] == [(a.shape, a.dtype) for a in described[:6]]
        assert {k: (a.shape, a.dtype) for k, a in batch.channels.items()} == {
            k: (a.shape, a.dtype) for k, a in described.channels.items()
        }
        padding = batch.segment_ids_BT == 0
        assert not any(array[padding].any() for array in (batch.loss_weight_BT, *batch.channels.values()))
        learned = (batch.loss_weight_BT > 0) & (batch.targets_BT != EOS_ID)
        columns = (batch.targets_BT, batch.loss_weight_BT, batch.channels["label"], batch.channels["origin"])
        for token, *found in zip(*(column[learned].tolist() for column in columns), strict=True):
            assert tuple(found) == wanted.get(token, (1.0, -1, 7))  # of the plain source: all defaults
            seen += token in wanted
    assert seen > 500
    workers = make_loader(stores, schedule, **plan, num_workers=1, start_step=18)
    again = make_loader(pickle.loads(pickle.dumps(stores)), schedule, **plan, start_step=18)
    for one, two in zip(workers, again, strict=True):
        assert_equal_batches(one, two)


@pytest.mark.parametrize("way", ["whole", "by blocks"])
def test_a_remote_store_has_the_same_channels(tmp_path, monkeypatch, way):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    if way == "by blocks":
        monkeypatch.setenv(cache.SIZE_VARIABLE, "0")
        monkeypatch.setattr(remote_shards, "_WHOLE_AT_ONCE_BYTES", 0)
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(2, 900, 4000), 0) for _ in range(50)]
    weight = [rng.random(4001) < 0.5 if i % 2 else rng.random(4001, np.float32) for i in range(50)]
    numbers = [{"loss_weight": w, "label": rng.random(4001) < 0.5, "origin": i} for i, w in enumerate(weight)]
    options = {"num_shards": 2, "channels": (LOSS_WEIGHT, LABEL, ORIGIN), "numbers": numbers}
    local = write_store(tmp_path / "store", documents, **options)
    assert {"loss_weight", "label", "origin"} <= set(local.manifest.shards[0].files)
    remote = TokenStore.open(f"file://{tmp_path}/store", verify_checksums=True)
    for name in ("loss_weight", "label", "origin"):
        np.testing.assert_array_equal(remote.channel(name), local.channel(name))
    for a, b in zip(*(eval_batches(s, batch_size=4, seq_len=64, max_batches=40) for s in (local, remote)), strict=True):
        assert_equal_batches(a, b)
    path = tmp_path / "store" / shard_file("loss_weight", 1, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "another"))
    with pytest.raises(ValueError, match=r"loss_weight-00001-of-00002\.npy: damaged.*\(fetched twice\)"):
        TokenStore.open(f"file://{tmp_path}/store").channel("loss_weight")
