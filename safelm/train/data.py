"""The token stores and the mixture schedule of a run, its batches on the devices, and the ledger of its tokens.

The ledger counts rows x seq_len, including padding and positions of loss weight 0. It is therefore a function of the
step: exact on any number of hosts and after any kill. Rows of an update that was not applied count too; they don't come
again.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from safelm.data.batch import Batch
from safelm.data.loader import eval_batches, make_loader
from safelm.data.schedule import MixtureSchedule
from safelm.data.store import MANIFEST_NAME, Manifest, TokenStore
from safelm.data.stream import merge_channels
from safelm.data.verification import Verification
from safelm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """The ledger's entry for one source.

    Attributes:
      planned_share: of all tokens so far, by the rates of the phases so far.
      planned_tokens: the same in tokens, rounded; `tokens` differs by less than a row for every phase.
      epochs: how often the source's rows have been gone through.
    """

    source: str
    planned_share: float
    planned_tokens: int
    tokens: int
    epochs: float


class TrainData:
    """A run's data: every source's store for training, the stores for evaluation, and the schedule.

    Attributes:
      channels: of all stores, beside the loss weight: those that every batch has.
    """

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer):
        """Opens the stores; FileNotFoundError or ValueError names the source and the field."""
        self._config = config
        self.schedule = make_schedule(config)
        self.stores = _open_all(config, tokenizer, "data.phases", self.schedule.sources, config.data.split)
        eval_sources = config.eval.sources if config.eval.every_steps else ()
        self.eval_stores = _open_all(config, tokenizer, "eval.sources", eval_sources, config.eval.split)
        every_store = [*self.stores.values(), *self.eval_stores.values()]
        _, *self.channels = merge_channels(every_store)  # beside the loss weight, which comes first
        begin_ids = tokenizer.conventions.begin_ids
        self._begin_id = begin_ids[-1] if begin_ids and begin_ids != (tokenizer.eos_id,) else None
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
            channels=self.channels,
            begin_id=self._begin_id,
        )
        self.verification = Verification(every_store)

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
            channels=self.channels,
            begin_id=self._begin_id,
        ):
            yield _to_devices(batch, sharding)

    def tokens_given(self, step: int) -> dict[str, int]:
        """The exact number of tokens taken from every source before a step."""
        return {name: int(count) for name, count in self.schedule.tokens_given(step).items()}

    def gave_tags(self, step: int) -> bool:
        """Whether a source that contains the harm tag has been read before a step."""
        given = self.schedule.tokens_given(step)
        return any(given[name] and store.manifest.num_tag_tokens for name, store in self.stores.items())

    def ledger(self, step: int) -> list[LedgerEntry]:
        """Every source's tokens before `step`, against the plan."""
        given, planned = self.schedule.tokens_given(step), self.schedule.tokens_planned(step)
        epochs, total = self._loader.batches.epochs(step), max(sum(given.values()), 1)
        return [
            LedgerEntry(name, float(planned[name] / total), round(planned[name]), given[name], epochs[name])
            for name in self.schedule.sources
        ]

    def ledger_table(self, step: int) -> str:
        """The ledger as lines for people."""
        return "\n".join(
            f"source:     {entry.source}: {entry.tokens:,} tokens ({entry.planned_share:.3%} planned, "
            f"{entry.tokens - entry.planned_tokens:+,}), {entry.epochs:.2f} epochs"
            for entry in self.ledger(step)
        )

    @property
    def has_kinds(self) -> bool:
        """Whether the sources have tokens of more than one kind."""
        return len({kind for store in self.stores.values() for kind in store_kinds(store.manifest)}) > 1

    def kinds_table(self, step: int) -> str:
        """What the tokens of each source are, and those of all rows before `step`, as lines for people.

        A row's tokens are taken to be of the store's kinds in the store's shares; without sources that have other
        tokens than text there is no line.
        """
        given, lines, run = self.schedule.tokens_given(step), [], Counter[str]()
        for name, store in self.stores.items():
            kinds, tokens = store_kinds(store.manifest), store.manifest.num_tokens
            run.update({kind: given[name] * count / tokens for kind, count in kinds.items()})
            if len(kinds) > 1:
                lines.append(f"kinds:      {name}: {_listed(kinds)} (of the whole store)")
        return "\n".join([*lines, f"kinds:      of the run's tokens {_listed(run)}"] if lines else [])

    def fingerprints(self) -> dict[str, str]:
        """A fingerprint (counts and checksums) of every store, by "<source>/<split>"."""
        train = {f"{name}/{self._config.data.split}": store for name, store in self.stores.items()}
        held_out = {f"{name}/{self._config.eval.split}": store for name, store in self.eval_stores.items()}
        return {name: _fingerprint(store) for name, store in (train | held_out).items()}

    def record(self, step: int) -> dict[str, Any]:
        """The data position for a checkpoint, with the hashes of the schedule and stores that it refers to."""
        return {
            "step": step,
            "schedule_hash": self.schedule.hash,
            "phases": [{"start_step": start, "rates": rates} for start, rates in self.schedule.starts()],
            "rows_given": {name: int(rows) for name, rows in self.schedule.cumulative(step).items() if rows},
            "stores": {name: _fingerprint(store) for name, store in self.stores.items()},
        }


def store_kinds(manifest: Manifest) -> dict[str, int]:
    """A store's tokens by kind, without those that it has none of; in chats what the user says counts as masked."""
    kinds = manifest.extra.get("token_kinds")
    if kinds is None:
        learned = manifest.extra.get("num_loss_tokens", manifest.num_tokens)
        kinds = {"tag": manifest.num_tag_tokens, "masked": manifest.num_tokens - learned}
    text = manifest.num_tokens - sum(kinds.values())
    return {kind: count for kind, count in {"text": text, **kinds}.items() if count}


def _listed(kinds: Mapping[str, float | int]) -> str:
    total = sum(kinds.values())
    return ", ".join(f"{round(count):,} {kind} ({count / total:.2%})" for kind, count in kinds.items())


def make_schedule(config: ConfigDict) -> MixtureSchedule:
    """The mixture schedule of a config; ValueError names the phase and the value at fault."""
    try:
        return MixtureSchedule(
            config.data.phases, batch_size=config.batch_size, seq_len=config.seq_len, total_steps=config.total_steps
        )
    except ValueError as error:
        raise ValueError(f"data.phases: {error}") from error


def _open_all(
    config: ConfigDict, tokenizer: Tokenizer, field: str, sources: Iterable[str], split: str
) -> dict[str, TokenStore]:
    """The stores of the sources that a field of the config names."""
    root, stores = config.data.root, {}
    for source in sources:
        try:
            stores[source] = TokenStore.open(f"{root}/{source}/{split}", vocab_hash=tokenizer.hash)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{field}: {_lacking(root, source, split)}: {error}") from error
        if (end := stores[source].manifest.eos_id) != tokenizer.eos_id:
            here, there = (tokenizer.special_token(token) for token in (tokenizer.eos_id, end))
            store = f"{root}/{source}/{split}"
            raise ValueError(
                f"{field}: documents of {store} end with {there!r} (id {end}), this run's with {here!r}: "
                f"give --config.document_end={there!r}, or cache them again with --document_end"
            )
    return stores


def _lacking(root: str, source: str, split: str) -> str:
    """Says which part of a source's split is missing, and how to make it."""
    if os.path.isdir(f"{root}/{source}/{split}"):
        return f"{root}/{source}/{split} is not whole"
    if splits := sorted(path.parent.name for path in Path(root).glob(f"{source}/*/{MANIFEST_NAME}")):
        return (
            f"source {source} has no split {split} in data.root {root!r} (it has {', '.join(splits)}); `cache_tasks "
            f"--splits={split}` writes it from {split} files, or from what --validation_fraction holds out"
        )
    others = sorted(path.parent.parent.name for path in Path(root).glob(f"*/{split}/{MANIFEST_NAME}"))
    return f"data.root {root!r} lacks source {source}" + (f" (it has {', '.join(others)})" if others else "")


def _fingerprint(store: TokenStore) -> str:
    manifest = store.manifest
    checksums = "".join(shard.content_hash()[:8] for shard in manifest.shards)
    return f"{manifest.num_documents} documents, {manifest.num_tokens} tokens, checksums {checksums}"


def _to_devices(batch: Batch, sharding: NamedSharding) -> Batch:
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)
