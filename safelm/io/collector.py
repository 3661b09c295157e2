"""Python's garbage collector beside large imports."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def imports_left_alone() -> Iterator[None]:
    """Keeps the collector from looking through everything that exists already while much that is new is made.

    Where TensorFlow or JAX is imported, half the time of parsing a vocabulary went there.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
