"""The processor cores that this process may use."""

import os


def usable() -> list[int]:
    """Their numbers, ascending; where a system doesn't say (macOS), those of all cores."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
