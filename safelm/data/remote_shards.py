"""Shards of a token store behind a URL: the first batch at once, whole shards as far as the local cache has room.

An epoch is a permutation of the rows of the whole store, so a host wants a few kilobytes from anywhere at any time:
no shard, once read from, is likelier to be wanted next than any other. Whole shards on demand would therefore be
fetched in the first steps and, where the disk is smaller than the store, again and again; and no eviction beats keeping
a fixed part. So:

- Tokens, and channels with a number for each token, come in blocks of 64 KiB, all that a batch needs at once, each
  checked by its CRC-32 (in `sums-*.npy`): see `safelm.data.remote_blocks`.
- A file that was read from is also copied whole in the background, two at a time, while the cache has room (see
  `safelm.io.cache`), checked by its SHA-256, and mapped into memory from then on. Files up to 4 MiB are copied at the
  first read.
- A shard's bounds, 8 bytes a document, block checksums and channels with a number for each document are copied at
  their first read.

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Int, Num

from safelm.data.arrays import check_array, open_array
from safelm.data.remote_blocks import BlockFile, RemoteBlocks
from safelm.data.shard import ShardInfo, check_bounds, shard_file
from safelm.io import remote
from safelm.io.cache import CacheFolder

_WHOLE_AT_ONCE_BYTES = 4 << 20
_COPIERS = 2
_FILES_AT_ONCE = 16

_logger = logging.getLogger(__name__)

File = tuple[str, int]  # kind ("tokens", "bounds", "sums" or a channel) and shard


class RemoteShards:
    """The arrays of the shards of one remote store; safe to use from several threads."""

    def __init__(self, url: str, shards: Sequence[ShardInfo], dtype: str, folder: CacheFolder):
        """Checks names and sizes by listing the store; FileNotFoundError or ValueError names the file."""
        self.url, self._infos, self._dtype, self._folder = url, shards, np.dtype(dtype), folder
        self._mapped: dict[File, np.ndarray] = {}
        self._unmapped = sum(kind != "sums" for info in shards for kind in info.files)
        self._lock, self._file_locks = threading.Lock(), collections.defaultdict(threading.Lock)
        self._to_copy: collections.deque[File] = collections.deque()
        self._asked: set[File] = set()
        self._copiers = 0
        self._failed: dict[File, Exception] = {}
        self._in_parts = [self._files_in_parts(shard) for shard in range(len(shards))]
        self._blocks = RemoteBlocks(lambda those: self.bring(those, "sums"), lambda shard: self.local("sums", shard))
        self._check_listing()
        self.tokens: list[Any] = [self.numbers("tokens", index) for index in range(len(shards))]
        self.bounds = ShardBounds(self, len(shards))

    @property
    def is_all_here(self) -> bool:
        """Whether every file that reading takes is local by now: from then on nothing is waited for."""
        return self._unmapped == 0

    def numbers(self, kind: str, shard: int) -> "ShardNumbers":
        """A shard's tokens, or its channel with a number for each, as they are in the file."""
        return ShardNumbers(self, kind, shard, self._in_parts[shard][kind].length)

    def local(self, kind: str, shard: int) -> np.ndarray:
        """The "bounds", "sums" or a channel of a shard, whole, fetched if need be."""
        array = self._mapped.get((kind, shard))
        return self._bring(kind, shard) if array is None else array

    def bring(self, shards: Iterable[int], *kinds: str) -> None:
        """Fetches files (of each kind those there are) of several shards at once, with a progress bar."""
        missing = [
            (kind, shard)
            for shard in shards
            for kind in kinds
            if (kind, shard) not in self._mapped and kind in self._infos[shard].files
        ]
        if len(missing) < 2:
            for kind, shard in missing:
                self._bring(kind, shard)
            return
        size = sum(self._infos[shard].files[kind].bytes for kind, shard in missing)
        with (
            ThreadPoolExecutor(_FILES_AT_ONCE) as pool,
            tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=self.url, disable=None, delay=2.0) as bar,
        ):
            for (kind, shard), _ in zip(missing, pool.map(lambda file: self._bring(*file), missing), strict=True):
                bar.update(self._infos[shard].files[kind].bytes)

    def prefetch(
        self, shards: Int[np.ndarray, " n"], starts: Int[np.ndarray, " n"], stops: Int[np.ndarray, " n"]
    ) -> None:
        """Fetches together what holds the tokens [start, stop) of each shard (positions in it), and their channels."""
        files = {(kind, shard) for shard in set(shards.tolist()) for kind in self._in_parts[shard]}
        small = {(kind, shard) for kind, shard in files if self._is_small(kind, shard)}
        for kind in sorted({kind for kind, _ in small}):
            self.bring(sorted(shard for each, shard in small if each == kind), kind)
        by_blocks = {(kind, shard) for kind, shard in files if self.whole(kind, shard) is None}
        if not by_blocks:
            return
        blocks = set()
        for shard, start, stop in zip(shards.tolist(), starts.tolist(), stops.tolist(), strict=True):
            for kind, file in self._in_parts[shard].items():
                if (kind, shard) in by_blocks:
                    per_block = file.per_block * self._per_number(kind, shard)
                    last = -(-min(stop, self._infos[shard].num_tokens) // per_block)
                    blocks |= {(file, block) for block in range(start // per_block, last)}
        if blocks:
            self._blocks.fetch(sorted(blocks))

    def whole(self, kind: str, shard: int) -> np.ndarray | None:
        """All of a file when it is local; otherwise asks for a copy. Raises what the copying met."""
        array = self._mapped.get((kind, shard))
        if array is not None:
            return array
        with self._lock:
            if (kind, shard) in self._failed:
                raise self._failed[kind, shard]
            if (kind, shard) in self._asked:
                return None
            self._asked.add((kind, shard))
        if self._is_small(kind, shard):
            return self._bring(kind, shard)
        self._copy_later(kind, shard)
        return None

    def read(self, kind: str, shard: int, start: int, stop: int) -> Num[np.ndarray, " n"]:
        """Numbers [start, stop) of a file by blocks."""
        return self._blocks.read(self._in_parts[shard][kind], start, stop)

    def verify(self) -> None:
        """Reads every file once; ValueError names the first whose checksum is not the manifest's."""
        self.bring(range(len(self._infos)), *sorted({kind for info in self._infos for kind in info.files}))
        for shard, files in enumerate(self._in_parts):
            for kind, file in files.items():
                if (kind, shard) not in self._mapped:
                    for start in range(0, file.length, 64 * file.per_block):
                        self.read(kind, shard, start, min(start + 64 * file.per_block, file.length))

    def _files_in_parts(self, shard: int) -> dict[str, BlockFile]:
        info, files, first_sum = self._infos[shard], {}, 0
        for kind, (dtype, length) in info.read_in_parts(self._dtype).items():
            url, size = self._url_of(kind, shard), info.files[kind].bytes
            files[kind] = BlockFile(shard, first_sum, url, dtype.name, length, size)
            first_sum += files[kind].num_blocks
        return files

    def _per_number(self, kind: str, shard: int) -> int:
        """Tokens whose number of a channel is in one number of the file: 8 where it has a bit for each."""
        values = next((each.values for each in self._infos[shard].channels if each.name == kind), None)
        return 8 if values and len(values) == 2 else 1

    def _is_small(self, kind: str, shard: int) -> bool:
        return self._infos[shard].files[kind].bytes <= _WHOLE_AT_ONCE_BYTES

    def _url_of(self, kind: str, shard: int) -> str:
        return f"{self.url}/{shard_file(kind, shard, len(self._infos))}"

    def _check_listing(self) -> None:
        sizes = remote.list_sizes(self.url)
        if sizes is None:
            return
        for shard, info in enumerate(self._infos):
            for kind, file in info.files.items():
                name = shard_file(kind, shard, len(self._infos))
                if self._folder.has(name):
                    continue
                if name not in sizes:
                    raise FileNotFoundError(f"{self.url}/{name}: shard is missing, though the manifest lists it")
                if sizes[name] != file.bytes:
                    raise ValueError(
                        f"{self.url}/{name}: truncated or replaced: {sizes[name]} bytes, the manifest says {file.bytes}"
                    )

    # ---- whole files ----

    def _bring(self, kind: str, shard: int, *, wait: bool = True) -> np.ndarray | None:
        """A file's array, checked, from the cache or fetched into it; the smaller kinds into memory without room.

        None for a file that can be read in parts where there is no room. BlockingIOError if another process is copying
        the file and this one does not `wait`.
        """
        with self._lock:
            file_lock = self._file_locks[kind, shard]
        with file_lock:
            if (kind, shard) in self._mapped:
                return self._mapped[kind, shard]
            size, sha256 = self._infos[shard].files[kind].bytes, self._infos[shard].files[kind].sha256
            url, name = self._url_of(kind, shard), shard_file(kind, shard, len(self._infos))
            in_parts = kind in self._in_parts[shard]
            spare = self._spare_bytes() if in_parts else 0
            path = self._folder.obtain(
                name, size, sha256, lambda file: remote.download(url, size, file), wait=wait, spare=spare
            )
            if path is not None:
                array = open_array(path, size)
            elif in_parts:
                return None
            else:
                array = np.load(io.BytesIO(_read_checked(url, size, sha256)), allow_pickle=False)
            self._check_array(kind, shard, array)
            with self._lock:
                if kind == "tokens":
                    self.tokens[shard] = array
                self._mapped[kind, shard] = array
                self._unmapped -= kind != "sums"
            return array

    def _spare_bytes(self) -> int:
        """Room that the files read whole and not yet there will take: those read in parts leave it to them."""
        return sum(
            file.bytes
            for shard, info in enumerate(self._infos)
            if ("bounds", shard) not in self._mapped
            for kind, file in info.files.items()
            if kind not in self._in_parts[shard]
        )

    def _check_array(self, kind: str, shard: int, array: np.ndarray) -> None:
        info, path, in_parts = self._infos[shard], self._url_of(kind, shard), self._in_parts[shard]
        if kind == "bounds":
            check_bounds(path, array, info)
        elif kind == "sums":
            check_array(path, array, np.dtype(np.uint32), sum(file.num_blocks for file in in_parts.values()))
        elif kind in in_parts:
            check_array(path, array, np.dtype(in_parts[kind].dtype), in_parts[kind].length)
        else:
            channel = next(each for each in info.channels if each.name == kind)
            check_array(path, array, *channel.file_shape(info.count(channel)))

    # ---- copying in the background ----

    def _copy_later(self, kind: str, shard: int) -> None:
        with self._lock:
            self._to_copy.append((kind, shard))
            if self._copiers < _COPIERS:
                self._copiers += 1
                threading.Thread(target=self._copy, name="token shard copier", daemon=True).start()

    def _copy(self) -> None:
        while True:
            with self._lock:
                if not self._to_copy:
                    self._copiers -= 1
                    return
                kind, shard = self._to_copy.popleft()
            try:
                self._bring(kind, shard, wait=False)
            except BlockingIOError:
                time.sleep(1.0)
                with self._lock:
                    self._to_copy.append((kind, shard))
            except ValueError as error:  # damaged at its source: what reads from it next raises this
                with self._lock:
                    self._failed[kind, shard] = error
            except Exception as error:
                _logger.warning("no local copy of %s: %s", self._url_of(kind, shard), error)


def _read_checked(url: str, size: int, sha256: str) -> bytes:
    for _ in range(2):
        (data,) = remote.read_ranges([(url, 0, size)])
        if (got := hashlib.sha256(data).hexdigest()) == sha256:
            return data
    raise ValueError(f"{url}: damaged: checksum {got}, the manifest says {sha256} (fetched twice)")


class ShardNumbers:
    """A file of one shard, sliced like an array: from the local copy where there is one, by blocks otherwise."""

    def __init__(self, shards: RemoteShards, kind: str, shard: int, length: int):
        self._shards, self._kind, self._shard, self._length = shards, kind, shard, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, wanted: slice) -> Num[np.ndarray, " n"]:
        whole = self._shards.whole(self._kind, self._shard)
        if whole is not None:
            return whole[wanted]
        start, stop, _ = wanted.indices(self._length)
        return self._shards.read(self._kind, self._shard, start, stop)


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
