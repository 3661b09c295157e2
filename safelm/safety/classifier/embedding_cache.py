"""Embeddings on disk, so that what was computed once is computed once: safe to interrupt at any time.

    <folder>/<backbone's fingerprint>/<hash of the texts>.npz    one batch of texts: keys, chunks per text, vectors

A file appears under its name only when it is whole. No text is stored, only sha256 keys.
"""

import hashlib
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32

from safelm.io.files import write_whole
from safelm.io.progress import Bar
from safelm.safety.embedding import Embedder

_BATCH_TEXTS = 64


class CachedEmbedder:
    """`Embedder.embed` that remembers, on disk where `folder` is given."""

    def __init__(self, embedder: Embedder, folder: str | None = None):
        self._embedder = embedder
        self._folder = pathlib.Path(folder) / embedder.backbone.fingerprint[:24] if folder else None
        self._known: dict[str, np.ndarray] = {}
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("[!.]*.npz")):
                self._read(path)

    def embed(
        self, texts: Sequence[str], description: str = "embed"
    ) -> tuple[Float[np.ndarray, "C D"], Int32[np.ndarray, " C"]]:
        """As `Embedder.embed`; texts of about the same length are computed together."""
        keys = [_key(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        order = sorted(missing, key=lambda key: len(missing[key]))
        with Bar(total=len(order), desc=description, unit=" texts", disable=None) as progress:
            for start in range(0, len(order), _BATCH_TEXTS):
                batch = order[start : start + _BATCH_TEXTS]
                self._compute(batch, [missing[key] for key in batch])
                progress.update(len(batch))
        found = [self._known[key] for key in keys]
        text_C = np.repeat(np.arange(len(found), dtype=np.int32), [len(x_CD) for x_CD in found])
        return np.concatenate(found) if found else np.zeros((0, self._embedder.backbone.dim), np.float32), text_C

    def _compute(self, keys: Sequence[str], texts: Sequence[str]) -> None:
        x_CD, text_C = self._embedder.embed(texts)
        chunks_N = np.bincount(text_C, minlength=len(texts))
        if self._folder:
            name = f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:24]}.npz"
            arrays = {"keys": np.asarray(keys), "chunks": chunks_N, "vectors": x_CD}
            write_whole(self._folder / name, lambda path: np.savez(path, **arrays))
        self._remember(keys, chunks_N, x_CD)

    def _read(self, path: pathlib.Path) -> None:
        try:
            with np.load(path) as found:
                self._remember(found["keys"].tolist(), found["chunks"], found["vectors"])
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a cache of embeddings; remove it ({type(error).__name__})") from None

    def _remember(self, keys: Sequence[str], chunks_N: np.ndarray, x_CD: np.ndarray) -> None:
        self._known |= dict(zip(keys, np.split(x_CD, np.cumsum(chunks_N)[:-1]), strict=True))


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
