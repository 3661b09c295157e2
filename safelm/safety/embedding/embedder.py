"""Embeds many texts: chunks in length-bucketed batches, with model, pooling and head in one compiled program.

A bucket is a row length; its batches have as many rows as fit into `batch_tokens`. So the set of programs is fixed, one
per bucket, and every batch costs about the same. Several local devices share the rows of a batch.

On a CPU each core computes a batch of its own: a layer's output stays in that core's cache, and no core waits for
another between two operations.
"""

import bisect
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int32, PyTree

from safelm.models.arrays import Params
from safelm.safety.embedding.backbone import Backbone

BUCKETS = (16, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144)
CPU_BUCKETS = (*range(8, 256, 8), *(length for length in BUCKETS if length >= 256))  # a third of the padding
CPU_BATCH_TOKENS = 512  # what one layer makes of them stays in a core's cache; larger batches are slower
BATCH_TOKENS = 16_384
_WINDOW_TOKENS = 1 << 18  # chunks are sorted by length among so many tokens' worth

Head = Callable[[PyTree, jax.Array], PyTree]


class Embedder:
    """Embeds texts with a backbone, its parameters on all local devices.

    Args:
      params: fine-tuned parameters in place of the backbone's own.
      batch_tokens: tokens in a device's batch, including padding. Default: 512 on CPUs, 16,384 elsewhere. A longer row
        is a batch of its own.
    """

    def __init__(self, backbone: Backbone, params: Params | None = None, batch_tokens: int | None = None):
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens}: must be at least 1")
        devices = jax.local_devices()
        self.backbone = backbone
        self._is_cpu = devices[0].platform == "cpu"
        self.buckets = bucket_lengths(backbone.max_tokens, CPU_BUCKETS if self._is_cpu else BUCKETS)
        self._batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if self._is_cpu else BATCH_TOKENS)
        self._at_once = max(_cores() // len(devices), 1) if self._is_cpu else 1
        self._mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
        self._params = self._replicated(backbone.params if params is None else params)
        self._programs: dict[Head, Any] = {}
        self._compiled: set[tuple[Head, int]] = set()

    def embed(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, "C D"], Int32[np.ndarray, " C"]]:
        """The embedding of every chunk (float32) and the index of its text, in the order of the texts."""
        return self.map_chunks(texts, None, _identity)

    def map_chunks(self, texts: Sequence[str], fn_params: PyTree, fn: Head) -> tuple[PyTree, Int32[np.ndarray, " C"]]:
        """Applies `fn(fn_params, embedding_BD)` to every chunk, in the same program as the embedding.

        Args:
          fn: a pure function of each row, from a batch of embeddings to an array [B, ...]. Pass the same function
            object each time, since another one is compiled again.

        Returns:
          The results of all chunks [C, ...] and the index of each chunk's text.
        """
        fn_params = self._replicated(fn_params)
        documents: list[int] = []
        results: list[np.ndarray] = []
        pool = ThreadPoolExecutor(self._at_once)
        try:
            for window in self._windows(texts):
                results.append(self._map_window(window, fn_params, fn, pool))
                documents += [document for document, _ in window]
        finally:
            pool.shutdown(cancel_futures=True)
        if not results:
            inputs = self._padded([], self.buckets[0])
            shape = jax.eval_shape(self._program(fn), self._params, fn_params, *inputs)
            return np.zeros((0, *shape.shape[1:]), shape.dtype), np.zeros(0, np.int32)
        return np.concatenate(results), np.asarray(documents, np.int32)

    def _map_window(
        self, window: Sequence[tuple[int, np.ndarray]], fn_params: PyTree, fn: Head, pool: ThreadPoolExecutor
    ) -> np.ndarray:
        program = self._program(fn)

        def run(inputs: Sequence[np.ndarray]) -> np.ndarray:
            return np.asarray(program(self._params, fn_params, *inputs))

        pending: list[tuple[list[int], Future[np.ndarray] | jax.Array]] = []
        for batch, length in self._batches([len(chunk) for _, chunk in window]):
            inputs = self._padded([window[i][1] for i in batch], length)
            if self._at_once > 1 and (fn, length) in self._compiled:
                pending.append((batch, pool.submit(run, inputs)))
            else:  # compiles here, so that no two threads do; the next batch is made ready while the device is at work
                pending.append((batch, program(self._params, fn_params, *inputs)))
                self._compiled.add((fn, length))
        found = [(batch, rows.result() if isinstance(rows, Future) else np.asarray(rows)) for batch, rows in pending]
        out = np.empty((len(window), *found[0][1].shape[1:]), found[0][1].dtype)
        for batch, rows in found:
            out[batch] = rows[: len(batch)]
        return out

    def rows(self, length: int) -> int:
        """Number of rows in a bucket's batch, over all devices."""
        return max(self._batch_tokens // length, 1) * self._mesh.size

    def _replicated(self, tree: PyTree) -> PyTree:
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def _program(self, fn: Head) -> Any:
        if fn not in self._programs:

            def run(params: Params, fn_params: PyTree, tokens_BT: jax.Array, lengths_B: jax.Array) -> PyTree:
                return fn(fn_params, self.backbone.pooled(params, tokens_BT, lengths_B))

            whole, rows = PartitionSpec(), PartitionSpec("batch")
            specs = {"in_specs": (whole, whole, rows, rows), "out_specs": rows}
            options = {"xla_cpu_multi_thread_eigen": False} if self._at_once > 1 else None
            sharded = jax.shard_map(run, mesh=self._mesh, **specs, check_vma=False)
            self._programs[fn] = jax.jit(sharded, compiler_options=options)
        return self._programs[fn]

    def _windows(self, texts: Sequence[str]) -> Iterator[list[tuple[int, np.ndarray]]]:
        window: list[tuple[int, np.ndarray]] = []
        tokens = 0
        limit = max(_WINDOW_TOKENS, 16 * self._batch_tokens * self._mesh.size)
        for document, chunk in self.backbone.tokenizer.chunks(texts, self.backbone.max_tokens):
            window.append((document, chunk))
            tokens += len(chunk)
            if tokens >= limit:
                yield window
                window, tokens = [], 0
        if window:
            yield window

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """The chunks of each batch and its bucket, longest first, so that only the last batch isn't full."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        start = 0
        while start < len(order):
            length = self.buckets[bisect.bisect_left(self.buckets, lengths[order[start]])]
            batch = order[start : start + self.rows(length)]
            yield batch, length
            start += len(batch)

    def _padded(self, chunks: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens_BT = np.full((self.rows(length), length), self.backbone.tokenizer.pad_id, np.int32)
        lengths_B = np.ones(self.rows(length), np.int32)
        for row, chunk in enumerate(chunks):
            tokens_BT[row, : len(chunk)] = chunk
            lengths_B[row] = len(chunk)
        return tokens_BT, lengths_B


def bucket_lengths(max_tokens: int, buckets: Sequence[int] = BUCKETS) -> tuple[int, ...]:
    """The row lengths of chunks of up to `max_tokens`."""
    return (*(length for length in buckets if length < max_tokens), max_tokens)


def _cores() -> int:
    """Number of cores for computing: as the variable for XLA's threads says, otherwise those given to this process."""
    return int(os.environ.get("PJRT_NPROC") or len(os.sched_getaffinity(0)))


def _identity(_: PyTree, x_BD: jax.Array) -> jax.Array:
    return x_BD
