"""Runs a task on batches of documents, without the graph of single examples that SeqIO makes of its steps.

That graph costs as much as tokenizing. A task is run without it where its source has `document_batches` and its steps
`on_documents`, as those of `data_tasks` do; the examples are those that SeqIO would give, in the same order.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Shaped

_AHEAD = 2  # batches that are read while one is encoded


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """Documents' tokens end to end, each document's end included, and what is counted of each document.

    Attributes:
      channels: numbers for each token by the name of their channel (`safelm.data.channels`).
      lost_bytes: bytes of the text without a token.
      removed_tags: literal tags that the text had.
      cut_tokens: tokens that were cut off.
      unmarked: 1 where the task marks what is beside a text (spans, notes, metadata) and there was nothing to mark.
    """

    ids: Sequence[str]
    tokens: Int32[np.ndarray, " tokens"]
    lengths: Int32[np.ndarray, " documents"]
    channels: Mapping[str, Shaped[np.ndarray, " tokens"]]
    lost_bytes: Int32[np.ndarray, " documents"]
    removed_tags: Int32[np.ndarray, " documents"]
    cut_tokens: Int32[np.ndarray, " documents"]
    unmarked: Int32[np.ndarray, " documents"]

    def one_by_one(self) -> Iterator[tuple[str, np.ndarray, dict[str, np.ndarray]]]:
        """Id, tokens and channels of each document."""
        stops = np.cumsum(self.lengths).tolist()
        for doc_id, start, stop in zip(self.ids, [0, *stops], stops, strict=False):
            yield doc_id, self.tokens[start:stop], {name: each[start:stop] for name, each in self.channels.items()}


@runtime_checkable
class BatchSource(Protocol):
    """A SeqIO data source that also gives its documents as they are, in lists."""

    def document_batches(self, split: str, index: int, num_shards: int) -> Iterator[Sequence[Any]]: ...


@runtime_checkable
class Filter(Protocol):
    """A step that keeps some documents."""

    def on_documents(self, documents: Sequence[Any]) -> Sequence[Any]: ...


@runtime_checkable
class Encoder(Protocol):
    """The last step, from documents to tokens; `channel_names` are of what every batch has beside its tokens."""

    channel_names: Sequence[str]

    def on_documents(self, documents: Sequence[Any]) -> EncodedBatch: ...


@dataclasses.dataclass(frozen=True)
class BatchedTask:
    """A task whose source and steps all take batches."""

    source: BatchSource
    filters: Sequence[Filter]
    encoder: Encoder

    def batches(self, split: str, index: int, num_shards: int) -> Iterator[EncodedBatch]:
        """The shard's documents; while a batch is encoded in another thread, the next ones are read."""
        return _in_order(self._encode, self.source.document_batches(split, index, num_shards))

    def _encode(self, documents: Sequence[Any]) -> EncodedBatch | None:
        for step in self.filters:
            documents = step.on_documents(documents)
        return self.encoder.on_documents(documents) if documents else None


def batched(task: Any) -> BatchedTask | None:
    """The task in batches; None for one with a source or a step that only SeqIO can run."""
    *filters, last = task.preprocessors or [None]
    if not isinstance(task.source, BatchSource) or not isinstance(last, Encoder):
        return None
    if not all(isinstance(step, Filter) and not isinstance(step, Encoder) for step in filters):
        return None
    return BatchedTask(task.source, filters, last)


def _in_order(
    encode: Callable[[Sequence[Any]], EncodedBatch | None], batches: Iterable[Sequence[Any]]
) -> Iterator[EncodedBatch]:
    """What `encode` makes of each batch but None; an error of reading comes after what was read before it."""
    pending: collections.deque[Any] = collections.deque()
    with ThreadPoolExecutor(1, "encoding") as pool:
        try:
            for batch in itertools.chain(_readable(batches), [None] * _AHEAD):
                pending.append(pool.submit(_made, encode, batch))
                if len(pending) > _AHEAD and (made := pending.popleft().result()) is not None:
                    yield made
        finally:
            for future in pending:
                future.cancel()


def _readable(batches: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any] | Exception]:
    """The batches, and the error that ends them, if one does."""
    try:
        yield from batches
    except Exception as error:
        yield error


def _made(encode: Callable[[Sequence[Any]], EncodedBatch | None], batch: Any) -> EncodedBatch | None:
    if isinstance(batch, Exception):
        raise batch
    return None if batch is None else encode(batch)
