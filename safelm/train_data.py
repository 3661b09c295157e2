"""The token stores and the mixture schedule of a run, and its batches on the devices."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from safelm.data.loader import eval_batches, make_loader
from safelm.data.schedule import MixtureSchedule
from safelm.data.store import TokenStore
from safelm.tokenizer import Tokenizer
from safelm.train_step import BATCH_FIELDS, Batch


class TrainData:
    """What a run reads: every source's store for training, those named for evaluation, and the schedule."""

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer):
        """Opens the stores; FileNotFoundError or ValueError names the source and the field."""
        self._config = config
        self.schedule = _schedule(config)
        self.stores = {name: _open(config, tokenizer, name, config.data.split) for name in self.schedule.sources}
        self._loader = make_loader(
            self.stores,
            self.schedule,
            seed=config.seed,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            packing=config.data.packing,
            num_workers=config.data.num_workers,
        )
        eval_sources = config.eval.sources if config.eval.every_steps else ()
        self.eval_stores = {name: _open(config, tokenizer, name, config.eval.split) for name in eval_sources}

    def batches(self, start_step: int, sharding: NamedSharding) -> Iterator[Batch]:
        """Global batches from a step on, put on the devices: every process reads its own rows only."""
        self._loader.set_state(start_step)
        for batch in self._loader:
            yield _to_devices(batch, sharding)

    def eval_batches(self, source: str, sharding: NamedSharding) -> Iterator[Batch]:
        """The same batches of a source's held-out split each time."""
        for batch in eval_batches(
            self.eval_stores[source],
            batch_size=self._config.batch_size // self._config.grad_accum_steps,
            seq_len=self._config.seq_len,
            max_batches=self._config.eval.batches,
            packing=self._config.data.packing,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ):
            yield _to_devices(batch, sharding)

    def tokens_given(self, step: int) -> dict[str, int]:
        """Tokens every source has given before an update, exactly."""
        return {name: int(count) for name, count in self.schedule.tokens_given(step).items()}

    def record(self, step: int) -> dict[str, Any]:
        """The data position and what it is a position in, for a checkpoint: integers and hashes."""
        return {
            "step": step,
            "schedule_hash": self.schedule.hash,
            "rows_given": {name: int(rows) for name, rows in self.schedule.cumulative(step).items() if rows},
            "stores": {name: _fingerprint(store) for name, store in self.stores.items()},
        }


def _schedule(config: ConfigDict) -> MixtureSchedule:
    try:
        return MixtureSchedule(
            config.data.phases, batch_size=config.batch_size, seq_len=config.seq_len, total_steps=config.total_steps
        )
    except ValueError as error:
        raise ValueError(f"data.phases: {error}") from error


def _open(config: ConfigDict, tokenizer: Tokenizer, source: str, split: str) -> TokenStore:
    path = f"{config.data.root}/{source}/{split}"
    try:
        return TokenStore.open(path, vocab_hash=tokenizer.hash)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.root {config.data.root!r} lacks source {source}: {error}") from error


def _fingerprint(store: TokenStore) -> str:
    manifest = store.manifest
    checksums = "".join(shard.tokens_sha256[:4] for shard in manifest.shards)
    return f"{manifest.num_documents} documents, {manifest.num_tokens} tokens, checksums {checksums}"


def _to_devices(batch: Mapping[str, Any], sharding: NamedSharding) -> Batch:
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in BATCH_FIELDS}
