"""What a worker of a Beam pipeline does with a job: it loads what the work needs once, and reports what fails."""

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
    """What workers do; picklable, and small when pickled."""

    def load(self) -> Any:
        """Loads, once per worker process, what jobs need (a model)."""
        ...

    def run(self, job: Any, loaded: Any) -> None:
        """Does one job and leaves its result where a later run finds it. May be called again for the same job."""
        ...

    def failed(self, job: Any, message: str) -> None:
        """Records for the calling process that a job could not be done."""
        ...


class Worker:
    """What Beam calls with each job. Never raises, so that no runner repeats a job that bad input ended."""

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
    """What the work loads, the same for all threads of this process."""
    with _loading:
        if key not in _loaded:
            _loaded.clear()  # of another pipeline in this process
            _loaded[key] = work.load()
        return _loaded[key]


def kind_and_place(error: BaseException) -> str:
    """A defect's kind and place, without its message, which may hold a document's text."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
