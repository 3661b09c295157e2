"""Atomic file writes, locks that end with their process, and the location of installed packages."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import pathlib
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

UNFINISHED = ".writing-"  # begins the name of a file that a killed process left half-written


def write_whole(target: str | os.PathLike[str], content: str | bytes | Callable[[pathlib.Path], Any]) -> pathlib.Path:
    """Writes a file atomically (temporary file, fsync, rename): a kill or a full disk leaves the old file as it was.

    Args:
      content: the bytes or text (written as UTF-8), or a function that writes the file at a given path.

    Raises OSError that names the target.
    """
    target = pathlib.Path(target)
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=UNFINISHED, suffix=target.suffix)
        temporary = pathlib.Path(name)
        try:
            os.close(handle)
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.chmod(temporary, 0o644)
            replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return target


@contextlib.contextmanager
def whole_folder(target: pathlib.Path, flag: str) -> Iterator[pathlib.Path]:
    """A folder beside `target` that takes its name when the block ends well and is removed otherwise.

    What is in it is on the disk before it has the name. What a killed process left is removed by the next one with the
    same target. `flag` names the target in messages. Raises FileExistsError if the target is there by then, BusyError
    if another process writes it.
    """
    staging = target.parent / f".{target.name}.writing"
    folder = staging / "files"
    staging.mkdir(parents=True, exist_ok=True)
    with locked(staging / ".lock", f"{flag}={target}: another process is writing it"):
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
            folder.chmod(0o755)
            if target.exists():
                raise FileExistsError(f"{flag}={target}: appeared while writing; nothing was overwritten")
            for path in (*folder.rglob("*"), folder):
                _sync_path(path)
            os.rename(folder, target)
            _sync_path(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def append_whole(file: IO[bytes], data: bytes) -> None:
    """Appends to a file opened with `buffering=0` and waits until the disk has it; what can't be written whole is taken
    back. Raises OSError that names the file.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise OSError(error.errno, f"cannot write: {error.strerror}", file.name) from error


@contextlib.contextmanager
def synced(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file that is on the disk when the block ends; OSError names it."""
    with naming(path), open(path, "wb") as file:
        yield file
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Waits until the disk has all that was written to a file."""
    file.flush()
    os.fsync(file.fileno())


def replace(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Syncs a finished file to disk and renames it to `target`, durably: a power cut can't undo the rename."""
    _sync_path(source)
    os.replace(source, target)
    _sync_path(os.path.dirname(os.path.abspath(target)))


def _sync_path(path: str | os.PathLike[str]) -> None:
    """Waits until the disk has a file's content, or a folder's names."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def naming(target: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager that turns an OSError into one that says `target` can't be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror or error}", os.fspath(target)) from error


def try_lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Locks an open file unless another process holds its lock; returns whether it did. Closing the file unlocks it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: IO[Any], *, shared: bool = False) -> None:
    """Locks an open file, waiting for any other process that holds its lock."""
    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


class BusyError(ValueError):
    """Another process holds a lock."""


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], busy: str, *, shared: bool = False) -> Iterator[None]:
    """Context manager that holds a lock file; raises BusyError with the message `busy` if another process holds it."""
    with open(path, "a") as file:
        if not try_lock(file, shared=shared) or not _is_at(file, path):
            raise BusyError(busy)
        yield


def _is_at(file: IO[Any], path: str | os.PathLike[str]) -> bool:
    """Whether an open file is the one at a path: what held its lock may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def allow_more_open_files() -> bool:
    """Raises this process's limit of open files to what the system allows it; False if it is there already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def installed_folders(package: str) -> list[pathlib.Path]:
    """The folders of an installed package, found without importing it; empty if it isn't installed."""
    spec = importlib.util.find_spec(package)
    return [pathlib.Path(folder) for folder in (spec.submodule_search_locations or () if spec else ())]


def file_sha256(path: str) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
