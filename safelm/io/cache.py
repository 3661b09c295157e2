"""The local cache of remote token shards: bounded in size, checked by checksum, shared by processes.

    $SAFELM_CACHE (~/.cache/safelm)/stores/<hash of URL and manifest>/<files of the store>

A file gets its name once it is whole and its SHA-256 is right. While it is copied it is called `<name>.part` and locked
by the copying process. `SAFELM_CACHE_GB` bounds the folder (default: half of the disk's free space, the cache's own
files counted as free). When room runs out, stores that no process has open are deleted, least recently used first.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from typing import BinaryIO

from safelm.io import files, remote
from safelm.io.files import file_sha256

CACHE_VARIABLE = "SAFELM_CACHE"
SIZE_VARIABLE = "SAFELM_CACHE_GB"
_IN_USE = ".in-use"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_logger = logging.getLogger(__name__)


def cache_root() -> str:
    """Folder for local copies: `$SAFELM_CACHE`, or `~/.cache/safelm`."""
    return os.environ.get(CACHE_VARIABLE) or os.path.join(os.path.expanduser("~"), ".cache", "safelm")


def staging_folder(output: str) -> str:
    """The local folder of an output's unfinished files: the output itself or, for a bucket, one of the cache folder."""
    if not remote.is_remote(output):
        return output
    return os.path.join(cache_root(), "staging", hashlib.sha256(output.rstrip("/").encode()).hexdigest()[:24])


class CacheFolder:
    """The local copies of one remote store; while it is open, other processes don't delete it to make room."""

    def __init__(self, url: str, manifest_text: str):
        """Opens the folder; its name depends on the manifest, so a store that was rewritten gets a new folder."""
        self.url, self.root = url, os.path.join(cache_root(), "stores")
        self.path = os.path.join(self.root, hashlib.sha256(f"{url}\n{manifest_text}".encode()).hexdigest()[:24])
        self._in_use = _lock(os.path.join(self.path, _IN_USE), shared=True)
        weakref.finalize(self, self._in_use.close)
        os.utime(self._in_use.fileno())

    def has(self, name: str) -> bool:
        """Whether a copy exists. It was checked when it was made; `obtain` checks it again."""
        return os.path.exists(os.path.join(self.path, name))

    def obtain(
        self,
        name: str,
        size: int,
        sha256: str,
        download: Callable[[BinaryIO], None],
        *,
        wait: bool = True,
        spare: int = 0,
    ) -> str | None:
        """Returns the path of a whole, checksummed copy of a file, calling `download` if there is none yet.

        Args:
          size: of the file, in bytes.
          wait: whether to wait for another process that is copying the file.
          spare: bytes that must stay free beside the file.

        Returns None if the cache has no room. Raises BlockingIOError if another process is copying the file and `wait`
        is False, ValueError if two downloads had wrong checksums.
        """
        path = os.path.join(self.path, name)
        part = _lock(f"{path}.part", wait=wait)
        if part is None:
            raise BlockingIOError(f"{path}: another process is copying it")
        with part:
            try:
                if os.path.exists(path):
                    if os.path.getsize(path) == size and file_sha256(path) == sha256:
                        return path
                    _logger.warning("%s: the copy is damaged; fetching it again", path)
                    os.remove(path)
                if not self._reserve(part, size, spare):
                    return None
                self._fill(part, name, sha256, download, f"{path}.part")
                os.replace(f"{path}.part", path)
                return path
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                _logger.warning("%s: the disk is full; reading from the remote store instead", path)
                return None
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(f"{path}.part")

    def _fill(self, part: BinaryIO, name: str, sha256: str, download: Callable[[BinaryIO], None], path: str) -> None:
        for _ in range(2):
            download(part)
            os.fsync(part.fileno())
            if (got := file_sha256(path)) == sha256:
                return
        raise ValueError(f"{self.url}/{name}: damaged: checksum {got}, the manifest says {sha256} (fetched twice)")

    def _reserve(self, part: BinaryIO, size: int, spare: int) -> bool:
        """Allocates the part's full size if the cache has room for it, after deleting unused stores."""
        with _lock(os.path.join(self.root, ".lock")):
            for folder in (None, *self._idle_folders()):
                if folder:
                    _remove_if_idle(folder)
                used = _bytes_under(self.root)
                if used + size + spare <= _limit(self.root, used):
                    part.truncate(size)
                    return True
        return False

    def _idle_folders(self) -> Iterator[str]:
        folders = [entry.path for entry in os.scandir(self.root) if entry.is_dir() and entry.path != self.path]

        def last_use(folder: str) -> float:
            with contextlib.suppress(OSError):
                return os.path.getmtime(os.path.join(folder, _IN_USE))
            return 0.0

        yield from sorted(folders, key=last_use)


def _lock(path: str, *, shared: bool = False, wait: bool = True) -> BinaryIO | None:
    """Opens and locks a file, creating it if needed; None if another process holds it and `wait` is False."""
    while True:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except FileNotFoundError:  # the folder was removed in between
            continue
        try:
            if wait:
                files.wait_for_lock(file, shared=shared)
            elif not files.try_lock(file, shared=shared):
                file.close()
                return None
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()  # another process renamed or removed it while this one waited


def _remove_if_idle(folder: str) -> None:
    lock = _lock(os.path.join(folder, _IN_USE), wait=False)
    if lock is not None:
        with lock:
            _logger.info("%s: removed to make room in the cache", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _bytes_under(root: str) -> int:
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(folder, name))
    return total


def _limit(root: str, used: int) -> float:
    text = os.environ.get(SIZE_VARIABLE)
    if not text:
        return (shutil.disk_usage(root).free + used) / 2
    try:
        if (gigabytes := float(text)) >= 0:
            return gigabytes * 1e9
    except ValueError:
        pass
    raise ValueError(f"{SIZE_VARIABLE} must be a number of gigabytes, got {text!r}")
