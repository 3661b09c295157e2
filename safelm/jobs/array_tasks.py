"""Slices of a run for arrays of jobs, as SLURM starts them: each does its own share and waits for no other.

A run's shards are dealt out by size, so that slices take about as long as each other; shards that are done are left
out afterwards, so that a slice is the same however often it is started.
"""

import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence
from typing import TypeVar

MOST_TASKS = 64  # that a printed script asks for

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class ArrayTask:
    """Slice `index`, from 0, of `count` slices."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, shards: Sequence[_T], size: Callable[[_T], float]) -> list[_T]:
        """This slice's shards, large ones first: dealt out in turn by falling size."""
        order = sorted(range(len(shards)), key=lambda at: (-size(shards[at]), at))
        return [shards[at] for at in order[self.index :: self.count]]


def parse(text: str) -> ArrayTask:
    """The slice of `--array_task=i/n`. Raises ValueError for another form and for i outside 0 to n - 1."""
    if not (found := re.fullmatch(r"(\d+)/(\d+)", text.strip())):
        raise ValueError(f"--array_task={text}: expected i/n, such as 0/8")
    index, count = map(int, found.groups())
    if not 0 <= index < count:
        raise ValueError(f"--array_task={text}: i must be from 0 to n - 1")
    return ArrayTask(index, count)


def slurm_script(command: Sequence[str], tasks: int) -> str:
    """A script for `sbatch` that runs the command as an array of `tasks` slices."""
    words = " \\\n    ".join(map(shlex.quote, command))
    return (
        f"#!/bin/bash\n#SBATCH --array=0-{tasks - 1}\n#SBATCH --job-name=safelm\nset -euo pipefail\n"
        f"{words} \\\n    --array_task=$SLURM_ARRAY_TASK_ID/{tasks}\n"
    )
