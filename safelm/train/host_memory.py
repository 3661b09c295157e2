"""The C library's allocator, told to keep what is freed.

XLA on a CPU asks for its temporary memory anew for every step, hundreds of megabytes at a time, and glibc maps such
pieces from the kernel and gives them back: each step pays for clearing every page again (84,000 page faults, a seventh
of the processor time of a step of the 1.84M-parameter model at 16 x 256). Kept, they are reused as they are.
"""

import ctypes
import os
import platform
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of <malloc.h>
_OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def keep_freed_memory() -> bool:
    """Call before JAX starts its devices; whether the allocator was changed.

    It is left alone where an accelerator computes, where the C library isn't glibc, and where the environment sets the
    allocator already (`GLIBC_TUNABLES`, `MALLOC_ARENA_MAX`, ...).
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    if not on_cpu and any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
    return all([mallopt(option, value) == 1 for option, value in settings])


def give_back() -> bool:
    """Gives what is free of the memory kept back to the system, between two pieces of work; whether there was any.

    A process that trains a large model and then another one would else hold what both needed.
    """
    return platform.libc_ver()[0] == "glibc" and ctypes.CDLL(None).malloc_trim(0) == 1
