"""Runs other commands in processes of their own, which keeps TensorFlow and Beam out of the ladder's process."""

import subprocess
import sys


def run_command(module: str, *arguments: str) -> None:
    """Runs `python -m MODULE`. Raises ValueError with the last line of its output if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{module} ended with code {done.returncode}: {last}")
