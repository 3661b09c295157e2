"""A gcloud that is a shell script, and two TPU workers that are folders."""

import os
import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "tpu" / "tpu_vm.sh"

# Writes its arguments to $FAKE/calls and answers a `describe` from the next line of $FAKE/states (TPU: $FAKE/node). ssh
# and scp act on the two workers $FAKE/home0 and $FAKE/home1, each the home of the commands that run there.
GCLOUD = r"""#!/usr/bin/env bash
set -eu
printf '%s\0' "$@" >>"$FAKE/calls"; printf '\n' >>"$FAKE/calls"
if [ -f "$FAKE/fails" ] && [[ " $* " == *"$(cat "$FAKE/fails")"* ]]; then
  echo 'ERROR: PERMISSION_DENIED' >&2; exit 1
fi
case " $* " in
  *' queued-resources describe '*)
    state=$(head -n 1 "$FAKE/states"); sed -i 1d "$FAKE/states"
    if [ "$state" = NOT_FOUND ]; then echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; fi
    echo 'WARNING: of gcloud' >&2; echo "$state" ;;
  *' tpu-vm describe '*) if [ -f "$FAKE/node-$5" ]; then cat "$FAKE/node-$5"; else cat "$FAKE/node"; fi ;;
  *' scp '*) for home in "$FAKE"/home*; do cp "$5" "$home/${6#*:}"; done ;;
  *' ssh '*)
    for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
    for home in "$FAKE"/home*; do (cd "$home"; HOME=$home PATH="$FAKE/worker_bin:$PATH" bash -c "$command"); done ;;
esac
"""
# `uv venv` makes a "Python" that notes how it was called and, as a training, goes on until it is killed.
UV = r"""#!/usr/bin/env bash
set -eu
printf '%s\0' "$@" >>"$HOME/uv_calls"; printf '\n' >>"$HOME/uv_calls"
if [ "$1" = venv ]; then
  mkdir -p ../venv/bin
  cp "$FAKE/worker_python" ../venv/bin/python
fi
"""
PYTHON = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >>"$HOME/python_calls"; printf '\n' >>"$HOME/python_calls"
if [ "$2" = -m ]; then echo "step 1"; exec -a safelm.train sleep 60; fi
"""


def _executable(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A folder with the fake gcloud, its answers, and the homes of two workers."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        for worker in ("home0", "home1"):
            (folder / worker).mkdir()
        _executable(folder / "bin" / "gcloud", GCLOUD)
        _executable(folder / "worker_bin" / "uv", UV)
        _executable(folder / "worker_python", PYTHON)
        self.answer()

    def answer(self, *states: str, node: str = "READY") -> None:
        (self.folder / "states").write_text("".join(f"{state}\n" for state in states))
        (self.folder / "node").write_text(f"{node}\n")

    def fail_at(self, words: str) -> None:
        (self.folder / "fails").write_text(words)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return run(*arguments, path=f"{self.folder / 'bin'}:{os.environ['PATH']}", FAKE=str(self.folder))

    def calls(self, path: str = "calls") -> list[list[str]]:
        file = self.folder / path
        lines = file.read_bytes().decode().split("\0\n") if file.exists() else []
        return [line.split("\0") for line in lines if line]

    def verbs(self) -> list[str]:
        """What was called, as `queued-resources create`, `tpu-vm ssh`, ..."""
        return [" ".join(call[2:4]) for call in self.calls()]


def run(*arguments: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": path or os.environ["PATH"], **environment}
    return subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=60)
