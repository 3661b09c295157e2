"""`<workdir>/events.jsonl`: the history of a run over all its starts, in order of time.

One object a line: `time` (seconds since 1970), `event`, `step` where there is one, and the event's own values.
`metrics.jsonl` has every step once; here a step that was repeated after a kill appears twice.

    launch              a process began (its host, its process id, its jaxlib and XLA_FLAGS)
    resume              it goes on from a checkpoint, or begins at step 0
    corrupt_checkpoint  a checkpoint was set aside, and why
    skip, rollback      an update was not applied, and why
    rolled_back         to which step, and how many updates were undone
    stop                it saved and left because it was told to
    error, done         how it ended otherwise; after a SIGKILL, neither

The open file is also the lock that keeps a second run of this machine out of a local workdir; in a bucket a lease
(`safelm.io.lease`) keeps every other run out.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import socket
import time
from typing import Any

from safelm.io import lease, remote

_TOLD_TO_STOP = ("Preempted", "KeyboardInterrupt")


class Events:
    """Appends to a run's history while entered; only one process of a run does (`enabled`).

    Raises ValueError if another live process (for a local workdir, of this machine) holds it, OSError if it can't be
    written.
    """

    def __init__(self, workdir: str, *, enabled: bool = True):
        self._workdir, self._enabled = workdir, enabled
        self._lines: list[str] = []
        self._file: Any = None
        self._lease = contextlib.ExitStack()
        self.first_launch = time.time()

    def write(self, event: str, step: int | None = None, **values: Any) -> None:
        """Appends one line."""
        if not self._enabled:
            return
        record = {"time": time.time(), "event": event, **({} if step is None else {"step": step}), **values}
        self._lines.append(json.dumps(record))
        if self._file is not None:
            self._file.write(self._lines[-1] + "\n")
            self._file.flush()

    def flush(self) -> None:
        """Uploads the history to an object store, which can't append; call it at checkpoints."""
        if self._enabled and self._file is None:
            remote.write_text(self._path, "".join(line + "\n" for line in self._lines))

    def __enter__(self) -> "Events":
        if not self._enabled:
            return self
        self._path = f"{self._workdir.rstrip('/')}/events.jsonl"
        if remote.is_remote(self._workdir):
            self._lease.enter_context(lease.held(self._workdir))
            with self._lease:
                with contextlib.suppress(FileNotFoundError):
                    self._lines = _lines(remote.read_bytes(self._path).decode("utf-8", "replace"))
                self._lease = self._lease.pop_all()
        else:
            self._open()
        with contextlib.suppress(IndexError, ValueError, KeyError, TypeError):
            self.first_launch = float(json.loads(self._lines[0])["time"])
        xla = {"jaxlib": importlib.metadata.version("jaxlib"), "xla_flags": os.environ.get("XLA_FLAGS", "")}
        self.write("launch", host=socket.gethostname(), pid=os.getpid(), **xla)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not self._enabled:
            return
        with self._lease, contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            if error is not None and kind.__name__ not in _TOLD_TO_STOP:
                self.write("error", kind=kind.__name__, message=str(error))
            self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()  # and with it the lock

    def _open(self) -> None:
        os.makedirs(self._workdir, exist_ok=True)
        self._file = open(self._path, "a+", encoding="utf-8", errors="surrogateescape", newline="\n")
        self._lock()
        self._file.seek(0)
        self._lines = _lines(self._file.read())
        if self._lines and not self._lines[-1].endswith("}"):
            self._file.write("\n")  # a line cut by a kill or a full disk

    def _lock(self) -> None:
        try:
            # A lock of the process, not of the open file: a worker process that outlives it doesn't hold it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            launches = [line for line in _lines(self._file.read()) if '"launch"' in line]
            self._file.close()
            by = ""
            with contextlib.suppress(IndexError, ValueError, KeyError, TypeError):  # the last line may be half written
                by = f" by process {json.loads(launches[-1])['pid']}"
            raise ValueError(f"workdir {self._workdir} is in use{by}: one run at a time") from error


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []
