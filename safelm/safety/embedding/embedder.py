"""Embeddings of many texts: chunks in length-bucketed batches, model, pooling and head in one compiled program.

A bucket is a row length; a batch of it has as many rows as `batch_tokens` hold. So there is one program a bucket and
a fixed set of them, whatever the texts are, and every batch costs about the same.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32

from safelm.safety.embedding.backbone import Backbone, Params

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
BATCH_TOKENS = 4096
_WINDOW_BATCHES = 64  # chunks are sorted into buckets among this many batches' worth

Head = Callable[[Any, jax.Array], Any]


class Embedder:
    """Embeds texts with a backbone, its parameters on the device.

    Args:
      params: instead of the backbone's own (fine-tuned ones).
      batch_tokens: tokens in a batch, padding included; a row longer than that makes a batch of its own.
    """

    def __init__(self, backbone: Backbone, params: Params | None = None, batch_tokens: int = BATCH_TOKENS):
        self.backbone = backbone
        self.buckets = bucket_lengths(backbone.max_tokens)
        self._batch_tokens = batch_tokens
        self._params = jax.device_put(backbone.params if params is None else params)
        self._programs: dict[Head, Any] = {}

    def embed(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, "C D"], Int32[np.ndarray, " C"]]:
        """The embedding of every chunk, float32, and the index of the text that each is of; in the texts' order."""
        return self.map_chunks(texts, None, _identity)

    def map_chunks(self, texts: Sequence[str], fn_params: Any, fn: Head) -> tuple[Any, Int32[np.ndarray, " C"]]:
        """`fn(fn_params, embedding_BD)` of every chunk, computed in the same program as the embedding.

        Args:
          fn: pure; from a batch of embeddings to an array of rows [B, ...]. Give the same function each time: a new
            one is compiled anew.

        Returns:
          The results of all chunks [C, ...] and the index of each chunk's text.
        """
        program = self._program(fn)
        documents: list[int] = []
        results: list[np.ndarray] = []
        for window in self._windows(texts):
            rows: list[Any] = [None] * len(window)
            for batch, length in self._batches([len(chunk) for _, chunk in window]):
                tokens_BT, lengths_B = self._padded([window[i][1] for i in batch], length)
                out = np.asarray(program(self._params, fn_params, tokens_BT, lengths_B))
                for row, i in zip(out, batch, strict=False):
                    rows[i] = row
            documents += [document for document, _ in window]
            results += rows
        if not results:
            shape = jax.eval_shape(program, self._params, fn_params, *self._padded([], self.buckets[0]))
            return np.zeros((0, *shape.shape[1:]), shape.dtype), np.zeros(0, np.int32)
        return np.stack(results), np.asarray(documents, np.int32)

    def rows(self, length: int) -> int:
        """Rows in a batch of a bucket."""
        return max(self._batch_tokens // length, 1)

    def _program(self, fn: Head) -> Any:
        if fn not in self._programs:

            def run(params: Params, fn_params: Any, tokens_BT: jax.Array, lengths_B: jax.Array) -> Any:
                return fn(fn_params, self.backbone.pooled(params, tokens_BT, lengths_B))

            self._programs[fn] = jax.jit(run)
        return self._programs[fn]

    def _windows(self, texts: Sequence[str]) -> Iterator[list[tuple[int, np.ndarray]]]:
        window: list[tuple[int, np.ndarray]] = []
        tokens = 0
        for document, chunk in self.backbone.tokenizer.chunks(texts, self.backbone.max_tokens):
            window.append((document, chunk))
            tokens += len(chunk)
            if tokens >= _WINDOW_BATCHES * self._batch_tokens:
                yield window
                window, tokens = [], 0
        if window:
            yield window

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Which chunks make a batch, and its bucket: from the longest on, so that only the last one isn't full."""
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


def bucket_lengths(max_tokens: int) -> tuple[int, ...]:
    """The row lengths for chunks of up to `max_tokens`."""
    return (*(length for length in BUCKETS if length < max_tokens), max_tokens)


def _identity(_: Any, x_BD: jax.Array) -> jax.Array:
    return x_BD
