"""Which step of a run saw which canary: from the run's data order, which is a function of seed and step."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from safelm.canaries.planting import Key
from safelm.checkpoints import checkpoint
from safelm.data.batches import Batches
from safelm.data.packing import PACKINGS
from safelm.data.store import TokenStore
from safelm.data.stream import Stream
from safelm.formats import sources
from safelm.io import records
from safelm.io.files import write_whole
from safelm.io.progress import Bar
from safelm.text.tokenizer import Tokenizer
from safelm.train.data import make_schedule

_ROWS_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class Sighting:
    """A part of a canary's document in a row of a step's batch; `tokens` of its `of` tokens."""

    canary: str
    document: int
    step: int
    row: int
    tokens: int
    of: int


def sightings(run: str, key: Key, source: str, step: int | None = None) -> tuple[list[Sighting], dict[str, Any]]:
    """What the batches before `step` had of the canaries, and facts of the run.

    Rows of an update that was not applied count too, as in the run's ledger. A document may be cut in two, in two rows
    of one step or of different ones.

    Args:
      run: folder of a training run, whose checkpoint tells whether its data are still those of its config.
      source: the store of the canaries in the run's mixture.
      step: None for the newest checkpoint's.

    Raises FileNotFoundError or ValueError naming the run, store or document that doesn't fit.
    """
    checkpoints, at, meta = checkpoint.open_checkpoint(run, step=step)
    checkpoints.close()
    config = ConfigDict(records.read(Path(run) / "config.json", "start the run again"))
    schedule = make_schedule(config)
    if source not in schedule.sources:
        raise ValueError(f"{run}: its mixture has no source {source!r}, it has {', '.join(schedule.sources)}")
    if (recorded := meta.get("data", {}).get("schedule_hash")) != schedule.hash:
        raise ValueError(f"{run}/config.json: its mixture is not that of checkpoint {at}, which has {recorded}")
    root, split = config.data.root, config.data.split
    stores = {name: TokenStore.open(f"{root}/{name}/{split}", verify_checksums=False) for name in schedule.sources}
    store = stores[source]
    check_store(store, key, sources.load_tokenizer(run))
    batches = Batches(stores, schedule, packing=config.data.packing)
    by_row = _documents_of_rows(store, config.seq_len, config.data.packing)
    found = list(Bar(_seen(batches, config.seed, source, at, by_row, key, store), unit=" sighting", disable=None))
    facts = {"run": run, "step": at, "source": source, "epochs": batches.epochs(at)[source]}
    facts |= {"tokens_of_store": store.num_tokens, "tokens_given": schedule.tokens_given(at)[source]}
    return found, facts


def check_store(store: TokenStore, key: Key, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless the store's documents are the planted ones, in their order."""
    where = store.url or store.directory
    texts = key.texts()
    if store.num_documents != len(texts):
        raise ValueError(f"{where}: has {store.num_documents} documents, {key.folder} planted {len(texts)}")
    for index, ids in enumerate(tokenizer.encode_batch(texts)):
        if not np.array_equal(store.document(index)[:-1], ids):
            raise ValueError(f"{where}: document {index} is not that of {key.folder}: cache its task 'canaries'")


def summarize(found: list[Sighting], key: Key) -> dict[str, dict[str, float | int]]:
    """By canary: documents planted, copies seen (tokens seen over a document's tokens), first and last step."""
    summary: dict[str, dict[str, float | int]] = {}
    for canary in key.canaries.values():
        own = [each for each in found if each.canary == canary.id]
        steps = {"first_step": min(e.step for e in own), "last_step": max(e.step for e in own)} if own else {}
        seen = sum(each.tokens / each.of for each in own)
        summary[canary.id] = {"planted": canary.dose, "seen": round(seen, 6), **steps}
    return summary


def write(output: str, found: list[Sighting], facts: Mapping[str, Any], key: Key) -> dict[str, Any]:
    """Writes provenance.jsonl, a line a sighting, and then provenance.json, by canary; returns the latter."""
    folder = Path(output)
    lines = "".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in found)
    write_whole(folder / "provenance.jsonl", lines)
    told = {**facts, "sightings": len(found), "canaries": summarize(found, key)}
    write_whole(folder / "provenance.json", json.dumps(told, indent=1) + "\n")
    return told


def _documents_of_rows(store: TokenStore, seq_len: int, packing: str) -> list[list[tuple[int, int]]]:
    """(document, tokens) of every row of a store."""
    plan, stream = PACKINGS[packing](store, seq_len), Stream([store])
    offsets = zip(store.token_offsets[:-1], store.shard_bounds, strict=True)
    starts = np.concatenate([offset + np.asarray(bounds[:-1], np.int64) for offset, bounds in offsets])
    rows: list[list[tuple[int, int]]] = [[] for _ in range(plan.num_rows)]
    for begin in range(0, plan.num_rows, _ROWS_AT_ONCE):
        row_b = np.arange(begin, min(begin + _ROWS_AT_ONCE, plan.num_rows))
        pieces = plan.pieces([plan], stream, np.zeros(len(row_b), np.int32), row_b)
        documents = np.searchsorted(starts, pieces.start, side="right") - 1
        for place, document, length in zip(pieces.place, documents, pieces.length, strict=True):
            rows[begin + int(place) // seq_len].append((int(document), int(length)))
    return rows


def _seen(
    batches: Batches,
    seed: int,
    source: str,
    steps: int,
    by_row: list[list[tuple[int, int]]],
    key: Key,
    store: TokenStore,
) -> Iterator[Sighting]:
    number = batches.sources.index(source)
    lengths = [len(store.document(index)) for index in range(store.num_documents)]
    for step in range(steps):
        source_ids_B, rows_B = batches.locate(seed, step, 0, batches.schedule.batch_size)
        for row in np.flatnonzero(source_ids_B == number).tolist():
            for document, tokens in by_row[int(rows_B[row])]:
                yield Sighting(key.documents[document], document, step, row, tokens, lengths[document])
