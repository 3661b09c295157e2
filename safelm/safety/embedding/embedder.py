"""Embeds many texts: chunks in length-bucketed batches, with model, pooling and head in one compiled program.

A bucket is a row length; its batches have as many rows as fit into `batch_tokens`. So the set of programs is fixed, one
per bucket (`batch_plan` says how many), and every batch costs about the same. Chunks are sorted by length among those
of 512 batches, and what doesn't fill a batch waits for the next ones. Several local devices share the rows of a batch.

On a CPU each core computes a batch of its own: a layer's output stays in that core's cache, and no core waits for
another between two operations.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int32, PyTree

from safelm.io import cores
from safelm.models.arrays import Params
from safelm.safety.embedding import batch_plan
from safelm.safety.embedding.backbone import Backbone

CPU_BATCH_TOKENS = 512  # what one layer makes of them stays in a core's cache; larger batches are slower
BATCH_TOKENS = 16_384
_WINDOW_BATCHES, _LEAST_WINDOW = 512, 1 << 18  # chunks are sorted by length among so many batches', or tokens' worth
_CHARACTERS = 4  # of a token, about

Head = Callable[[PyTree, jax.Array], PyTree]


class Embedder:
    """Embeds texts with a backbone, its parameters on all local devices or the first of them.

    Args:
      params: fine-tuned parameters in place of the backbone's own.
      batch_tokens: tokens in a device's batch, including padding. Default: 512 on CPUs, 16,384 elsewhere. A longer row
        is a batch of its own.
      devices: how many local devices share the rows of a batch; 0 for all.

    Attributes:
      usage: what was done so far: "tokens" read, "positions" computed (tokens and padding), "programs" compiled.
    """

    def __init__(
        self, backbone: Backbone, params: Params | None = None, batch_tokens: int | None = None, devices: int = 0
    ):
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens}: must be at least 1")
        there = jax.local_devices()
        if not 0 <= devices <= len(there):
            raise ValueError(f"devices={devices}: there are {len(there)} here")
        chosen = there[:devices] if devices else there
        self.backbone = backbone
        self._is_cpu = chosen[0].platform == "cpu"
        self.buckets = batch_plan.bucket_lengths(backbone.max_tokens)
        self._batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if self._is_cpu else BATCH_TOKENS)
        self._at_once = max(_cores() // len(chosen), 1) if self._is_cpu else 1
        self._mesh = jax.sharding.Mesh(np.array(chosen), ("batch",))
        self._params = self._replicated(backbone.params if params is None else params)
        self._programs: dict[Head, Any] = {}
        self._compiled: set[tuple[Head, int]] = set()
        self.usage = {"tokens": 0, "positions": 0, "programs": 0}

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
        found: list[tuple[list[int], np.ndarray]] = []
        waiting: list[tuple[int, np.ndarray]] = []
        tokens = 0
        pool = ThreadPoolExecutor(self._at_once)
        try:
            for document, chunk in self.backbone.tokenizer.chunks(texts, self.backbone.max_tokens):
                waiting.append((len(documents), chunk))
                documents.append(document)
                tokens += len(chunk)
                if tokens >= self._window_tokens:
                    waiting = self._map_window(waiting, fn_params, fn, pool, found, is_last=False)
                    tokens = sum(len(left) for _, left in waiting)
            self._map_window(waiting, fn_params, fn, pool, found, is_last=True)
        finally:
            pool.shutdown(cancel_futures=True)
        if not found:
            inputs = self._padded([], self.buckets[0])
            shape = jax.eval_shape(self._program(fn), self._params, fn_params, *inputs)
            return np.zeros((0, *shape.shape[1:]), shape.dtype), np.zeros(0, np.int32)
        out = np.empty((len(documents), *found[0][1].shape[1:]), found[0][1].dtype)
        for chunks, rows in found:
            out[chunks] = rows[: len(chunks)]
        return out, np.asarray(documents, np.int32)

    def _map_window(
        self,
        window: Sequence[tuple[int, np.ndarray]],
        fn_params: PyTree,
        fn: Head,
        pool: ThreadPoolExecutor,
        found: list[tuple[list[int], np.ndarray]],
        *,
        is_last: bool,
    ) -> list[tuple[int, np.ndarray]]:
        """Adds the results of the window's batches to `found`, with their chunks' numbers; the chunks that are left."""
        program = self._program(fn)

        def run(inputs: Sequence[np.ndarray]) -> np.ndarray:
            return np.asarray(program(self._params, fn_params, *inputs))

        pending: list[tuple[list[int], Future[np.ndarray] | jax.Array]] = []
        batches, left = batch_plan.plan([len(chunk) for _, chunk in window], self.buckets, self.rows, is_last=is_last)
        for batch, length in batches:
            inputs = self._padded([window[i][1] for i in batch], length)
            self.usage["tokens"] += sum(len(window[i][1]) for i in batch)
            self.usage["positions"] += inputs[0].size
            self.usage["programs"] += (fn, length) not in self._compiled
            numbers = [window[i][0] for i in batch]
            if self._at_once > 1 and (fn, length) in self._compiled:
                pending.append((numbers, pool.submit(run, inputs)))
            else:  # compiles here, so that no two threads do; the next batch is made ready while the device is at work
                pending.append((numbers, program(self._params, fn_params, *inputs)))
                self._compiled.add((fn, length))
        found += [
            (numbers, rows.result() if isinstance(rows, Future) else np.asarray(rows)) for numbers, rows in pending
        ]
        return [window[i] for i in left]

    @property
    def _window_tokens(self) -> int:
        return max(_LEAST_WINDOW, _WINDOW_BATCHES * self._batch_tokens * self._mesh.size)

    @property
    def batch_characters(self) -> int:
        """Characters of texts to give at once, so that batches are full."""
        return _CHARACTERS * self._window_tokens

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

    def _padded(self, chunks: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens_BT = np.full((self.rows(length), length), self.backbone.tokenizer.pad_id, np.int32)
        lengths_B = np.ones(self.rows(length), np.int32)
        for row, chunk in enumerate(chunks):
            tokens_BT[row, : len(chunk)] = chunk
            lengths_B[row] = len(chunk)
        return tokens_BT, lengths_B


def _cores() -> int:
    """Number of cores for computing: as the variable for XLA's threads says, otherwise those given to this process."""
    return int(os.environ.get("PJRT_NPROC") or len(cores.usable()))


def _identity(_: PyTree, x_BD: jax.Array) -> jax.Array:
    return x_BD
