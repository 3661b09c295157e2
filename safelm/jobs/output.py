"""The output folder of a long run, local or remote: atomic writes, listings, small JSON records."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from safelm.io import files as whole_files
from safelm.io import lease, records, remote
from safelm.io.cache import staging_folder
from safelm.io.files import file_sha256

STAGING, FAILURES = "_staging", "_failures"
MOST_FAILURES = 10  # that one message tells
NOT_BEGUN = "not begun after "  # in the message of a shard that another one's failure ended
_SLICE = ".slice-"
_READ_AT_ONCE = 256


class OutputFolder:
    """An output folder; files are named relative to it, e.g. "score=3/train-000001-web.jsonl.gz". Picklable."""

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        self.is_remote = remote.is_remote(self.root)

    def path(self, name: str) -> str:
        """The path or URL of a file."""
        return f"{self.root}/{name}"

    def sizes(self, folder: str) -> dict[str, int]:
        """Name and size (bytes) of every whole file directly in one of the folders ("" for the output itself)."""
        place = self.path(folder) if folder else self.root
        if self.is_remote:
            found = remote.list_sizes(place)
            if found is None:
                raise PermissionError(f"{place}: listing is refused, and without it nothing can be continued")
            return found
        try:
            with os.scandir(place) as entries:
                found = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}
        return {name: size for name, size in found.items() if not name.startswith(whole_files.UNFINISHED)}

    def is_empty(self) -> bool:
        """Whether the folder holds nothing but locks and temporary files of a killed run."""
        if self.is_remote:
            files, inner = remote.filesystem(self.root)
            try:
                names = remote.retrying(self.root, "listing", lambda: files.ls(inner, detail=False))
                return all(os.path.basename(name.rstrip("/")).startswith(".") for name in names)
            except FileNotFoundError:
                return True
        names = os.listdir(self.root) if os.path.isdir(self.root) else []
        return not [name for name in names if not name.startswith(".") and name != STAGING]

    def read_json(self, names: list[str]) -> Iterator[Any]:
        """The objects of JSON files in order; None for a file that is missing or damaged."""
        for at in range(0, len(names), _READ_AT_ONCE):
            for data in self._read(names[at : at + _READ_AT_ONCE]):
                try:
                    yield None if data is None else records.parse(data, self.root, "")
                except ValueError:
                    yield None

    def _read(self, names: list[str]) -> list[bytes | None]:
        if self.is_remote:
            files, _ = remote.filesystem(self.root)
            urls = {name: self.path(name) for name in names}
            inner = {name: remote.filesystem(url)[1] for name, url in urls.items()}
            found = files.cat(list(inner.values()), on_error="return") if names else {}
            found = found if isinstance(found, dict) else {next(iter(inner.values())): found}
            return [self._again(urls[name], inner[name], found[inner[name]]) for name in names]
        return [_read_local(self.path(name)) for name in names]

    def _again(self, url: str, inner: str, found: Any) -> bytes | None:
        if not isinstance(found, Exception):
            return found
        files, _ = remote.filesystem(url)
        try:
            return remote.retrying(url, "reading", lambda: files.cat_file(inner), failed=found)
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """Opens a file to read bytes. Raises FileNotFoundError, or OSError naming the file."""
        return remote.open_file(self.path(name)) if self.is_remote else open(self.path(name), "rb")

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a small JSON file atomically. Raises OSError naming it."""
        records.write(self.path(name), values)

    @property
    def _staging(self) -> str:
        """The folder of all of the output's unfinished files here; of a remote output, in the cache folder."""
        return os.path.join(staging_folder(self.root), STAGING)

    def _clear_staging(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        if self.is_remote:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(self._staging))

    @contextlib.contextmanager
    def staging(self) -> Iterator[str]:
        """A local folder for unfinished files; removed at the end, a killed run's by the next `only_writer`."""
        parent = self._staging
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="safelm-", dir=parent) as folder:
            yield folder

    def publish(self, local: str, name: str) -> dict[str, Any]:
        """Moves or uploads a finished file of `staging` to its name; returns its size in bytes and SHA-256."""
        facts = {"bytes": os.path.getsize(local), "sha256": file_sha256(local)}
        if self.is_remote:
            remote.upload(local, self.path(name))
            return facts
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        whole_files.replace(local, self.path(name))
        return facts

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            remote.remove(self.path(name)) if self.is_remote else os.remove(self.path(name))

    def remove_folder(self, folder: str) -> None:
        """Removes the files directly in a folder, also half-written ones, and the folder if that leaves it empty."""
        for name in self.sizes(folder):
            self.remove(f"{folder}/{name}" if folder else name)
        if self.is_remote:
            return
        place = self.path(folder) if folder else self.root
        for path in glob.glob(f"{glob.escape(place)}/{whole_files.UNFINISHED}*"):
            os.remove(path)
        with contextlib.suppress(OSError):
            os.rmdir(place)

    def record_failure(self, name: str, message: str) -> None:
        """Stores a worker's message about a shard that failed."""
        self.write_json(f"{FAILURES}/{name}.json", {"message": message})

    def clear_failures(self, of: Collection[str] | None = None) -> None:
        """Deletes the failures of an earlier run, or those `of` some shards."""
        for name in self.sizes(FAILURES):
            if of is None or name.removesuffix(".json") in of:
                self.remove(f"{FAILURES}/{name}")
        if of is None and not self.is_remote:
            shutil.rmtree(self.path(FAILURES), ignore_errors=True)

    def raise_failures(self, of: Collection[str] | None = None) -> None:
        """Raises ValueError if there are failures (`of` some shards), with up to MOST_FAILURES of them."""
        names = sorted(name for name in self.sizes(FAILURES) if of is None or name.removesuffix(".json") in of)
        found = self.read_json([f"{FAILURES}/{name}" for name in names])
        messages = [str(failure["message"]) for failure in found if failure]
        if messages:
            then = "finished shards are kept, run the same command again when that is mended"
            raise ValueError(f"{failures_in_a_line(messages)}; {then}")

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Keeps other writers out, deletes a killed run's temporary files, checks that the folder is writable.

        Raises BusyError while another process holds the lock of a local folder or the lease of one in a bucket.
        """
        remote.check_writable(self.root)
        if self.is_remote:
            self._wait_for_slices()  # before, too: two slices that end at once would refuse each other
            with lease.held(self.root):
                self._wait_for_slices()
                self._clear_staging()
                try:
                    yield
                finally:
                    self._clear_staging()
            return
        busy = f"{self.root}: another process is writing there"
        with whole_files.locked(self.path(".lock"), busy), open(self.path(".workers"), "w") as workers:
            whole_files.wait_for_lock(workers)  # workers of a killed run end within a second
            fcntl.flock(workers, fcntl.LOCK_UN)
            self._clear_staging()
            try:
                yield
            finally:
                self._clear_staging()

    @contextlib.contextmanager
    def only_writer_of_slice(self, index: int, count: int) -> Iterator[None]:
        """Shares the folder with the other slices of the same count; raises BusyError for any other writer.

        A slice waits for nobody and touches nothing that others write.
        """
        remote.check_writable(self.root)
        name = f"{_SLICE}{index}-of-{count}"
        if self.is_remote:
            with lease.held(self.root, name):
                lease.wait_until_free(self.root, lease.WRITER)
                self._wait_for_slices(but=f"-of-{count}")
                yield
            return
        busy = f"{self.root}: another process is writing there"
        with contextlib.ExitStack() as locks:
            locks.enter_context(whole_files.locked(self.path(".lock"), busy, shared=True))
            locks.enter_context(whole_files.locked(self.path(name), f"{busy}, slice {index} of {count}"))
            for path in glob.glob(f"{glob.escape(self.root)}/{_SLICE}*"):
                if not path.endswith(f"-of-{count}"):
                    with whole_files.locked(path, f"{busy}, a slice of another count ({os.path.basename(path)[7:]})"):
                        pass
            yield

    def _wait_for_slices(self, but: str = "/") -> None:
        """Waits for the leases of slices whose names don't end in `but`; raises BusyError for one at work."""
        for name in self.sizes(""):
            if name.startswith(_SLICE) and not name.endswith(but):
                lease.wait_until_free(self.root, name)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Marks a worker as writing for the duration of the block; the next run waits for it."""
        if self.is_remote:
            yield
            return
        with open(self.path(".workers"), "a") as file:
            whole_files.wait_for_lock(file, shared=True)
            yield


def failures_in_a_line(messages: Sequence[str]) -> str:
    """The messages of shards that failed, the first MOST_FAILURES of those that differ, and how many shards are left.

    Shards that were not begun because others failed are only counted, if there are those others.
    """
    told = [each for each in dict.fromkeys(messages) if NOT_BEGUN not in each] or list(dict.fromkeys(messages))
    told = told[:MOST_FAILURES]
    more = len(messages) - len(told)
    return "; ".join(told) + (f" (and {more} more shards failed)" if more else "")


def _read_local(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
