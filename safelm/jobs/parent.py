"""Lets worker processes end with their parent, even if the parent is killed and can't tell them."""

import multiprocessing
import os
import signal
import threading
import time

from safelm.io import files

LIVENESS_VARIABLE = "SAFELM_BEAM_PARENT"
_POLL_SECONDS = 0.2

_watching = threading.Event()


def end_with_parent(signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Sends this `multiprocessing` process a signal as soon as its parent has ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal_number)

    threading.Thread(target=watch, daemon=True).start()


def end_with_lock_holder() -> None:
    """Ends this process as soon as no process holds the lock of the file that LIVENESS_VARIABLE names."""
    path = os.environ.get(LIVENESS_VARIABLE)
    if not path or _watching.is_set():
        return
    _watching.set()

    def watch() -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            try:
                with open(path) as file:
                    if not files.try_lock(file, shared=True):
                        continue
            except FileNotFoundError:
                pass
            os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
