"""The wheel has what the checkout has, and its commands and configs work where nothing else of the project is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGED = ("configs", "data_tasks", "safelm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, which keeps the checkout clean and knows nothing of builds before it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, f"--wheel-dir={output}", source], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = output.glob("safelm-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder as pip would fill it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(installed), "XLA_FLAGS": os.environ["SAFELM_TESTS_XLA"]}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=cwd, timeout=600)


def test_every_file_of_the_packages_is_in_it_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for name in PACKAGED for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts)
    assert found == {str(path.relative_to(ROOT)) for path in files if path.is_file()}


def test_a_config_of_the_project_is_found_from_any_folder(installed, tmp_path):
    """The commands read it, from the wheel and not from this checkout; what they miss then is told in one line."""
    dry = run(installed, tmp_path, "-m", "safelm.train", "--dry_run", "--config=configs/smollm2_1b7.py")
    assert dry.returncode == 0, dry.stderr
    assert "1.71" in dry.stdout or "1,711" in dry.stdout, dry.stdout
    ladder = run(
        installed,
        tmp_path,
        "-m",
        "safelm.ladder",
        "--config",
        "configs/ladder.py:embedded",
        "--config.seeds=(0,)",
        f"--output={tmp_path / 'study'}",
        "--report",
    )
    assert ladder.returncode == 2 and "nothing is measured yet" in ladder.stderr.splitlines()[-1], ladder.stderr


def test_a_file_of_ones_own_stands_before_the_projects(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs/quickstart.py"
    own.write_text(
        "from configs import base\ndef get_config():\n    config = base.default_config()\n"
        "    config.total_steps = 77\n    return config\n"
    )
    code = (
        "import safelm, sys; from safelm import config_files as files\n"
        "assert safelm.__file__.startswith(sys.argv[1]), safelm.__file__\n"
        "print(*(files.load_config(f'configs/{name}.py').total_steps for name in ('quickstart', 'tiny_cpu')))\n"
        "print(files.locate('configs/tiny_cpu.py'))\n"
        "for flag in ('configs/nothing.py', 'other/tiny_cpu.py', 'configs/../pyproject.toml'):\n"
        "    try: files.locate(flag)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = run(installed, tmp_path, "-c", code, str(installed))
    assert done.returncode == 0, done.stderr
    steps, place, *refused = done.stdout.splitlines()
    assert steps.split()[0] == "77" and place == str(installed / "configs/tiny_cpu.py")
    assert len(refused) == 3 and all("no such file" in line for line in refused)
