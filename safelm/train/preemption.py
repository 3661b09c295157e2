"""SIGTERM and SIGINT: the run ends its step, saves and leaves; where there is nothing new to save, it leaves at once.

A Python signal handler waits until compiled code returns, which may take minutes, so a thread of its own reads the
signals from a pipe. The exit codes are those a shell gives a process that died of the signal, 143 and 130: not 0,
because the run isn't done, and never those of an error, so that a scheduler starts it again.

- Before the first update (restoring, compiling) the last checkpoint is the newest state: the process ends at once.
- Later the loop sees `requested` after its step, or between two batches of an evaluation, and saves.
- If it doesn't within `grace_s` seconds (a batch that never comes, a step that hangs), the process ends as it is.
- A second SIGTERM changes nothing; a second SIGINT (Ctrl-C) ends the process at once.

Ending at once is as safe as SIGKILL: a checkpoint gets its name when it is whole.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PROFILE_SIGNAL = signal.SIGUSR1


class Preempted(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop and has saved what it had; `exit_code` is the process's."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Preemption:
    """Listens while it is entered, which only the main thread may do: elsewhere, nothing is ever requested."""

    def __init__(self, *, grace_s: float | int, note: Callable[[str], None], leave: Callable[[int], Any] = os._exit):
        """`note` is given a line for people, in the listening thread; `leave` ends the process with a code."""
        self._grace_s, self._note, self._leave = grace_s, note, leave
        self._signal: int | None = None
        self._has_progress = self._seen = self._profile = False
        self._deadline: float | None = None

    @property
    def requested(self) -> bool:
        """Whether the run is to save and leave."""
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        """128 and the signal's number."""
        return 128 + (self._signal or signal.SIGTERM)

    def begin(self) -> None:
        """From here on there is something to save."""
        self._has_progress = True

    def saving(self, leaving: bool) -> None:
        """The loop is about to save, and to leave then if told so: no deadline any more, a save cut short is lost."""
        self._seen = self._seen or leaving

    def take_profile_request(self) -> bool:
        """Whether SIGUSR1 has come since the last call."""
        asked, self._profile = self._profile, False
        return asked

    def __enter__(self) -> "Preemption":
        self._restore = contextlib.ExitStack()
        if threading.current_thread() is not threading.main_thread():
            return self
        read, write = os.pipe()
        os.set_blocking(write, False)
        thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        # Undone in the opposite order: the old handlers are back before the thread ends.
        self._restore.callback(os.close, read)
        self._restore.callback(thread.join)
        self._restore.callback(os.close, write)
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write, warn_on_full_buffer=False))
        for number in (*SIGNALS, PROFILE_SIGNAL):
            self._restore.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def _listen(self, pipe: int) -> None:
        poll = select.poll()  # which takes any file number, unlike select
        poll.register(pipe, select.POLLIN)
        while True:
            wait = None if self._deadline is None or self._seen else max(0.0, self._deadline - time.monotonic())
            if not poll.poll(None if wait is None else 1000 * wait):
                if not self._seen:
                    self._end(f"no step ended within {self._grace_s:g} s: leaving with the last checkpoint")
                continue
            if not (numbers := os.read(pipe, 64)):
                return
            for number in numbers:
                self._receive(number)

    def _receive(self, number: int) -> None:
        if number == PROFILE_SIGNAL:
            self._profile = True
        if number not in SIGNALS:
            return
        name = signal.Signals(number).name
        if self._signal is not None:
            if number == signal.SIGINT:
                self._end("interrupted again: leaving at once")
            else:
                self._note(f"{name} again: already stopping")
            return
        self._signal, self._deadline = number, time.monotonic() + self._grace_s
        if not self._has_progress:
            self._end(f"{name}: leaving, there is nothing new to save yet")
        else:
            self._note(f"{name}: saving at the end of this step, then leaving")

    def _end(self, why: str) -> None:
        with contextlib.suppress(Exception):  # stderr may be gone; the process ends all the same
            self._note(why)
            sys.stdout.flush()
            sys.stderr.flush()
        self._leave(self.exit_code)
