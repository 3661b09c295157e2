"""Runs other commands of ours in processes of their own: TensorFlow and Beam stay out of the ladder's."""

import subprocess
import sys


def run_command(module: str, *arguments: str) -> None:
    """Runs `python -m MODULE`; ValueError with the last line of what it said where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{module} ended with code {done.returncode}: {last}")
