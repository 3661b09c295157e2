"""The progress bar of a run whose workers leave what they have done in an output folder."""

import time
from collections.abc import Callable
from typing import Any

from safelm.jobs.output import OutputFolder


class FolderProgress:
    """Moves a bar by what is in the folder, when it is called (by `run_jobs`, often) but not more than now and then."""

    def __init__(
        self,
        out: OutputFolder,
        bar: Any,
        update: Callable[[], object],
        *,
        seconds: float = 0.5,
        remote_seconds: float = 10.0,
    ):
        """`update` looks and moves the bar; `seconds` lie between two looks, `remote_seconds` behind a URL."""
        self._bar, self._update, self._next = bar, update, 0.0
        self._seconds = remote_seconds if out.is_remote else seconds

    def __call__(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._seconds
            self.show()

    def show(self) -> None:
        """What the bar shows is what there is."""
        if not self._bar.disable:
            self._update()
