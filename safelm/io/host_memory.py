"""The C library's allocator, told to keep what is freed and to ask for large pages.

XLA on a CPU asks for its temporary memory anew for every step, hundreds of megabytes at a time, and glibc maps such
pieces from the kernel and gives them back: each step pays for clearing every page again (84,000 page faults, a seventh
of the processor time of a step of the 1.84M-parameter model at 16 x 256). Kept, they are reused as they are.

Weights, caches and gradients are read from end to end, and every 4 KB the processor looks up where the next page is. On
many systems large pages (of 2 MB on x86) go only to memory that was said to want them (`madvise`): the heap is.
"""

import ctypes
import os
import platform
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of <malloc.h>
_LARGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14  # the second of <sys/mman.h>
_OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
_NEVER_MORE_THAN_THERE_IS = "2"  # of /proc/sys/vm/overcommit_memory
_kept: set[int] = set()  # processes that keep what they free


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
    if not all([mallopt(option, value) == 1 for option, value in settings]):
        return False
    _ask_for_large_pages()
    _kept.add(os.getpid())
    return True


def give_back() -> bool:
    """Gives what is free of the memory kept back to the system, between two pieces of work; whether there was any.

    A process that trains a large model and then another one would else hold what both needed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    was_any = ctypes.CDLL(None).malloc_trim(0) == 1
    if os.getpid() in _kept:
        _ask_for_large_pages()  # in place of those that were given back
    return was_any


def _ask_for_large_pages() -> None:
    """Asks for large pages in the heap, grown for it by three quarters of the memory, of which nothing is touched.

    Does nothing where the kernel counts room that is only asked for as memory in use, and where a limit forbids so
    much of it (`ulimit -v`).
    """
    counts = Path("/proc/sys/vm/overcommit_memory")
    if not counts.exists() or counts.read_text().strip() == _NEVER_MORE_THAN_THERE_IS:
        return
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    if (begin := library.malloc(room)) is None:
        return
    first = -(-begin // _LARGE_PAGE) * _LARGE_PAGE
    library.madvise(first, begin + room - first, _MADV_HUGEPAGE)
    library.free(begin)
