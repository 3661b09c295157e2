"""A token store that isn't what was written is noticed: at open, while training has begun, or in a batch."""

import os
import re

import numpy as np
import pytest
import tiny_runs
from token_stores import EOS_ID, HARM_TAG_ID, write_store

from safelm.data import store as store_lib
from safelm.data.assembly import Assembly
from safelm.data.loader import eval_batches
from safelm.data.packing import make_rows
from safelm.data.shard import shard_file
from safelm.data.store import TokenStore
from safelm.data.verification import Verification
from safelm.train.run import train

DOCUMENTS = [[5, 6, 0], [7, 8, 9, 0], [10, 11, 0], [12, 13, 14, 15, 0]]


def rewrite(path, change) -> None:
    """Another content of the same size."""
    array = np.load(path)
    change(array)
    size = os.path.getsize(path)
    np.save(path, array)
    assert os.path.getsize(path) == size


def backwards(array):
    array[:] = array[::-1].copy()


def plant(place, value):
    return lambda array: array.__setitem__(place, value)


TOKENS = [backwards, plant(1, EOS_ID), plant(1, HARM_TAG_ID), plant(2, 999)]
BOUNDS = [plant(1, -5), plant(1, 10**6), plant(1, 0), plant(0, 1)]


@pytest.mark.parametrize("kind, change", [*(("tokens", c) for c in TOKENS), *(("bounds", c) for c in BOUNDS)])
def test_damage_is_named_by_its_shard_when_the_store_is_opened(tmp_path, kind, change):
    path = os.path.join(write_store(tmp_path, DOCUMENTS, num_shards=2).directory, shard_file(kind, 1, 2))
    rewrite(path, change)
    with pytest.raises(ValueError, match=re.escape(path)):
        TokenStore.open(tmp_path)


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(store_lib, "_VERIFIED_AT_OPEN_BYTES", 0)


@pytest.mark.parametrize("change", BOUNDS)
def test_bounds_of_a_large_store_are_checked_at_open_too(tmp_path, all_are_large, change):
    path = os.path.join(write_store(tmp_path, DOCUMENTS).directory, shard_file("bounds", 0, 1))
    rewrite(path, change)
    with pytest.raises(ValueError, match=re.escape(path)):
        TokenStore.open(tmp_path)


def test_a_large_store_is_verified_in_the_background(tmp_path, all_are_large):
    whole = write_store(tmp_path / "whole", DOCUMENTS)
    damaged = write_store(tmp_path / "damaged", DOCUMENTS, num_shards=2)
    Verification([whole, damaged]).wait()
    path = os.path.join(damaged.directory, shard_file("tokens", 1, 2))
    rewrite(path, backwards)
    damaged = TokenStore.open(damaged.directory)
    with pytest.raises(ValueError, match=f"{re.escape(path)}: damaged: .*run again"):
        Verification([whole, damaged]).wait()


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_an_id_outside_the_vocabulary_is_no_batch(tmp_path, all_are_large, packing):
    path = os.path.join(write_store(tmp_path, DOCUMENTS, num_shards=2).directory, shard_file("tokens", 1, 2))
    rewrite(path, plant(1, 60_000))
    with pytest.raises(ValueError, match=f"{re.escape(path)}: damaged: token id 60000, the vocabulary has 1000"):
        list(eval_batches(TokenStore.open(tmp_path), batch_size=2, seq_len=4, packing=packing))


def test_an_id_outside_the_vocabulary_that_is_only_an_input_is_no_batch(tmp_path, all_are_large):
    path = os.path.join(write_store(tmp_path, DOCUMENTS, num_shards=2).directory, shard_file("tokens", 1, 2))
    rewrite(path, plant(4, 60_000))  # row 2 goes on with it as its first input, row 1 has it as its last target
    assembly = Assembly([make_rows(TokenStore.open(tmp_path), 6, "concat")])
    with pytest.raises(ValueError, match=f"{re.escape(path)}: damaged: token id 60000, the vocabulary has 1000"):
        assembly.batch(np.zeros(1, np.int32), np.array([2]), 2)


@pytest.mark.parametrize("change", [backwards, plant(3, 60_000)])
def test_training_on_a_damaged_store_ends_before_its_first_checkpoint(tmp_path, all_are_large, change):
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    path = inputs / "tokens" / "raw_web" / "train" / shard_file("tokens", 0, 1)
    rewrite(str(path), change)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged"):
        train(tiny_runs.tiny_config(inputs), str(tmp_path / "run"))
    steps = [name for name in os.listdir(tmp_path / "run" / "checkpoints") if name.isdecimal()]
    assert not steps
