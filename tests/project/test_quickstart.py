"""Shell scripts with a stand-in for Python: what they print and keep, and from which folder paths are meant."""

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


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Lets scripts run with a Python that only writes down what it is asked, in the folder `tmp_path`."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>"$ASKED"\n')
    python.chmod(0o755)
    for extras in ("dev-eval", "dev-eval-serve-synthesis"):
        (tmp_path / "venv" / f"installed-{extras}").touch()
    monkeypatch.setenv("SAFELM_VENV", "venv")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "asked"


def _script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_paths_are_meant_from_the_folder_of_the_call(asked, tmp_path):
    done = _script("quickstart.sh", "run")
    assert (tmp_path / "run" / "logs").is_dir() and f"Logs: {tmp_path}/run/logs" in done.stdout
    assert f"{tmp_path}/venv/bin/safelm serve --checkpoint={tmp_path}/run/raw" in done.stdout
    assert f"--output={tmp_path}/run/corpus" in asked.read_text().splitlines()
    asked.unlink()
    flags = ("--real=data", "--records", "kept", "--config.init-checkpoint=hf:a/b", "--plan", "--init_checkpoint=/w")
    assert _script("ladder.sh", "study", *flags).returncode == 0
    given = asked.read_text().splitlines()
    assert given[2:4] == ["--config=configs/ladder.py:smollm2_135m", f"--output={tmp_path}/study"]
    assert given[5:] == [
        *(f"--config.real={tmp_path}/data", f"--records={tmp_path}/kept", "--config.init_checkpoint=hf:a/b"),
        *("--plan", "--config.init_checkpoint=/w"),
    ]


@pytest.mark.parametrize("flags", [("--output=kept",), ("--output", "kept"), ("study", "--plan", "--output=kept")])
def test_the_output_of_the_ladder_is_meant_from_the_folder_of_the_call(asked, tmp_path, flags):
    assert _script("ladder.sh", *flags).returncode == 0
    given = [each for each in asked.read_text().splitlines() if each.startswith("--output")]
    assert given == [f"--output={tmp_path}/kept"] and (tmp_path / "kept").is_dir() and not (tmp_path / "study").exists()


def test_whoever_calls_from_the_checkout_gets_paths_as_given(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SAFELM_VENV", os.path.relpath(tmp_path / "venv"))
    run_dir = os.path.relpath(tmp_path / "study")
    assert _script("ladder.sh", run_dir, "--real=data", "--workers", "3").returncode == 0
    assert asked.read_text().splitlines()[2:] == [
        *("--config=configs/ladder.py:real", f"--output={run_dir}", "--workers=2", "--config.real=data", "--workers=3")
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("quickstart.sh", ("--seed=3",), "takes a folder and no flags, got --seed=3"),
        ("quickstart.sh", ("run", "other"), "takes a folder and no flags, got run other"),
        ("ladder.sh", ("--seed=3",), "unknown argument --seed=3"),
        ("ladder.sh", ("study", "other"), "unknown argument other"),
        ("ladder.sh", ("--report", "runs/x"), "unknown argument runs/x"),
        ("ladder.sh", ("--nonsense",), "unknown argument --nonsense"),
        ("ladder.sh", ("--plan", "--records"), "--records needs a value"),
        ("bench/gpu.sh", ("--part=x",), "unknown argument --part=x"),
        ("bench/gpu.sh", ("--small", "runs/x"), "unknown argument runs/x"),
    ],
)
def test_an_unknown_argument_is_refused_before_anything_is_installed(tmp_path, monkeypatch, name, arguments, said):
    monkeypatch.setenv("SAFELM_VENV", str(tmp_path / "venv"))
    monkeypatch.setenv("SAFELM_PYTHON", "/absent/python")
    done = _script(name, *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
