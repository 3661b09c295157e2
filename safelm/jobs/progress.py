"""The progress bar of a run whose workers store their results in an output folder."""

import time
from collections.abc import Callable
from typing import Any

from safelm.io import progress, remote
from safelm.jobs.output import OutputFolder


class FolderProgress:
    """Updates a bar from the folder's content. `run_jobs` calls it often; it looks only every few seconds."""

    def __init__(
        self,
        out: OutputFolder,
        bar: Any,
        update: Callable[[], object],
        *,
        seconds: float = 0.5,
        remote_seconds: float = 10.0,
    ):
        """`update` moves the bar; it is called at most every `seconds` (`remote_seconds` if the folder is remote)."""
        self._root, self._bar, self._update, self._next = out.root, bar, update, 0.0
        self._seconds = remote_seconds if out.is_remote else seconds

    def __call__(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._seconds
            remote.check_guards(self._root, asks=False)
            self.show()

    def show(self) -> None:
        """Updates the bar now."""
        if progress.is_wanted() or not self._bar.disable:
            self._update()
