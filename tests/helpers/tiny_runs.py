"""Token stores, a tokenizer and a config small enough to train on in seconds."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from safelm.data.channels import CHANNELS, Channel
from safelm.data.shard import ShardInfo
from safelm.data.store import Manifest, ShardWriter, write_manifest
from safelm.text.tokenizer import Tokenizer
from safelm.train.defaults import default_config

SOURCES = ("raw_web", "filtered_web", "safeweb", "refuseweb", "moral_education", "harm_tagged_web")
CHAT_SOURCES = ("ultrachat", "wildguardmix", "wildjailbreak", "harm_tagged_chat", "gsm8k")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat, the dog did not"] * 20, 280)


def write_store(
    root: Path,
    source: str,
    split: str = "train",
    *,
    seed: int = 0,
    vocab_hash: str | None = None,
    has_tag: bool = False,
    channels: Sequence[Channel] = CHANNELS,
) -> None:
    """40 documents of 5 to 60 tokens with a pattern in them, perhaps each with a harm tag."""
    vocabulary, directory = tokenizer(), root / source / split
    rng = np.random.default_rng([seed, len(source)])
    with ShardWriter(directory, 0, 1, np.uint16, harm_tag_id=vocabulary.harm_tag_id, channels=channels) as writer:
        for _ in range(40):
            start, length = rng.integers(4, vocabulary.vocab_size), rng.integers(5, 60)
            tokens = (start + np.arange(length)) % (vocabulary.vocab_size - 4) + 4
            if has_tag:
                tokens[1] = vocabulary.harm_tag_id
            writer.add(np.append(tokens, vocabulary.eos_id))
        info = writer.close()
    write_manifest(directory, manifest(source, split, info, vocab_hash=vocab_hash))


def manifest(source: str, split: str, shard: ShardInfo, *, vocab_hash: str | None = None) -> Manifest:
    """The manifest of a store of one shard in the tiny vocabulary."""
    vocabulary = tokenizer()
    return Manifest(
        task=source,
        split=split,
        vocab_hash=vocab_hash or vocabulary.hash,
        vocab_size=vocabulary.vocab_size,
        eos_id=vocabulary.eos_id,
        harm_tag_id=vocabulary.harm_tag_id,
        dtype="uint16",
        shards=(shard,),
        num_documents=shard.num_documents,
        num_tokens=shard.num_tokens,
        num_tag_tokens=shard.num_tag_tokens,
    )


def write_inputs(folder: Path) -> Path:
    """A tokenizer and a store of every source and split under a folder."""
    tokenizer().save(str(folder / "tokenizer"))
    for source in (*SOURCES, *CHAT_SOURCES):
        for seed, split in enumerate(("train", "validation")):
            write_store(folder / "tokens", source, split, seed=seed)
    return folder


def shrink(config: ConfigDict, inputs: Path) -> ConfigDict:
    """Makes any config a run of one second: a tiny model, few short rows, one step."""
    config = ConfigDict(config)
    with config.unlocked():
        config.tokenizer, config.data.root = str(inputs / "tokenizer"), str(inputs / "tokens")
        config.model.update(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)
        config.model.vocab_size = tokenizer().vocab_size
        config.init_checkpoint = ""
        config.update(total_steps=1, total_tokens=0, batch_size=8 * config.grad_accum_steps, seq_len=16)
        config.optimizer.update(warmup_steps=0, decay_steps=0)
        config.mesh.update(data=-1, fsdp=1, tensor=1)
        config.eval.update(batches=1)
        config.compilation_cache_dir = os.environ.get("SAFELM_TESTS_COMPILED", str(inputs / "compiled"))
    return config.lock()


def tiny_config(inputs: Path, **overrides) -> ConfigDict:
    """Six steps on two sources with a checkpoint every three; overrides are dotted names."""
    config = shrink(default_config(), inputs)
    with config.unlocked():
        config.model.update(dtype="float32")
        config.data.phases = ({"start": 0.0, "rates": {"raw_web": 0.75, "harm_tagged_web": 0.25}},)
        config.total_steps = 6
        config.checkpoint.every_steps = 3
        config.log.every_steps = 1
    config.update_from_flattened_dict(overrides)
    return config.lock()


def metric_lines(workdir: Path) -> list[dict]:
    """The metrics of a run without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

    def depends_on_time(name: str) -> bool:
        return name in ("tokens_per_second", "mfu", "goodput") or name.startswith("time/")

    return [{name: value for name, value in line.items() if not depends_on_time(name)} for line in lines]


def model_fields(**overrides) -> dict:
    """The fields of a tiny `ModelConfig` as used by `tiny_config`."""
    fields = {"num_layers": 2, "d_model": 16, "d_ff": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    return fields | {"vocab_size": tokenizer().vocab_size, "dtype": "float32"} | overrides


def assert_same_checkpoint(a: Path, b: Path, step: int) -> None:
    """Parameters and optimizer state of two runs' checkpoints are equal bit for bit."""
    for item in ("params", "optimizer"):
        trees = [
            ocp.StandardCheckpointer().restore(path.absolute() / "checkpoints" / str(step) / item) for path in (a, b)
        ]
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
        for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
            assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
