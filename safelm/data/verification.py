"""Verifies the checksums of large token stores in the background, after training has started."""

import threading
from collections.abc import Iterable

from safelm.data.store import TokenStore


class Verification:
    """Reads all large local stores once, in a thread. Remote stores are checked as they are fetched."""

    def __init__(self, stores: Iterable[TokenStore]):
        """Starts."""
        self._stores = [store for store in stores if store.is_large and not store.is_remote]
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="token store verification", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the ValueError or OSError found so far, if any; it names the shard."""
        if self._failed is not None:
            raise self._failed

    def wait(self) -> None:
        """Waits until everything has been read; raises what was found."""
        self._thread.join()
        self.check()

    def _run(self) -> None:
        try:
            for store in self._stores:
                store.verify_checksums()
        except (OSError, ValueError) as error:
            self._failed = error
