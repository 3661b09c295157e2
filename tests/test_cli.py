"""What every command shares: how flags, checkpoints and configs are named, and help that is there at once."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from safelm import __main__ as console
from safelm import cli, config_files, train_flags

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("base", "__init__"))
# They run in .venv-bench, which has neither SafeLM nor its help.
OTHER_VENV = ("bench_data_rivals", "bench_train_torch")
SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").glob("*.py")
    if path.stem not in OTHER_VENV and '__name__ == "__main__"' in path.read_text()
)
SHELL_SCRIPTS = sorted(
    path for path in (ROOT / "scripts").glob("*.sh") if path.name not in ("help.sh", "tpu_vm_workers.sh")
)


def test_dashes_and_underscores_are_the_same_flag():
    parser = cli.parser("safelm.x", "A command.")
    parser.add_argument("--max_prompts", type=int)
    parser.add_argument("--show_text", action="store_true")
    parser.add_argument("rest", nargs="*")
    for given in (["--max-prompts=3", "--show-text"], ["--max_prompts", "3", "--show_text"]):
        assert vars(parser.parse_args(given)) == {"max_prompts": 3, "show_text": True, "rest": []}
    given = ["--max-prompts=3", "a-b", "--", "--job-endpoint=x-y"]
    assert parser.parse_args(given).rest == ["a-b", "--job-endpoint=x-y"]
    assert cli.with_underscores(["--a-b=c-d", "-x", "--config.a-b=1"]) == ["--a_b=c-d", "-x", "--config.a_b=1"]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("raw=runs/a", ("raw", "runs/a")),
        ("tag@instruct#0=runs/a", ("tag@instruct#0", "runs/a")),
        ("runs/quickstart/safety", ("safety", "runs/quickstart/safety")),
        ("gs://bucket/run-2/", ("run-2", "gs://bucket/run-2/")),
        ("models/x.gguf", ("x.gguf", "models/x.gguf")),
        ("/data/lr=3/run", ("run", "/data/lr=3/run")),
        ("raw=/data/lr=3/run", ("raw", "/data/lr=3/run")),
    ],
)
def test_a_checkpoint_is_a_folder_with_or_without_a_name(flag, expected):
    assert cli.checkpoint(flag) == expected


@pytest.mark.parametrize("flag", ["", "raw=", "=runs/a", "a b=x", "my run", "raw@=x"])
def test_another_form_of_checkpoint_is_named(flag):
    with pytest.raises(cli.UserError, match=f"--checkpoint={flag}: want NAME=DIR or DIR"):
        cli.checkpoint(flag)


def test_two_checkpoints_of_one_name_are_refused():
    assert cli.checkpoints(["runs/a", "b=runs/a"]) == {"a": "runs/a", "b": "runs/a"}
    with pytest.raises(cli.UserError, match="--checkpoint=a=other/a: the name a is given twice"):
        cli.checkpoints(["runs/a", "other/a"])


@pytest.fixture
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_variant_names_those_that_there_are_and_all_of_them_load(in_the_checkout, name):
    path = f"configs/{name}.py"
    config_files.load(path)
    with pytest.raises(cli.UserError) as error:
        config_files.load(f"{path}:nonsense")
    line = str(error.value)
    assert line.startswith(f"--config={path}:nonsense: no variant 'nonsense': {path} has ") and "\n" not in line
    known = line.partition(" has ")[2]
    takes_one = "get_config()" not in (ROOT / path).read_text()
    assert takes_one == (known != "no variants")
    for variant in known.split(", ") if takes_one else []:
        config_files.load(f"{path}:{variant}")


def test_safety_is_among_the_variants_of_the_quickstart(in_the_checkout, capsys):
    class FailedError(Exception):
        pass

    def fail(line: str) -> None:
        raise FailedError(line)

    for given in (["--config=configs/quickstart.py:nonsense"], ["--config", "configs/quickstart.py:nonsense"]):
        with pytest.raises(FailedError, match=r"configs/quickstart\.py has safety, raw, score0, safeweb, "):
            train_flags.parse(["train", *given, "--dry-run"], fail)
    with pytest.raises(FailedError, match=r"--config=configs/nothing\.py: no such file"):
        train_flags.parse(["train", "--config=configs/nothing.py"], fail)
    with pytest.raises(FailedError, match=r"--config=README\.md: not a config file"):
        train_flags.parse(["train", "--config=README.md"], fail)


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_help_of_a_shell_script_says_how_it_is_called_and_does_nothing(path, tmp_path):
    env = os.environ | {"SAFELM_VENV": str(tmp_path / "venv"), "SAFELM_BENCH_VENV": str(tmp_path / "bench")}
    done = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert f"scripts/{path.name}" in done.stdout
    assert not list(tmp_path.iterdir())


ALL_HELPS = """
import io, os, runpy, sys
import jax, numpy, safelm.train, safelm.evaluate  # once, for all
for script in sys.argv[1:]:
    if not (child := os.fork()):
        sys.argv, sys.stdout = [script, "--help"], io.StringIO()
        sys.path.insert(0, os.path.dirname(script))
        code = "no end"
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        text = sys.stdout.getvalue()
        if code or "usage: python scripts/" not in text:
            os.write(1, f"{script}: {code}, {text[:80]!r}\\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_help_of_every_python_script():
    """Each in a fork of one process that has imported what most of them need: a minute less."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ALL_HELPS, *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not done.stdout


def test_the_console_command_lists_and_runs_the_commands(monkeypatch, capsys):
    with_main = set()
    for path in [*(ROOT / "safelm").glob("*.py"), *(ROOT / "safelm").glob("*/__main__.py")]:
        if '__name__ == "__main__"' in path.read_text() and path.name != "beam_worker.py":
            with_main.add(path.parent.name if path.name == "__main__.py" else path.stem)
    assert set(console.COMMANDS) == with_main - {"safelm"}
    monkeypatch.setattr(sys, "argv", ["safelm", "--help"])
    console.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(console.COMMANDS)
    ran = []
    monkeypatch.setattr(os, "execv", lambda *command: ran.append(command) or sys.exit(0))
    for name in ("report_card", "report-card"):
        monkeypatch.setattr(sys, "argv", ["safelm", name, "--output=x"])
        with pytest.raises(SystemExit):
            console.main()
        assert ran.pop() == (sys.executable, [sys.executable, "-m", "safelm.report_card", "--output=x"])
    monkeypatch.setattr(sys, "argv", ["safelm", "trian"])
    with pytest.raises(SystemExit, match="2"):
        console.main()
    assert "no command 'trian'" in capsys.readouterr().err


def test_the_console_command_imports_nothing_heavy():
    imports = [node for node in ast.walk(ast.parse((ROOT / "safelm" / "__main__.py").read_text())) if
               isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    assert {alias.name for node in imports for alias in node.names} <= set(sys.stdlib_module_names)
