"""Runs commands of ours in forks of one process that has imported what they need: seconds less for each.

A command sees what `python -m safelm.NAME` or `python scripts/NAME.py` would: its argv, `__main__`, exit code, output.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What neither training nor generation, serving and evaluation may need.
PREPARATION_ONLY = ("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "apache_beam", "torch")

_PARENT = """
import importlib, io, json, os, runpy, sys, traceback
request = json.load(sys.stdin)
sys.path[:0] = request["path"]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in request["blocked"]:
            raise ModuleNotFoundError(f"{name} is blocked in this test", name=name)
sys.meta_path.insert(0, Blocker())
for module in request["imports"]:
    importlib.import_module(module)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for target, *arguments in request["commands"]:
    sys.stdout.flush()
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 1), os.dup2(write, 2), os.close(read), os.close(write)
        code = 0
        try:
            if target.endswith(".py"):
                sys.argv, sys.path[0] = [target, *arguments], os.path.dirname(target)
                runpy.run_path(target, run_name="__main__")
            else:
                sys.argv = [target, *arguments]
                runpy.run_module(target, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        text = pipe.read()
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    sys.stdout.write(json.dumps([code, text, used.ru_utime + used.ru_stime]) + chr(10))
    if code and request["stops"]:
        break
"""


@dataclasses.dataclass(frozen=True)
class Done:
    command: tuple[str, ...]
    code: int
    output: str  # of stdout and stderr, as they came
    seconds: float  # of processor time


def run_all(
    commands: Sequence[Sequence[str]],
    *,
    imports: Sequence[str] = (),
    blocked: Sequence[str] = (),
    cwd: Path = ROOT,
    stops: bool = False,
    **environment: str,
) -> list[Done]:
    """Runs each command (a module or a script's path, then its arguments) in `cwd`, one after the other.

    Args:
      imports: modules that the parent imports before it forks.
      blocked: modules that can't be imported.
      stops: at the first that fails.
    """
    request = {
        "commands": [list(command) for command in commands],
        "imports": imports,
        "blocked": blocked,
        "path": [str(cwd), str(ROOT)],
        "stops": stops,
    }
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "120"} | environment
    done = subprocess.run(
        [sys.executable, "-c", _PARENT],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return [Done(tuple(command), *line) for command, line in zip(commands, lines, strict=False)]
