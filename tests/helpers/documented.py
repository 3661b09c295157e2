"""The commands that README.md and the pages of docs/ show: what a shell makes of their bash blocks."""

import functools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]

# Instead of running a program the shell prints its words, each with a NUL behind it, and a NUL behind the last.
_PRINT = r"""
say() { printf '%s\0' "$@"; printf '\0'; }
for program in source curl; do eval "$program() { say $program \"\$@\"; }"; done
for program in safelm python; do eval "$program() { say $program \"\$@\"; }"; done
command_not_found_handle() { say "$@"; }
"""


@functools.cache
def blocks(page: str) -> list[str]:
    """The bash blocks of a page, in order."""
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def expand(block: str, *, cwd: Path = ROOT) -> list[list[str]]:
    """The words of every command of a block after the shell's expansions, in a folder. Runs none of them."""
    # A path is no function: `say` is put before it. Should one be missed, a restricted shell refuses it.
    text = re.sub(r"(^|&& )((?:\w+=\S+ )*)(?=(?:scripts|\.venv/bin)/)", r"\1say \2", block, flags=re.MULTILINE)
    shell = ["/bin/bash", "--restricted", "-c", _PRINT + text]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=cwd, env={"PATH": "/nonexistent"}, timeout=60)
    assert done.returncode == 0 and not done.stderr, f"{done.stderr}\n{block}"
    return [command.split("\0") for command in done.stdout.removesuffix("\0\0").split("\0\0") if command]


def commands() -> Iterator[tuple[str, int, list[str]]]:
    """Page, number on the page and words of every command."""
    for page in PAGES:
        number = 0
        for block in blocks(page):
            for command in expand(block):
                number += 1
                yield page, number, command


def spelled(command: list[str]) -> str:
    """A command as a person would write it."""
    return shlex.join(command)
