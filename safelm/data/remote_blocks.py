"""Parts of files behind a URL: blocks of 64 KiB, each checked by its CRC-32, the last ones used kept in memory."""

import collections
import dataclasses
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Num, UInt32

from safelm.data.arrays import BLOCK_BYTES
from safelm.io import remote

_KEPT_BLOCKS = 4096  # 256 MiB


@dataclasses.dataclass(frozen=True, order=True)
class BlockFile:
    """A numpy file that is read in parts.

    Attributes:
      shard: its number.
      first_sum: where its blocks' checksums begin in those of the shard.
      length: in numbers.
      size: in bytes, the header included.
    """

    shard: int
    first_sum: int
    url: str
    dtype: str
    length: int
    size: int

    @property
    def per_block(self) -> int:
        """Numbers in a block."""
        return BLOCK_BYTES // np.dtype(self.dtype).itemsize

    @property
    def num_blocks(self) -> int:
        """The last one may be shorter."""
        return -(-self.length // self.per_block)

    def byte_range(self, first: int, last: int) -> tuple[str, int, int]:
        """URL, start and stop of the blocks from the first to the last."""
        header = self.size - self.length * np.dtype(self.dtype).itemsize
        return self.url, header + first * BLOCK_BYTES, min(header + (last + 1) * BLOCK_BYTES, self.size)


Key = tuple[BlockFile, int]  # and the block's number


class RemoteBlocks:
    """Reads blocks of several files together; safe to use from several threads."""

    def __init__(
        self, bring_sums: Callable[[Iterable[int]], object], sums_of: Callable[[int], UInt32[np.ndarray, " n"]]
    ):
        """`bring_sums` fetches the block checksums of several shards, `sums_of` gives those of one."""
        self._bring_sums, self._sums_of = bring_sums, sums_of
        self._blocks: collections.OrderedDict[Key, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: BlockFile, start: int, stop: int) -> Num[np.ndarray, " n"]:
        """Numbers [start, stop) of a file."""
        if stop <= start:
            return np.empty(0, file.dtype)
        first, last = start // file.per_block, (stop - 1) // file.per_block
        blocks = self.fetch([(file, block) for block in range(first, last + 1)])
        joined = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        return joined[start - first * file.per_block : stop - first * file.per_block]

    def fetch(self, keys: Sequence[Key]) -> list[np.ndarray]:
        """The blocks, those not in memory fetched together."""
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

    def _request(self, keys: Sequence[Key]) -> dict[Key, np.ndarray]:
        """Fetches blocks that are in ascending order, checked; neighbours in one request, a damaged one twice."""
        runs: list[list[Key]] = []
        for file, block in keys:
            if runs and runs[-1][-1] == (file, block - 1):
                runs[-1].append((file, block))
            else:
                runs.append([(file, block)])
        self._bring_sums({file.shard for file, _ in keys})
        ranges = [run[0][0].byte_range(run[0][1], run[-1][1]) for run in runs]
        found = {}
        for run, bytes_range, data in zip(runs, ranges, remote.read_ranges(ranges), strict=True):
            if not self._is_right(run, data):
                (data,) = remote.read_ranges([bytes_range])
            if not self._is_right(run, data):
                url, start, stop = bytes_range
                raise ValueError(f"{url}: damaged between bytes {start} and {stop}: wrong checksum (fetched twice)")
            for key, at in zip(run, range(0, len(data), BLOCK_BYTES), strict=True):
                found[key] = np.frombuffer(data[at : at + BLOCK_BYTES], run[0][0].dtype)
        return found

    def _is_right(self, run: Sequence[Key], data: bytes) -> bool:
        file, view = run[0][0], memoryview(data)
        sums = self._sums_of(file.shard)
        return all(
            zlib.crc32(view[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]) == sums[file.first_sum + block]
            for at, (_, block) in enumerate(run)
        )
