"""`--help` of every command and script, and that every command line in README and docs/ is one that they take."""

import ast
import functools
import os
import re
import subprocess
import sys

import documented
import forked_commands
import pytest
from forked_commands import PREPARATION_ONLY, ROOT

from safelm import __main__ as console
from safelm import config_files
from safelm.train import config_fields

# They run in .venv-bench, which has neither SafeLM nor its help.
OTHER_VENV = ("data_rivals", "train_torch")
SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").rglob("*.py")
    if path.stem not in OTHER_VENV and '__name__ == "__main__"' in path.read_text()
)
SHELL_SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").rglob("*.sh")
    if path.name not in ("help.sh", "caller.sh", "venv.sh", "tpu_vm_workers.sh")
)
PARTS = (
    "safety.synthesis.review",
    "safety.scoring.agreement",
    "aot.slices",
    "ladder.prepare_real_text",
)  # run as modules, no commands of their own
SUBCOMMANDS = {"evaluate": ("report", "calibrate", "audit", "train_judge", "capability", "monitors")}
WITH_CONFIG = ("train", "ladder", "aot")  # their --config.FIELD=VALUE is checked against the config


@functools.cache
def command_helps() -> dict[tuple[str, ...], forked_commands.Done]:
    """By name, and by name and subcommand."""
    keys = [*((name,) for name in (*console.COMMANDS, *PARTS))]
    keys += [(name, verb) for name, verbs in SUBCOMMANDS.items() for verb in verbs]
    commands = [(f"safelm.{name}", *verb, "--help") for name, *verb in keys]
    imports = ("jax", "safelm.checkpoints.checkpoint", "safelm.train.program")
    done = forked_commands.run_all(commands, imports=imports, blocked=PREPARATION_ONLY)
    return dict(zip(keys, done, strict=True))


@functools.cache
def script_helps() -> dict[str, forked_commands.Done]:
    """By the script's name."""
    commands = [(str(path), "--help") for path in SCRIPTS]
    done = forked_commands.run_all(commands, imports=("jax", "safelm.checkpoints.checkpoint", "safelm.train.program"))
    return dict(zip((path.stem for path in SCRIPTS), done, strict=True))


@pytest.mark.parametrize("command", console.COMMANDS)
def test_every_command_has_help_with_an_example_without_tensorflow(command):
    done = command_helps()[(command,)]
    assert done.code == 0, done.output
    assert f"python -m safelm.{command} " in done.output
    file = ROOT / "safelm" / f"{command}.py"
    file = file if file.exists() else file.with_suffix("") / "__main__.py"
    document = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()
    assert not [line for line in document if len(line) > 120], "a backslash joined lines"
    assert not [line for line in document if line.strip() not in done.output], "line breaks are lost"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_python_script_has_help(script):
    done = script_helps()[script.stem]
    assert done.code == 0, done.output
    assert f"usage: python {script.relative_to(ROOT)}" in done.output


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_help_of_a_shell_script_says_how_it_is_called_and_does_nothing(path, tmp_path):
    env = os.environ | {"SAFELM_VENV": str(tmp_path / "venv"), "SAFELM_BENCH_VENV": str(tmp_path / "bench")}
    done = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert str(path.relative_to(ROOT)) in done.stdout
    assert not list(tmp_path.iterdir())


SHOWN = [(page, number, command) for page, number, command in documented.commands()]


@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page, _, command in SHOWN], ids=[f"{page}-{n}" for page, n, _ in SHOWN]
)
def test_every_command_shown_is_one_that_there_is(page, command, monkeypatch):
    """Program, subcommand, every flag's name, the config's file, variant and fields; values are not looked at."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    words = [word for word in command if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, arguments = words[0], words[1:]
    if program in ("source", ".venv/bin/pip", "curl", "export"):
        return
    if program == "python":
        is_module = arguments[0] == "-m"
        program = arguments[1] if is_module else arguments[0]
        arguments = arguments[2:] if is_module else arguments[1:]
    name = program.removeprefix("safelm.")
    if program == "safelm":
        name, arguments = arguments[0].replace("-", "_"), arguments[1:]
        if name == "__help":
            return
        assert name in console.COMMANDS
    if program.endswith(".sh"):
        text = subprocess.run(["bash", program, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert f"{program}" in text
    elif program.endswith(".py"):
        text = script_helps()[program.rpartition("/")[2].removesuffix(".py")].output
    else:
        verb = arguments[:1] if tuple(arguments[:1]) and arguments[0] in SUBCOMMANDS.get(name, ()) else []
        text = command_helps()[(name, *verb)].output
    if program.endswith("ladder.sh"):
        return  # its flags are the ladder's
    _check_flags(name, arguments, text)


def _check_flags(name: str, arguments: list[str], help_text: str) -> None:
    config = None
    for argument in arguments[: arguments.index("--") if "--" in arguments else None]:
        flag, _, value = argument.partition("=")
        if flag == "--config":
            config = config_files.load_config(value)
        elif flag.startswith("--config.") and (name in WITH_CONFIG or config is not None):
            config_fields.get_field(config, flag.removeprefix("--config."))
        elif flag.startswith("--"):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_text.replace("--[no]", "--")), f"{name} has no {flag}"


def test_the_console_command_lists_and_runs_the_commands(monkeypatch, capsys):
    with_main = set()
    for path in [*(ROOT / "safelm").glob("*.py"), *(ROOT / "safelm").glob("*/__main__.py")]:
        if '__name__ == "__main__"' in path.read_text():
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
    code = "import sys, safelm.__main__; assert not {'jax', 'numpy'} & set(sys.modules), 'loaded'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
