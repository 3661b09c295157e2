"""Runs what strangers wrote in a separate process with limits on memory, time and output.

A chat template is a program: it may loop for ever or fill the memory. Jinja's sandbox keeps it from files and
attributes; the process limits the rest. The regular expressions in a `tokenizer.json` may loop too, and are tried in
the process before they are used (`safelm.text.patterns`). The process starts with the first request, takes one line per
request and ends with its parent. One that exceeds a limit is killed and replaced.
"""

import atexit
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

SECONDS = 10.0  # of one rendering; a template takes about a millisecond
MOST_BYTES = 16 * 2**20  # of a rendered conversation, as JSON
_SECONDS_OF_CUTTING = 60.0  # on the clock; processor time has the limit above, too
MEMORY = 512 * 2**20
_PROGRAM = pathlib.Path(__file__).with_name("stranger_program.py")
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")  # of the environment: no secrets


class _Worker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, request: dict[str, Any], seconds: float, most_bytes: int) -> str:
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            try:
                reply = json.loads(self._ask(line, seconds, most_bytes))
            except BaseException:  # an interrupt too: the reply that is still to come is no other request's
                self.end()
                raise
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["text"]

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, line: bytes, seconds: float, most_bytes: int) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = _start()
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None
        try:
            pipe_in.write(line)
            pipe_in.flush()
        except BrokenPipeError:
            raise ValueError("the process that runs it has ended") from None
        poll = select.poll()  # which takes any file number, unlike select
        poll.register(pipe_out, select.POLLIN)
        end, received = time.monotonic() + seconds, bytearray()
        while not received.endswith(b"\n"):
            if not poll.poll(1000 * max(0.0, end - time.monotonic())):
                raise ValueError(f"it takes longer than {seconds:g} seconds")
            news = os.read(pipe_out.fileno(), 2**16)
            received += news
            if not news:
                raise ValueError(f"it takes too long or more than {MEMORY // 2**20} MB of memory")
            if len(received) > most_bytes:
                raise ValueError(f"it writes more than {most_bytes} bytes")
        return bytes(received)


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", str(_PROGRAM), str(MEMORY), str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    )


_worker = _Worker()


def render(request: dict[str, Any], *, seconds: float = SECONDS, most_bytes: int = MOST_BYTES) -> str:
    """Renders a template ("template") with values ("values"). Raises ValueError saying why it can't be rendered."""
    return _worker.run(request, seconds, most_bytes)


def try_cutting(parts: dict[str, Any], texts: Sequence[str]) -> None:
    """Tries a tokenizer's parts (by their names in `tokenizer.json`) on texts.

    Raises ValueError saying what is wrong.
    """
    _worker.run({"parts": parts, "texts": list(texts)}, _SECONDS_OF_CUTTING, MOST_BYTES)


def _forget() -> None:
    """Makes a forked process start a worker of its own."""
    global _worker
    _worker = _Worker()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _worker.end())
