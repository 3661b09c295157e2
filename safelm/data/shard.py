"""One shard of a token store: written as a stream, visible only when whole."""

import dataclasses
import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from safelm.io import records
from safelm.io.files import file_sha256

BLOCK_BYTES = 1 << 16  # of tokens, each with a checksum of its own


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One shard's counts, file sizes (bytes) and SHA-256 checksums; `fingerprint` says what it was made from.

    A shard of an early version has no file of block checksums: `sums_bytes` is 0. Where every token is to be learned,
    as in web text, there is no file of loss spans: `spans_bytes` is 0.
    """

    index: int
    num_documents: int
    num_tokens: int
    num_tag_tokens: int
    max_token: int
    tokens_bytes: int
    bounds_bytes: int
    tokens_sha256: str
    bounds_sha256: str
    sums_bytes: int = 0
    sums_sha256: str = ""
    spans_bytes: int = 0
    spans_sha256: str = ""
    fingerprint: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def files(self) -> dict[str, tuple[int, str]]:
        """Size (bytes) and SHA-256 of its arrays: "tokens", "bounds" and, where it has them, "sums" and "spans"."""
        files = {"tokens": (self.tokens_bytes, self.tokens_sha256), "bounds": (self.bounds_bytes, self.bounds_sha256)}
        files |= {"sums": (self.sums_bytes, self.sums_sha256)} if self.sums_bytes else {}
        return files | ({"spans": (self.spans_bytes, self.spans_sha256)} if self.spans_bytes else {})


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_file(kind: str, index: int, num_shards: int) -> str:
    """File name of a shard's "tokens", "bounds", "sums", "spans" (.npy) or "shard" (.json)."""
    return f"{kind}-{index:05d}-of-{num_shards:05d}.{'json' if kind == 'shard' else 'npy'}"


class ShardWriter:
    """Streams documents into one shard; nothing has a final name until `close`.

    A context manager: leaving it by an exception removes the temporary files. `add` and `close` raise `OSError`
    naming the file when the disk is full, and leave nothing behind.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        shard_index: int,
        num_shards: int,
        dtype: np.dtype | str | type,
        *,
        harm_tag_id: int,
        fingerprint: str = "",
    ):
        """`harm_tag_id` is counted; `fingerprint` is handed back by `read_shard_info` when a later run continues."""
        if not 0 <= shard_index < num_shards:
            raise ValueError(f"shard_index must be in 0..{num_shards - 1}, got {shard_index}")
        self._directory, self._index, self._num_shards = os.fspath(directory), shard_index, num_shards
        self._dtype, self._harm_tag_id, self._fingerprint = np.dtype(dtype), harm_tag_id, fingerprint
        self._path = os.path.join(self._directory, shard_file("tokens", shard_index, num_shards))
        self._bounds, self._num_tags, self._max_token = [0], 0, -1
        self._spans: list[np.ndarray] = []
        self._has_loss_mask = False
        os.makedirs(self._directory, exist_ok=True)
        # A leftover marker would describe arrays that are about to be replaced.
        for kind in ("shard", "spans"):
            leftover = os.path.join(self._directory, shard_file(kind, shard_index, num_shards))
            if os.path.exists(leftover):
                os.remove(leftover)
        self._file = open(self._path + ".tmp", "wb")
        self._guard(lambda: _write_npy_header(self._file, self._dtype, 0))

    def add(self, tokens: np.ndarray | Sequence, loss_mask: np.ndarray | Sequence | None = None) -> None:
        """Appends one document, its end token included; ValueError when empty or an id does not fit the dtype.

        `loss_mask` says which of its tokens are to be learned, as in a chat the assistant's; without it, all are.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"{self._path}: document {len(self._bounds) - 1} must be a non-empty 1-D integer array, "
                f"got shape {tokens.shape} of {tokens.dtype}"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high > np.iinfo(self._dtype).max:
            raise ValueError(
                f"{self._path}: document {len(self._bounds) - 1} has token id {low if low < 0 else high}, "
                f"outside {self._dtype.name}"
            )
        learned = np.ones(tokens.size, bool) if loss_mask is None else np.asarray(loss_mask).astype(bool)
        if learned.shape != tokens.shape:
            raise ValueError(
                f"{self._path}: document {len(self._bounds) - 1} has {tokens.size} tokens and a loss mask of shape "
                f"{learned.shape}"
            )
        self._guard(lambda: self._file.write(tokens.astype(self._dtype, copy=False).tobytes()))
        self._spans.append(np.flatnonzero(np.diff(learned, prepend=False, append=False)) + self._bounds[-1])
        self._has_loss_mask |= loss_mask is not None
        self._bounds.append(self._bounds[-1] + tokens.size)
        self._num_tags += int(np.count_nonzero(tokens == self._harm_tag_id))
        self._max_token = max(self._max_token, high)

    def close(self, extra: Mapping[str, Any] | None = None) -> ShardInfo:
        """Puts both arrays, then the shard's JSON, under their final names; `extra` is stored in the JSON."""
        return self._guard(lambda: self._close(dict(extra or {})))

    def abort(self) -> None:
        """Removes the temporary files; safe to call twice."""
        self._file.close()
        for kind in ("tokens", "bounds", "sums", "spans", "shard"):
            path = os.path.join(self._directory, shard_file(kind, self._index, self._num_shards)) + ".tmp"
            if os.path.exists(path):
                os.remove(path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self.abort()
        elif not self._file.closed:
            self.close()

    def _close(self, extra: dict[str, Any]) -> ShardInfo:
        bounds_path, sums_path, spans_path = (
            os.path.join(self._directory, shard_file(kind, self._index, self._num_shards))
            for kind in ("bounds", "sums", "spans")
        )
        self._file.seek(0)
        _write_npy_header(self._file, self._dtype, self._bounds[-1])
        _sync_and_close(self._file)
        tokens_sha256, sums = _checksums(self._path + ".tmp", self._bounds[-1] * self._dtype.itemsize)
        _write_array(bounds_path + ".tmp", np.asarray(self._bounds, np.int64))
        _write_array(sums_path + ".tmp", sums)
        if self._has_loss_mask:
            _write_array(spans_path + ".tmp", np.concatenate(self._spans).astype(np.int64))
        info = ShardInfo(
            index=self._index,
            num_documents=len(self._bounds) - 1,
            num_tokens=self._bounds[-1],
            num_tag_tokens=self._num_tags,
            max_token=self._max_token,
            tokens_bytes=os.path.getsize(self._path + ".tmp"),
            bounds_bytes=os.path.getsize(bounds_path + ".tmp"),
            sums_bytes=os.path.getsize(sums_path + ".tmp"),
            tokens_sha256=tokens_sha256,
            bounds_sha256=file_sha256(bounds_path + ".tmp"),
            sums_sha256=file_sha256(sums_path + ".tmp"),
            spans_bytes=os.path.getsize(spans_path + ".tmp") if self._has_loss_mask else 0,
            spans_sha256=file_sha256(spans_path + ".tmp") if self._has_loss_mask else "",
            fingerprint=self._fingerprint,
            extra=extra,
        )
        for path in (self._path, bounds_path, sums_path, *([spans_path] if self._has_loss_mask else [])):
            os.replace(path + ".tmp", path)
        name = shard_file("shard", self._index, self._num_shards)
        records.write(os.path.join(self._directory, name), dataclasses.asdict(info))
        return info

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            try:
                self.abort()
            except OSError:  # closing flushes, which fails again on a full disk; the files are removed next
                self.abort()
            raise OSError(error.errno, f"cannot write token shard: {error.strerror or error}", self._path) from error


def read_shard_info(
    directory: str | os.PathLike,
    index: int,
    num_shards: int,
    *,
    fingerprint: str | None = None,
    elsewhere: Mapping[str, int] | None = None,
    verify_checksums: bool = False,
) -> ShardInfo | None:
    """The shard a former run completed here, or None if it is absent, damaged or made from something else.

    `elsewhere` has the sizes (bytes) of arrays that aren't here but, say, in a bucket; `verify_checksums` reads all of
    those that are here.
    """
    directory = os.fspath(directory)
    try:
        info = ShardInfo(**records.read(os.path.join(directory, shard_file("shard", index, num_shards)), ""))
        names = [shard_file(kind, index, num_shards) for kind in info.files()]
        sizes = [_size(os.path.join(directory, name), elsewhere or {}) for name in names]
    except (OSError, TypeError, ValueError):
        return None
    whole = sizes == [size for size, _ in info.files().values()] and fingerprint in (None, info.fingerprint)
    if whole and verify_checksums:
        paths = [os.path.join(directory, name) for name in names]
        sums = [wanted for _, wanted in info.files().values()]
        whole = all(file_sha256(p) == wanted for p, wanted in zip(paths, sums, strict=True) if os.path.exists(p))
    return info if whole else None


def _size(path: str, elsewhere: Mapping[str, int]) -> int:
    name = os.path.basename(path)
    return elsewhere[name] if name in elsewhere and not os.path.exists(path) else os.path.getsize(path)


def _sync_and_close(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def open_array(path: str, wanted_bytes: int) -> np.ndarray:
    """A numpy file mapped into memory; FileNotFoundError or ValueError when it is gone or of another size (bytes)."""
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: shard is missing, though the manifest lists it") from None
    if size != wanted_bytes:
        raise ValueError(f"{path}: truncated or replaced: {size} bytes, the manifest says {wanted_bytes}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        array = np.load(path, allow_pickle=False)  # numpy cannot map an empty array
    return array.view(np.ndarray)


def check_bounds(path: str, bounds: np.ndarray, shard: ShardInfo) -> None:
    """ValueError unless an array holds the bounds of a shard's documents, none of which is empty."""
    whole = bounds.dtype == np.int64 and bounds.shape == (shard.num_documents + 1,)
    if not whole or bounds[0] or bounds[-1] != shard.num_tokens or (np.diff(bounds) <= 0).any():
        raise ValueError(f"{path}: not the bounds of {shard.num_documents} documents of {shard.num_tokens} tokens")


def check_spans(path: str, spans: np.ndarray, shard: ShardInfo) -> None:
    """ValueError unless an array holds the loss spans of a shard: pairs of positions in it, in order."""
    whole = spans.dtype == np.int64 and spans.ndim == 1 and len(spans) % 2 == 0 and (np.diff(spans) >= 0).all()
    if not whole or (len(spans) and not 0 <= spans[0] <= spans[-1] <= shard.num_tokens):
        raise ValueError(f"{path}: not the loss spans of {shard.num_tokens} tokens")


def _checksums(path: str, data_bytes: int) -> tuple[str, np.ndarray]:
    """SHA-256 of a file, and the CRC-32 of every block of its last `data_bytes`."""
    digest, sums = hashlib.sha256(), []
    with open(path, "rb") as file:
        digest.update(file.read(os.path.getsize(path) - data_bytes))
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            sums.append(zlib.crc32(block))
    return digest.hexdigest(), np.asarray(sums, np.uint32)


def _write_array(path: str, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        _write_npy_header(file, array.dtype, len(array))
        file.write(array.tobytes())
        _sync_and_close(file)


def _write_npy_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    # numpy leaves room in the header for the first axis to grow: rewriting it with the final length fits exactly.
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
