"""The journal of a shard: keeps every reply as soon as it arrives, so that no kill loses one.

It is a file of JSON lines that is only appended to. A killed process may leave an incomplete last line, which is cut
off when the journal is opened again. A remote journal, which can't be appended to, is a series of small whole files.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from safelm.io import files, records
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis.writer import Reply

FOLDER = "_journal"
_SYNC_SECONDS = {False: 1.0, True: 20.0}  # between two points that survive a power cut (behind a URL: any stop)
_SYNC_REPLIES = {False: 256, True: 1024}


class Journal:
    """Replies by the keys of their requests, and their cost.

    Attributes:
      replies: all replies in the journal.
      spent: sums of the writer's ledger over all runs that wrote to it.
    """

    def __init__(self, out: OutputFolder, name: str):
        self.replies: dict[str, Reply] = {}
        self.spent: dict[str, int | float] = {}
        self._out, self._name = out, f"{FOLDER}/{name}"
        self._unsynced, self._segment, self._synced = 0, 0, time.monotonic()
        self._lines: list[bytes] = []
        self._file: Any = None
        self._lock = threading.RLock()

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: OutputFolder, name: str) -> Iterator["Journal"]:
        """Opens and reads the journal of a shard. Raises OSError if another process has it open."""
        journal = cls(out, name)
        if out.is_remote:
            journal._read_segments()
        else:
            journal._open_file()
        try:
            yield journal
        finally:
            journal.sync()
            if journal._file is not None:
                journal._file.close()

    def add(self, key: str, reply: Reply) -> None:
        """Adds a reply that survives a kill from now on (in a remote journal from the next `sync`)."""
        values = {"text": reply.text, "stopped_by": reply.stopped_by, "reason": reply.reason}
        values |= {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        with self._lock:
            self.replies[key] = reply
            self._append({"key": key, "reply": values})
            self._unsynced += 1
            if self.is_due:
                self.sync()

    def spend(self, amounts: Mapping[str, int | float]) -> None:
        """Adds to the replies' cost."""
        if any(amounts.values()):
            self._book(amounts)
            self._append({"spent": dict(amounts)})

    @property
    def is_due(self) -> bool:
        """Whether it is time for a `sync`."""
        late = time.monotonic() - self._synced >= _SYNC_SECONDS[self._out.is_remote]
        return late or self._unsynced >= _SYNC_REPLIES[self._out.is_remote]

    def sync(self) -> None:
        """Makes sure that everything added is on the disk or in the bucket."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        elif self._lines:
            with self._out.staging() as folder:
                path = os.path.join(folder, "segment")
                with open(path, "wb") as file:
                    file.write(b"".join(self._lines))
                self._out.publish(path, f"{self._name}/{self._segment:06d}")
            self._segment, self._lines = self._segment + 1, []
        self._unsynced, self._synced = 0, time.monotonic()

    def _append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        if self._file is None:
            self._lines.append(line)
            return
        self._file.write(line)
        self._file.flush()

    def _open_file(self) -> None:
        path = self._out.path(self._name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._file = open(path, "a+b")
        if not files.try_lock(self._file):
            self._file.close()
            raise OSError(f"{path}: another worker is writing there")
        self._file.seek(0)
        self._file.truncate(self._read(self._file))
        self._file.seek(0, os.SEEK_END)

    def _read_segments(self) -> None:
        names = sorted(self._out.sizes(self._name))
        for name in names:
            with self._out.open(f"{self._name}/{name}") as file:
                self._read(file)
        self._segment = int(names[-1]) + 1 if names else 0

    def _read(self, file: Any) -> int:
        """Reads whole lines; returns their number of bytes."""
        place, remedy = self._out.path(self._name), "remove that line, and its reply is asked for again"
        rows, size = records.read_log(file, place, remedy)
        for number, values in enumerate(rows, 1):
            try:
                if "spent" in values:
                    self._book(values["spent"])
                else:
                    self.replies[values["key"]] = Reply(**values["reply"])
            except (TypeError, KeyError, AttributeError):
                raise ValueError(f"{place}, line {number}: damaged, no reply and no spending; {remedy}") from None
        return size

    def _book(self, amounts: Mapping[str, int | float]) -> None:
        for name, amount in amounts.items():
            self.spent[name] = self.spent.get(name, 0) + amount


def forget(out: OutputFolder, name: str) -> None:
    """Removes a shard's journal."""
    if out.is_remote:
        for segment in out.sizes(f"{FOLDER}/{name}"):
            out.remove(f"{FOLDER}/{name}/{segment}")
    else:
        out.remove(f"{FOLDER}/{name}")
