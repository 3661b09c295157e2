"""How a Beam worker does a job: it loads the work's resources once, runs jobs, and reports failures."""

import hashlib
import logging
import os
import pickle
import threading
import traceback
from typing import Any, Protocol, runtime_checkable

from safelm.jobs.parent import end_with_lock_holder

_logger = logging.getLogger(__name__)


@runtime_checkable
class Work(Protocol):
    """Describes what workers do. Picklable, and small when pickled."""

    def load(self) -> Any:
        """Loads the resources that jobs need (a model), once per worker process."""
        ...

    def run(self, job: Any, loaded: Any) -> None:
        """Does one job and stores its result where a later run finds it. May be called twice for the same job."""
        ...

    def failed(self, job: Any, message: str) -> None:
        """Records for the calling process that a job failed."""
        ...


class Worker:
    """The function that Beam calls with each job.

    Never raises, so that no runner repeats a job that failed on bad input.
    """

    def __init__(self, work: Work):
        self._work, self._key = work, hashlib.sha256(pickle.dumps(work)).digest()

    def __call__(self, job: Any) -> None:
        end_with_lock_holder()
        try:
            self._work.run(job, _load_once(self._key, self._work))
        except (ValueError, OSError) as error:
            self._failed(job, str(error))
        except Exception as error:
            self._failed(job, kind_and_place(error))

    def _failed(self, job: Any, message: str) -> None:
        try:
            self._work.failed(job, message)
        except OSError as error:  # such as a full disk: the job has no result then, and that is found at the end
            _logger.error("%s (and that can't be recorded: %s)", message, error)


_loaded: dict[bytes, Any] = {}
_loading = threading.Lock()


def _load_once(key: bytes, work: Work) -> Any:
    """The work's resources, shared by all threads of this process."""
    with _loading:
        if key not in _loaded:
            _loaded.clear()  # of another pipeline in this process
            _loaded[key] = work.load()
        return _loaded[key]


def kind_and_place(error: BaseException) -> str:
    """A defect's exception type and place, without its message, which may contain a document's text."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
