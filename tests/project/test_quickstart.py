"""scripts/quickstart.sh with a stand-in for Python: what it prints, keeps, and ends with."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STAND_IN = """#!/usr/bin/env bash
# Makes noise as TensorFlow and training do, says which command it was, and fails where FAILS says so.
shift
[ "$1" != "safelm.synthetic_web" ] || sleep 0.3
echo "$1" >>"$ASKED"
for number in $(seq 100); do echo "oneDNN custom operations are on ($number)" >&2; done
for number in $(seq 30); do echo "tokens: !!python/tuple"; done
[ "$1" != "safelm.evaluate" ] || echo "the table"
if [ "$1" = "${FAILS%=*}" ]; then echo "python -m $1: what is wrong" >&2; exit "${FAILS#*=}"; fi
"""


def _run(tmp_path: pathlib.Path, fails: str = "", *, terminal: bool = False) -> subprocess.CompletedProcess:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (tmp_path / "venv" / "installed-dev-eval-serve-synthesis").touch()
    env = os.environ | {"SAFELM_VENV": str(tmp_path / "venv"), "ASKED": str(tmp_path / "asked"), "FAILS": fails}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), str(tmp_path / "run")]
    if terminal:
        command = ["script", "--quiet", "--return", "--command", " ".join(command), "/dev/null"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_it_prints_a_page_and_keeps_the_rest_in_logs(tmp_path):
    done = _run(tmp_path)
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 60 and [line.split(" ")[0] for line in lines[:10]] == [
        f"{number}/10" for number in range(1, 11)
    ]
    assert "oneDNN" not in done.stdout and "the table" in done.stdout
    assert f"safelm serve --checkpoint={tmp_path}/run/raw --checkpoint={tmp_path}/run/safety" in lines[-1]
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == sorted(
        f"{name}.txt"
        for name in (
            *("corpus", "vocabulary", "tokens", "scores", "agreement"),
            *("safeweb", "refuseweb", "raw", "safety", "evaluation"),
        )
    )
    assert (tmp_path / "run/logs/raw.txt").read_text().count("oneDNN") == 100


@pytest.mark.parametrize("code", [2, *(pytest.param(code, marks=pytest.mark.slow) for code in (3, 143))])
def test_a_step_that_fails_ends_it_with_its_code_and_the_end_of_its_log(tmp_path, code):
    done = _run(tmp_path, f"safelm.train={code}")
    assert done.returncode == code
    assert f"8/10 pretraining on the raw web: exit code {code}; the end of {tmp_path}/run/logs/raw.txt" in done.stderr
    assert done.stderr.rstrip().endswith("python -m safelm.train: what is wrong") and "the table" not in done.stdout
    assert len((tmp_path / "asked").read_text().splitlines()) == 8
    again = _run(tmp_path)  # every step is given again: the commands themselves know what is done
    assert again.returncode == 0 and "the table" in again.stdout


def test_on_a_terminal_there_is_a_bar(tmp_path):
    if subprocess.run(["script", "--version"], capture_output=True).returncode:
        pytest.skip("needs util-linux's script")
    done = _run(tmp_path, terminal=True)
    assert done.returncode == 0 and "[..........] a synthetic web" in done.stdout and "10/10" in done.stdout
