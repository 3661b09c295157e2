"""Freed memory is kept, in large pages, where a CPU computes, and the allocator is left alone elsewhere."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library isn't glibc")

FAULTS = """
import resource, sys
import numpy as np
from safelm.io import host_memory
changed = host_memory.keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16 << 20)  # 128 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
faults()
kept, number = resident(), faults()
host_memory.give_back()
after = resident()
held = np.ones(16 << 20)
(huge,) = [line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(changed, number, kept - after, int(huge) >> 10)
"""
TUNED = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def faults(choice: str, **environment: str) -> tuple[str, int, int, int]:
    inherited = {name: value for name, value in os.environ.items() if name not in TUNED}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, choice], capture_output=True, text=True, env=inherited | environment, check=True
    )
    changed, *numbers = done.stdout.split()
    return changed, *map(int, numbers)


def test_memory_that_was_freed_is_used_again_without_page_faults():
    _, before, _, _ = faults("leave", JAX_PLATFORMS="cpu")
    changed, after, given_back_mib, _ = faults("keep", JAX_PLATFORMS="cpu")
    assert changed == "True" and after < 100 < before
    assert given_back_mib > 100  # of the 128, when asked to


def test_the_heap_gets_large_pages_again_after_it_was_given_back():
    """Of 2 MiB, in which what is read from end to end is found by a 512th of the look-ups."""
    chosen = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not chosen.exists() or "[never]" in chosen.read_text():
        pytest.skip("the kernel gives out no large pages")
    assert faults("keep", JAX_PLATFORMS="cpu")[3] > 100  # of the 128 MiB


def test_an_environment_that_sets_the_allocator_is_left_alone():
    assert faults("keep", JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="4")[0] == "False"
