"""Token stores made on the spot for tests."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from safelm.data.channels import CHANNELS, Channel
from safelm.data.store import Manifest, ShardWriter, TokenStore, token_dtype, write_manifest

EOS_ID, HARM_TAG_ID = 0, 1


def write_store(
    directory,
    documents: Sequence[Sequence[int]],
    *,
    num_shards: int = 1,
    vocab_size: int = 1000,
    vocab: str = "a",
    channels: Sequence[Channel] = CHANNELS,
    numbers: Sequence[Mapping[str, Any]] | None = None,
) -> TokenStore:
    """A store of the documents, split over the shards in order (some may be empty).

    `numbers`: each document's numbers by channel.
    """
    shards, dtype = [], token_dtype(vocab_size)
    for index, part in enumerate(np.array_split(np.arange(len(documents)), num_shards)):
        with ShardWriter(directory, index, num_shards, dtype, harm_tag_id=HARM_TAG_ID, channels=channels) as writer:
            for i in part:
                writer.add(np.asarray(documents[i]), **(numbers[i] if numbers else {}))
            shards.append(writer.close())
    manifest = Manifest(
        task="test",
        split="train",
        vocab_hash=hashlib.sha256(vocab.encode()).hexdigest(),
        vocab_size=vocab_size,
        eos_id=EOS_ID,
        harm_tag_id=HARM_TAG_ID,
        dtype=token_dtype(vocab_size).name,
        shards=tuple(shards),
        num_documents=sum(shard.num_documents for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_tag_tokens=sum(shard.num_tag_tokens for shard in shards),
    )
    write_manifest(directory, manifest)
    return TokenStore.open(directory)


def numbered_documents(lengths: Sequence[int], first: int = 2) -> list[np.ndarray]:
    """Documents in which every token but the end token is a number used nowhere else."""
    documents = []
    for length in lengths:
        documents.append(np.append(np.arange(first, first + length - 1), EOS_ID))
        first += length - 1
    return documents


def assert_equal_batches(one, two) -> None:
    """Two batches hold the same numbers of the same kinds."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(batch) for batch in (one, two)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
