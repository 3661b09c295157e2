"""Which tokens of a store are to be learned: kept, checked, read from afar, and the only targets of a row."""

import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import HARM_TAG_ID, write_store

from safelm.data.loader import eval_batches
from safelm.data.shard import ShardInfo, ShardWriter, read_shard_info, shard_file
from safelm.data.store import Manifest, TokenStore, write_manifest
from safelm.io import cache


def write_masked(directory, documents, masks, *, num_shards=1) -> TokenStore:
    """A store whose documents have a loss mask each, or None."""
    plain = write_store(directory, documents, num_shards=num_shards)
    shards, parts = [], np.array_split(np.arange(len(documents)), num_shards)
    for index, part in enumerate(parts):
        with ShardWriter(directory, index, num_shards, plain.manifest.dtype, harm_tag_id=HARM_TAG_ID) as writer:
            for i in part:
                writer.add(np.asarray(documents[i]), masks[i])
            shards.append(writer.close())
    write_manifest(directory, dataclasses.replace(plain.manifest, shards=tuple(shards)))
    return TokenStore.open(directory, verify_checksums=True)


@st.composite
def masked_documents(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))
    masks = [draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    numbers = iter(range(2, 1000))
    return [[*(next(numbers) for _ in range(n - 1)), 0] for n in lengths], masks


@settings(max_examples=40, deadline=None)
@given(masked_documents(), st.integers(1, 3), st.integers(2, 9), st.sampled_from(["concat", "fit"]))
def test_exactly_the_learned_tokens_are_targets(tmp_path_factory, documents_and_masks, num_shards, seq_len, packing):
    documents, masks = documents_and_masks
    store = write_masked(tmp_path_factory.mktemp("s"), documents, masks, num_shards=num_shards)
    learned = np.concatenate([np.ones(len(d), bool) if m is None else m for d, m in zip(documents, masks, strict=True)])
    np.testing.assert_array_equal(store.loss_mask(np.arange(store.num_tokens)), learned)
    assert store.has_loss_mask == any(mask is not None for mask in masks)
    stream = np.concatenate(documents)
    found = []
    for batch in eval_batches(store, batch_size=2, seq_len=seq_len, packing=packing):
        found += batch["targets_BT"][batch["loss_mask_BT"] == 1].tolist()
        assert not batch["targets_BT"][batch["loss_mask_BT"] == 0].any()
    assert sorted(found) == sorted(stream[learned].tolist())


def test_inputs_and_segments_do_not_depend_on_the_mask(tmp_path):
    documents = [[5, 6, 7, 0], [8, 9, 0]]
    plain = write_store(tmp_path / "plain", documents)
    masked = write_masked(tmp_path / "masked", documents, [[0, 1, 0, 0], [0, 0, 1]])
    for a, b in zip(*(eval_batches(s, batch_size=1, seq_len=5) for s in (plain, masked)), strict=True):
        for name in ("inputs_BT", "positions_BT", "segment_ids_BT"):
            np.testing.assert_array_equal(a[name], b[name])


def test_a_store_from_before_loss_spans_stays_readable(tmp_path):
    store = write_store(tmp_path, [[5, 6, 0]])
    assert not os.path.exists(tmp_path / shard_file("spans", 0, 1))
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        del shard["spans_bytes"], shard["spans_sha256"]
    path.write_text(json.dumps(manifest))
    again = TokenStore.open(tmp_path, verify_checksums=True)
    assert again.manifest == store.manifest and not again.has_loss_mask and again.loss_mask(np.arange(3)).all()


def test_a_shard_without_its_spans_is_made_again_and_a_damaged_one_named(tmp_path):
    store = write_masked(tmp_path, [[5, 6, 0]], [[0, 1, 0]])
    assert isinstance(read_shard_info(tmp_path, 0, 1), ShardInfo)
    spans = tmp_path / shard_file("spans", 0, 1)
    whole = spans.read_bytes()
    np.save(spans, np.array([2, 1]))
    with pytest.raises(ValueError, match=r"spans-00000-of-00001.npy: not the loss spans of 3 tokens"):
        TokenStore.open(tmp_path)
    spans.write_bytes(whole[:-8] + np.int64(3).tobytes())
    with pytest.raises(ValueError, match=r"spans-00000-of-00001.npy: damaged"):
        TokenStore.open(tmp_path, verify_checksums=True)
    spans.unlink()
    assert read_shard_info(tmp_path, 0, 1) is None
    with pytest.raises(FileNotFoundError, match="shard is missing"):
        TokenStore.open(tmp_path)
    with ShardWriter(tmp_path, 0, 1, np.uint16, harm_tag_id=HARM_TAG_ID) as writer:
        writer.add([5, 6, 0])
        assert writer.close().spans_bytes == 0
    assert isinstance(store.manifest, Manifest)
    with (
        pytest.raises(ValueError, match="document 0 has 3 tokens and a loss mask of shape"),
        ShardWriter(tmp_path, 0, 1, np.uint16, harm_tag_id=HARM_TAG_ID) as writer,
    ):
        writer.add([5, 6, 0], [1, 0])


@pytest.mark.parametrize("cache_gb", ["1", "0"])
def test_a_remote_store_has_the_same_mask(tmp_path, monkeypatch, cache_gb):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(cache.SIZE_VARIABLE, cache_gb)
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(2, 900, 40), 0) for _ in range(50)]
    masks = [rng.random(41) < 0.5 for _ in range(50)]
    local = write_masked(tmp_path / "store", documents, masks, num_shards=3)
    remote = TokenStore.open(f"file://{tmp_path}/store", verify_checksums=True)
    for a, b in zip(*(eval_batches(s, batch_size=4, seq_len=32) for s in (local, remote)), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
