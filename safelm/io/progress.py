"""`progress.json`: how far a command is, for whoever has no terminal; and the bar that shows it on one.

One object, replaced whole at most every few seconds:

    command, pid, host   who writes it
    state                running, done, stopped or failed; failed with `error`, the line that the command ended with or
                         the kind and place of a defect
    started, updated     seconds since 1970
    stage, unit          what is being counted
    done, total, rate, eta_seconds   total and eta are null where nobody knows; the rate is per second

`updated` that stands still for minutes beside `running` means that the process is gone or hangs. `safelm.train` writes
one into every workdir, with step, tokens and loss; other commands where `--progress_file` or `SAFELM_PROGRESS_FILE`
says.

Where no terminal shows a bar, a line of the log says about every half minute how far the command is.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import tqdm

from safelm.io import files, remote

_logger = logging.getLogger(__name__)
VARIABLE = "SAFELM_PROGRESS_FILE"
HELP = f"write progress.json here every few seconds, for monitoring without a terminal (${VARIABLE})"
SECONDS, REMOTE_SECONDS = 2.0, 30.0
LOG_SECONDS = 30.0  # between two lines of a bar where no terminal shows it
_STOPS = ("Preempted", "KeyboardInterrupt")


class ProgressFile:
    """Writes the object; a file that can't be written is not worth a run: it is tried again the next time."""

    def __init__(self, path: str, command: str, **values: Any):
        """`values`: further fields, from the beginning."""
        self._path = path
        self._interval = REMOTE_SECONDS if remote.is_remote(path) else SECONDS
        self._next, self._begun = 0.0, time.monotonic()
        self._values: dict[str, Any] = {
            "command": command,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "state": "running",
            "started": time.time(),
            **values,
        }
        self._pid = os.getpid()

    def take(self, **values: Any) -> None:
        """Takes up new values."""
        self._values |= values

    def update(self, **values: Any) -> None:
        """Takes up new values and writes all if the last write is a few seconds old."""
        self.take(**values)
        if time.monotonic() >= self._next:
            self._write()

    def count(self, done: int | float, total: int | float | None, *, since: float, before: int | float = 0) -> None:
        """Takes up a count; `before` of it were done at `since`, a time of `time.monotonic`."""
        seconds = time.monotonic() - since
        rate = (done - before) / seconds if seconds > 0 and done > before else None
        left = None if total is None or rate is None else round(max(total - done, 0) / rate, 1)
        self.update(done=done, total=total, rate=rate, eta_seconds=left)

    def end(self, state: str, error: str = "") -> None:
        """Writes how it ended."""
        self._values |= {"state": state, "eta_seconds": None} | ({"error": error} if error else {})
        self._write()

    def __enter__(self) -> "ProgressFile":
        self.update()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.end("done")
        elif kind.__name__ in _STOPS:
            self.end("stopped")
        else:
            self.end("failed", " ".join(str(error).split()))

    def _write(self) -> None:
        if os.getpid() != self._pid:  # a fork of the command
            return
        self._next = time.monotonic() + self._interval
        text = json.dumps(self._values | {"updated": time.time()}, indent=1) + "\n"
        try:
            if remote.is_remote(self._path):
                remote.check_guards(self._path, asks=False)  # nor waits for a bucket
                filesystem, inner = remote.filesystem(self._path)
                filesystem.pipe_file(inner, text.encode())  # without retries: the next one comes soon
            else:
                files.write_whole(self._path, text)
        except Exception:  # a store may raise anything, and no failure here is worth a run
            _logger.debug("%s: not written", self._path, exc_info=True)


class _Lines:
    """When the next line of the log is due."""

    def __init__(self) -> None:
        self._next = 0.0

    def begin(self) -> None:
        """From now on half a minute passes."""
        self._next = time.monotonic() + LOG_SECONDS

    def are_due(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self._next


_current: ProgressFile | None = None
_open_bars: list["Bar"] = []
_lines = _Lines()


def begin(path: str, command: str) -> None:
    """From here on the command's bars write into this file; "" takes the variable's, or none."""
    global _current
    path = path or os.environ.get(VARIABLE, "")
    _current = ProgressFile(path, command) if path else None
    if _current is not None:
        _current.update()


def is_wanted() -> bool:
    """Whether a file is written or a line of the log is due: counting is worth while without a terminal too."""
    return _current is not None or (_lines.are_due() and any(bar._is_logged for bar in _open_bars))


def end(state: str, error: str = "") -> None:
    """The command has ended."""
    global _current
    if _current is not None:
        _current.end(state, error)
    _current = None


class Bar(tqdm.tqdm):
    """tqdm's bar, which also writes the command's progress file; where no terminal shows it, bars log a line each half
    minute at most.

    Of bars within bars the outermost counts; the innermost one's description is the stage. One with `disable=True` is
    not logged either.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **({"disable": None} | kwargs))
        self._is_logged = self.disable and kwargs.get("disable") is None
        self._what, self._unit = kwargs.get("desc") or "", (kwargs.get("unit") or "it").strip()
        self._first = self._at = self.n
        self._since = time.monotonic()
        if not _open_bars:
            _lines.begin()
        _open_bars.append(self)
        self._tell()

    def __iter__(self) -> Iterator[Any]:
        try:
            for value in super().__iter__():
                self._tell()
                yield value
                self._at += 1
        finally:
            self.close()

    def update(self, n: float | int | None = 1) -> bool | None:
        """Counts `n` more."""
        result = super().update(n)
        if self.disable:
            self.n += n or 0
        self._at = self.n
        self._tell()
        return result

    def refresh(self, *args: Any, **kwargs: Any) -> bool | None:
        """Shows what `n` has been set to."""
        result = super().refresh(*args, **kwargs)
        if hasattr(self, "_at"):  # tqdm refreshes while it is made
            self._at = max(self._at, self.n)
            self._tell()
        return result

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._tell()
        _open_bars[:] = [each for each in _open_bars if each is not self]  # tqdm's bars are equal by their places
        super().close()

    def _described(self) -> str:
        """How far it is, in words."""
        seconds = time.monotonic() - self._since
        rate = (self._at - self._first) / seconds if seconds > 0 else 0
        left = "" if self.total is None or not rate else f", {(self.total - self._at) / rate / 60:.0f} min left"
        of = "" if self.total is None else f" of {self.total:,}"
        what = (getattr(self, "desc", None) or self._what).removesuffix(": ")
        return f"{what}{': ' if what else ''}{self._at:,}{of} {self._unit}{left}"

    def _tell(self) -> None:
        if self._is_logged and _lines.are_due():
            _lines.begin()
            told = [bar for bar in _open_bars if bar._is_logged]
            _logger.info("%s", "; ".join(bar._described() for bar in told))
        if _current is None or not any(each is self for each in _open_bars):
            return
        outer, inner = _open_bars[0], _open_bars[-1]
        _current.take(stage=inner._what or outer._what, unit=outer._unit)
        if self is outer:
            _current.count(self._at, self.total, since=self._since, before=self._first)
        else:
            _current.update()
