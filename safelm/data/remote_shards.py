"""Shards of a token store behind a URL: the first batch at once, whole shards as far as the local cache has room.

An epoch is a permutation of the rows of the whole store, so a host wants a few kilobytes from anywhere at any time:
no shard, once read from, is likelier to be wanted next than any other. Whole shards on demand would therefore be
fetched in the first steps and, where the disk is smaller than the store, again and again; and no eviction beats keeping
a fixed part. So:

- Tokens come in blocks of 64 KiB, all that a batch needs at once, each checked by its CRC-32 (in `sums-*.npy`).
- A shard that was read from is also copied whole in the background, two at a time, while the cache has room (see
  `safelm.io.cache`), checked by its SHA-256, and mapped into memory from then on. Shards up to 4 MiB are copied at
  the first read.
- A shard's bounds, 8 bytes a document, block checksums and loss spans are copied at its first read.

For 600B tokens of uint16 (1.2 TB, say 1,200 shards of 1 GB and 750M documents) on 64 hosts with 100 GB of disk, 2,048
tokens a row: a host reads 4.6M rows an epoch, 19 GB of tokens in blocks of together 300 GB, and 6 GB of bounds and
75 MB of checksums, which stay. At 2.5M tokens/s in all a host makes 19 requests/s of 64 KiB (1.2 MB/s): at 50 ms each,
one connection's worth. The cache's 40 to 90 GB make one in thirteen to thirty of them local; copying fills it once.
The first step of 16 rows a host waits for 16 bounds of 5 MB and 16 blocks. A store that fits is all local after its
size has been copied once; then reading is that of a local store.
"""

import collections
import hashlib
import io
import logging
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tqdm
from jaxtyping import Int, UInt

from safelm.data.shard import BLOCK_BYTES, ShardInfo, check_bounds, check_spans, open_array, shard_file
from safelm.io import remote
from safelm.io.cache import CacheFolder

_WHOLE_AT_ONCE_BYTES = 4 << 20
_KEPT_BLOCKS = 4096  # 256 MiB
_COPIERS = 2
_FILES_AT_ONCE = 16

_logger = logging.getLogger(__name__)


class RemoteShards:
    """The arrays of the shards of one remote store; safe to use from several threads."""

    def __init__(self, url: str, shards: Sequence[ShardInfo], dtype: str, folder: CacheFolder):
        """Checks names and sizes by listing the store; FileNotFoundError or ValueError names the file."""
        self.url, self._infos, self._dtype, self._folder = url, shards, np.dtype(dtype), folder
        self._mapped: dict[tuple[str, int], np.ndarray] = {}
        self._blocks: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
        self._lock, self._file_locks = threading.Lock(), collections.defaultdict(threading.Lock)
        self._to_copy: collections.deque[int] = collections.deque()
        self._asked: set[int] = set()
        self._copiers = 0
        self._failed: dict[int, Exception] = {}
        self._check_listing()
        self.tokens = [ShardTokens(self, index) for index in range(len(shards))]
        self.bounds = ShardBounds(self, len(shards))

    def num_tokens(self, shard: int) -> int:
        """Tokens in a shard."""
        return self._infos[shard].num_tokens

    def local(self, kind: str, shard: int) -> np.ndarray:
        """The "bounds", "sums" or "spans" of a shard, fetched if need be."""
        array = self._mapped.get((kind, shard))
        return self._bring(kind, shard) if array is None else array

    def bring(self, shards: Iterable[int], *kinds: str) -> None:
        """Fetches files ("bounds", "sums", "spans", "tokens") of several shards at once, with a progress bar."""
        missing = [
            (kind, shard)
            for shard in shards
            for kind in kinds
            if (kind, shard) not in self._mapped and kind in self._infos[shard].files()
        ]
        if len(missing) < 2:
            for kind, shard in missing:
                self._bring(kind, shard)
            return
        size = sum(self._infos[shard].files()[kind][0] for kind, shard in missing)
        with (
            ThreadPoolExecutor(_FILES_AT_ONCE) as pool,
            tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=self.url, disable=None, delay=2.0) as bar,
        ):
            for (kind, shard), _ in zip(missing, pool.map(lambda file: self._bring(*file), missing), strict=True):
                bar.update(self._infos[shard].files()[kind][0])

    def prefetch(
        self, shards: Int[np.ndarray, " n"], starts: Int[np.ndarray, " n"], stops: Int[np.ndarray, " n"]
    ) -> None:
        """Fetches together what holds the tokens [start, stop) of each shard (positions in the shard)."""
        wanted = set(shards.tolist())
        small = [shard for shard in wanted if self._infos[shard].tokens_bytes <= _WHOLE_AT_ONCE_BYTES]
        self.bring(small, "tokens")
        by_blocks = {shard for shard in wanted if self.whole(shard) is None}
        if not by_blocks:
            return
        size = BLOCK_BYTES // self._dtype.itemsize
        blocks = {
            (shard, block)
            for shard, start, stop in zip(shards.tolist(), starts.tolist(), stops.tolist(), strict=True)
            if shard in by_blocks
            for block in range(start // size, -(-min(stop, self._infos[shard].num_tokens) // size))
        }
        self._fetch(sorted(blocks))

    def whole(self, shard: int) -> np.ndarray | None:
        """All tokens of a shard when they are local; otherwise asks for a copy. Raises what the copying met."""
        array = self._mapped.get(("tokens", shard))
        if array is not None:
            return array
        with self._lock:
            if shard in self._failed:
                raise self._failed[shard]
            if shard in self._asked:
                return None
            self._asked.add(shard)
        if self._infos[shard].tokens_bytes <= _WHOLE_AT_ONCE_BYTES:
            return self._bring("tokens", shard)
        self._copy_later(shard)
        return None

    def read(self, shard: int, start: int, stop: int) -> UInt[np.ndarray, " n"]:
        """Tokens [start, stop) of a shard by blocks."""
        size = BLOCK_BYTES // self._dtype.itemsize
        first, last = start // size, max(start, stop - 1) // size
        if stop <= start:
            return np.empty(0, self._dtype)
        blocks = self._fetch([(shard, block) for block in range(first, last + 1)])
        joined = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        return joined[start - first * size : stop - first * size]

    def take(self, shard: int, positions: Int[np.ndarray, " n"]) -> UInt[np.ndarray, " n"]:
        """The tokens at positions of a shard by blocks."""
        size = BLOCK_BYTES // self._dtype.itemsize
        numbers, which = np.unique(positions // size, return_inverse=True)
        blocks = self._fetch([(shard, block) for block in numbers.tolist()])
        return np.asarray([blocks[i][at] for i, at in zip(which, positions % size, strict=True)], self._dtype)

    def verify(self) -> None:
        """Reads every file once; ValueError names the first whose checksum is not the manifest's."""
        self.bring(range(len(self._infos)), "bounds", "sums", "spans", "tokens")
        size = BLOCK_BYTES // self._dtype.itemsize
        for shard, info in enumerate(self._infos):
            if ("tokens", shard) in self._mapped:
                continue
            if not info.sums_bytes:
                _read_checked(self._url_of("tokens", shard), info.tokens_bytes, info.tokens_sha256)
            else:
                for start in range(0, info.num_tokens, 64 * size):
                    self.read(shard, start, min(start + 64 * size, info.num_tokens))

    def _url_of(self, kind: str, shard: int) -> str:
        return f"{self.url}/{shard_file(kind, shard, len(self._infos))}"

    def _check_listing(self) -> None:
        sizes = remote.list_sizes(self.url)
        if sizes is None:
            return
        for shard, info in enumerate(self._infos):
            for kind, (wanted, _) in info.files().items():
                name = shard_file(kind, shard, len(self._infos))
                if self._folder.has(name):
                    continue
                if name not in sizes:
                    raise FileNotFoundError(f"{self.url}/{name}: shard is missing, though the manifest lists it")
                if sizes[name] != wanted:
                    raise ValueError(
                        f"{self.url}/{name}: truncated or replaced: {sizes[name]} bytes, the manifest says {wanted}"
                    )

    # ---- whole files ----

    def _bring(self, kind: str, shard: int, *, wait: bool = True) -> np.ndarray | None:
        """A file's array, checked, from the cache or fetched into it; the smaller kinds into memory without room.

        None for tokens where there is no room. BlockingIOError if another process is copying the file and this one does
        not `wait`.
        """
        with self._lock:
            file_lock = self._file_locks[kind, shard]
        with file_lock:
            if (kind, shard) in self._mapped:
                return self._mapped[kind, shard]
            size, sha256 = self._infos[shard].files()[kind]
            url, name = self._url_of(kind, shard), shard_file(kind, shard, len(self._infos))
            spare = self._spare_bytes() if kind == "tokens" else 0
            path = self._folder.obtain(
                name, size, sha256, lambda file: remote.download(url, size, file), wait=wait, spare=spare
            )
            if path is not None:
                array = open_array(path, size)
            elif kind == "tokens":
                return None
            else:
                array = np.load(io.BytesIO(_read_checked(url, size, sha256)), allow_pickle=False)
            self._check_array(kind, shard, array)
            self._mapped[kind, shard] = array
            return array

    def _spare_bytes(self) -> int:
        """Room that bounds, block checksums and loss spans not yet there will take: tokens leave it to them."""
        small = (info for shard, info in enumerate(self._infos) if ("bounds", shard) not in self._mapped)
        return sum(info.bounds_bytes + info.sums_bytes + info.spans_bytes for info in small)

    def _check_array(self, kind: str, shard: int, array: np.ndarray) -> None:
        info, blocks = self._infos[shard], BLOCK_BYTES // self._dtype.itemsize
        if kind in ("bounds", "spans"):
            (check_bounds if kind == "bounds" else check_spans)(self._url_of(kind, shard), array, info)
            return
        wanted = {
            "tokens": (self._dtype, info.num_tokens),
            "sums": (np.dtype(np.uint32), -(-info.num_tokens // blocks)),
        }[kind]
        if (array.dtype, array.shape) != (wanted[0], (wanted[1],)):
            raise ValueError(
                f"{self._url_of(kind, shard)}: {array.shape} of {array.dtype}, the manifest says {wanted[1]} of "
                f"{wanted[0]}"
            )

    # ---- copying in the background ----

    def _copy_later(self, shard: int) -> None:
        with self._lock:
            self._to_copy.append(shard)
            if self._copiers < _COPIERS:
                self._copiers += 1
                threading.Thread(target=self._copy, name="token shard copier", daemon=True).start()

    def _copy(self) -> None:
        while True:
            with self._lock:
                if not self._to_copy:
                    self._copiers -= 1
                    return
                shard = self._to_copy.popleft()
            try:
                self._bring("tokens", shard, wait=False)
            except BlockingIOError:
                time.sleep(1.0)
                with self._lock:
                    self._to_copy.append(shard)
            except ValueError as error:  # damaged at its source: what reads from it next raises this
                with self._lock:
                    self._failed[shard] = error
            except Exception as error:
                _logger.warning("no local copy of %s: %s", self._url_of("tokens", shard), error)

    # ---- blocks ----

    def _fetch(self, keys: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The blocks (shard, number), those not in memory fetched together."""
        with self._lock:
            found = {key: self._blocks[key] for key in keys if key in self._blocks}
            for key in found:
                self._blocks.move_to_end(key)
        if missing := [key for key in keys if key not in found]:
            found |= self._request(missing)
        with self._lock:
            self._blocks.update(found)
            while len(self._blocks) > max(_KEPT_BLOCKS, len(keys)):
                self._blocks.popitem(last=False)
        return [found[key] for key in keys]

    def _request(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
        """Fetches blocks that are in ascending order, checked; neighbours in one request, a damaged one twice."""
        runs: list[list[tuple[int, int]]] = []
        for shard, block in keys:
            if runs and runs[-1][-1] == (shard, block - 1):
                runs[-1].append((shard, block))
            else:
                runs.append([(shard, block)])
        self.bring({shard for shard, _ in keys}, "sums")
        ranges = [self._byte_range(run) for run in runs]
        found = {}
        for run, bytes_range, data in zip(runs, ranges, remote.read_ranges(ranges), strict=True):
            if not self._is_right(run, data):
                (data,) = remote.read_ranges([bytes_range])
            if not self._is_right(run, data):
                url, start, stop = bytes_range
                raise ValueError(f"{url}: damaged between bytes {start} and {stop}: wrong checksum (fetched twice)")
            for key, at in zip(run, range(0, len(data), BLOCK_BYTES), strict=True):
                found[key] = np.frombuffer(data[at : at + BLOCK_BYTES], self._dtype)
        return found

    def _byte_range(self, run: Sequence[tuple[int, int]]) -> tuple[str, int, int]:
        shard, first, last = run[0][0], run[0][1], run[-1][1]
        info = self._infos[shard]
        header = info.tokens_bytes - info.num_tokens * self._dtype.itemsize
        stop = min(header + (last + 1) * BLOCK_BYTES, info.tokens_bytes)
        return self._url_of("tokens", shard), header + first * BLOCK_BYTES, stop

    def _is_right(self, run: Sequence[tuple[int, int]], data: bytes) -> bool:
        sums = self._mapped.get(("sums", run[0][0]))
        if sums is None:  # a store of an early version
            return True
        view = memoryview(data)
        return all(
            zlib.crc32(view[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]) == sums[block]
            for at, (_, block) in enumerate(run)
        )


def _read_checked(url: str, size: int, sha256: str) -> bytes:
    for _ in range(2):
        (data,) = remote.read_ranges([(url, 0, size)])
        if (got := hashlib.sha256(data).hexdigest()) == sha256:
            return data
    raise ValueError(f"{url}: damaged: checksum {got}, the manifest says {sha256} (fetched twice)")


class ShardTokens:
    """One shard's tokens, read like an array: from the local copy where there is one, by blocks otherwise."""

    def __init__(self, shards: RemoteShards, index: int):
        self._shards, self._index, self._length = shards, index, shards.num_tokens(index)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, wanted: slice | Int[np.ndarray, " n"]) -> UInt[np.ndarray, " n"]:
        whole = self._shards.whole(self._index)
        if whole is not None:
            return whole[wanted]
        if isinstance(wanted, slice):
            start, stop, _ = wanted.indices(self._length)
            return self._shards.read(self._index, start, stop)
        return self._shards.take(self._index, wanted)


class ShardBounds(Sequence):
    """The bounds of every shard, each fetched when it is asked for; all at once when one goes through them."""

    def __init__(self, shards: RemoteShards, count: int):
        self._shards, self._count = shards, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Int[np.ndarray, " documents_plus_1"]:
        return self._shards.local("bounds", index)

    def __iter__(self) -> Iterator[np.ndarray]:
        self._shards.bring(range(self._count), "bounds")
        return (self[index] for index in range(self._count))
