"""Keeps a second writer out of a folder in a bucket, which has no locks: an object in it says who writes there.

The object is made only where there is none, renewed every RENEW_SECONDS by a thread and removed at the end, each time
on the condition that it is still the one that this process wrote (Cloud Storage's `ifGenerationMatch`). Whoever finds
another's object

    takes it over at once   if that process ran on this machine and is gone,
    is refused at once      if that process runs on this machine,
    waits                   otherwise: until it is renewed (and is refused), or STALE_SECONDS old (and takes it over).

Ages are by the bucket's clock. A process that was stopped for long and finds its object replaced writes nothing more
below the folder: `remote` asks before each write. What it had begun to upload, and what worker processes of its own
write until it ends them, is not stopped. Stores other than `gs://` have no such condition, so there nobody is kept
out, and a warning says so.
"""

import contextlib
import dataclasses
import datetime
import email.utils
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from safelm.io import remote
from safelm.io.files import BusyError

STALE_SECONDS = 120.0
RENEW_SECONDS = 15.0
POLL_SECONDS = 5.0
WRITER = ".writer"

_logger = logging.getLogger(__name__)


class LeaseLostError(OSError):
    """Another process writes in the folder now."""


@contextlib.contextmanager
def held(folder: str, name: str = WRITER) -> Iterator[None]:
    """Holds the lease `name` of a remote folder; raises BusyError naming host, process and age if another one does."""
    folder = folder.rstrip("/")
    if not remote.is_bucket(folder):
        _logger.warning("%s: this kind of store has no locks, so nothing keeps a second writer out", folder)
        yield
        return
    lease = _Lease(folder, name)
    lease.take()
    try:
        yield
    finally:
        lease.release()


def wait_until_free(folder: str, name: str) -> None:
    """Waits as `held` does for another's lease and removes what is left of it, without taking it. Raises BusyError."""
    if remote.is_bucket(folder):
        _Lease(folder.rstrip("/"), name).wait_for_other(takes=False)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A lease as it stands in the bucket; `age`: seconds since it was renewed."""

    generation: str
    age: float
    claim: Mapping[str, str]

    def is_here(self) -> bool:
        """Whether its process ran on this machine, so that its id says whether it still does."""
        own = _claim()
        return all(self.claim.get(name) == own[name] for name in ("host", "machine"))

    def is_gone(self) -> bool:
        """Whether its process ran on this machine and has ended."""
        return self.is_here() and _started(self.claim.get("pid", "")) != self.claim.get("started")

    def who(self) -> str:
        """Its process, in words."""
        return f"process {self.claim.get('pid')} on {self.claim.get('host')}"


class _Lease:
    def __init__(self, folder: str, name: str):
        self._folder, self._url = folder, f"{folder}/{name}"
        self._files, inner = remote.filesystem(self._url)
        self._bucket, self._key, _ = self._files.split_path(inner)
        self._claim = _claim() | {"token": secrets.token_hex(8)}
        self._generation, self._renewed, self._lost_to = "", 0.0, ""
        self._changing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_until_ended, name="lease", daemon=True)

    def take(self) -> None:
        """Makes the object, or waits for another's as the module says."""
        self._generation = self._retrying("writing", lambda: self._write("0")) or self.wait_for_other(takes=True)
        self._renewed = _now()
        remote.guards[self._url] = self.check
        self._thread.start()

    def wait_for_other(self, *, takes: bool) -> str:
        """Waits for another's object to go, then `takes` its place or removes it; the new one's generation."""
        first = None
        while True:
            found = self._retrying("reading", self._read)
            if found is None:
                generation = self._retrying("writing", lambda: self._write("0")) if takes else "none"
                if generation:
                    return generation
                continue
            if found.is_gone() or found.age >= STALE_SECONDS:
                _logger.warning("%s: %s has left it, %.0f s ago", self._folder, found.who(), found.age)
                act = self._write if takes else self._remove
                if generation := self._retrying("writing", lambda act=act, old=found.generation: act(old)):
                    return generation
                continue
            if found.is_here() or (first and first.generation != found.generation):
                raise BusyError(
                    f"{self._folder}: in use by {found.who()}, which said so {found.age:.0f} s ago: "
                    f"one writer at a time ({self._url})"
                )
            if first is None:
                most = STALE_SECONDS - found.age
                _logger.warning("%s: %s wrote there; waiting up to %.0f s for it", self._folder, found.who(), most)
            first = first or found
            time.sleep(POLL_SECONDS)

    def check(self, asks: bool) -> None:
        """Raises LeaseLostError if another process has taken over; `asks` the bucket if the last renewal is old."""
        if os.getpid() != int(self._claim["pid"]):
            return  # a fork, which ends with the process that holds it
        if asks and not self._lost_to and _now() - self._renewed > STALE_SECONDS / 2:
            self._retrying("writing", self._renew)
        if self._lost_to:
            raise LeaseLostError(
                f"{self._folder}: {self._lost_to} has taken it over, since this process had not renewed {self._url} "
                f"for {STALE_SECONDS:.0f} s; it writes there no more"
            )

    def release(self) -> None:
        """Removes the object unless it is another's by now."""
        if os.getpid() != int(self._claim["pid"]):
            return
        self._ended.set()
        self._thread.join()
        remote.guards.pop(self._url, None)
        if not self._lost_to:
            try:
                self._retrying("removing", lambda: self._remove(self._generation))
            except OSError as error:
                _logger.warning("%s; the next writer waits %.0f s", error, STALE_SECONDS)

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and not self._lost_to:
            try:
                self._renew()
            except Exception as error:  # the libraries raise many kinds; it is tried again
                _logger.warning("%s: not renewed: %s", self._url, type(error).__name__)

    def _renew(self) -> None:
        with self._changing:
            if self._lost_to:
                return
            if generation := self._write(self._generation):
                self._generation, self._renewed = generation, _now()
            else:
                found = self._read()
                self._lost_to = found.who() if found else "another process"
                _logger.error("%s: %s has taken it over", self._folder, self._lost_to)

    def _write(self, generation: str) -> str:
        """Writes the object in the place of this generation ("0": none); the new generation, "" if there is another."""
        claim = self._claim | {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        head = json.dumps({"name": self._key, "metadata": claim})
        kinds = "Content-Type: application/json; charset=UTF-8\n\n"
        body = f"--=0=\n{kinds}{head}\n--=0=\n{kinds}{json.dumps(claim, indent=1)}\n\n--=0=--"
        try:
            made = self._files.call(
                *("POST", f"{self._files._location}/upload/storage/v1/b/{{}}/o", self._bucket),
                headers={"Content-Type": 'multipart/related; boundary="=0="'},
                data=body.encode(),
                uploadType="multipart",
                ifGenerationMatch=generation,
                json_out=True,
            )
            return made["generation"]
        except FileExistsError:  # gcsfs's word for 412, also where an answer was lost and the request repeated
            found = self._read()
            return found.generation if found and found.claim.get("token") == self._claim["token"] else ""

    def _remove(self, generation: str) -> str:
        """Removes this generation of the object; "" if there is another."""
        try:
            self._files.call("DELETE", "b/{}/o/{}", self._bucket, self._key, ifGenerationMatch=generation)
        except FileNotFoundError:
            pass
        except FileExistsError:
            return ""
        return generation

    def _read(self) -> _Found | None:
        try:
            headers, data = self._files.call("GET", "b/{}/o/{}", self._bucket, self._key)
        except FileNotFoundError:
            return None
        values = json.loads(data)
        renewed = datetime.datetime.fromisoformat(values["updated"])
        age = email.utils.parsedate_to_datetime(headers["Date"]) - renewed
        return _Found(values["generation"], max(age.total_seconds(), 0.0), values.get("metadata") or {})

    def _retrying(self, action: str, call: Any) -> Any:
        return remote.retrying(self._url, action, call)


def _claim() -> dict[str, str]:
    """Host, machine and process, as others can tell them apart."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""
    return {"host": socket.gethostname(), "machine": machine, "pid": str(os.getpid()), "started": _started(os.getpid())}


def _started(pid: int | str) -> str:
    """When a process of this machine began, in the system's words; "" if there is none."""
    try:
        facts = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if facts[0] == "Z" else facts[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return ""
    except OSError:
        pass
    return "unknown"


def _now() -> float:
    """Seconds that also pass while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
