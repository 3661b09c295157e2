"""The lists of requirements agree: pyproject.toml's ranges, constraints.txt's pins, the lean requirements-train.txt."""

import os
import pathlib
import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[2]
DATA_ONLY = {"seqio", "sentencepiece", "tensorflow", "tensorflow-datasets", "tensorflow-text"}
EXTRAS = ("dev", "beam", "eval", "serve", "tpu")


def _read(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _ranges(requirements: list[str] | list[Requirement]) -> dict[str, str]:
    parsed = [Requirement(str(requirement)) for requirement in requirements]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in parsed}


def test_the_lean_install_is_the_project_without_its_data_packages():
    expected = _ranges(_project()["dependencies"])
    assert expected.keys() >= DATA_ONLY
    for name in DATA_ONLY:
        del expected[name]
    assert _ranges(_read("requirements-train.txt")) == expected


@pytest.mark.parametrize("python_version", ["3.11", "3.12"])
def test_every_package_has_one_pin_within_its_range(python_version: str):
    pins: dict[str, Version] = {}
    for pin in _read("constraints.txt"):
        if pin.marker is None or pin.marker.evaluate({"python_version": python_version}):
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and not pin.url
            assert canonicalize_name(pin.name) not in pins
            pins[canonicalize_name(pin.name)] = Version(specifier.version)
    project = _project()
    wanted = project["dependencies"] + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    for line in wanted:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


@pytest.mark.parametrize("python_version", ["3.11", "3.12"])
def test_the_hashed_list_has_the_same_pins_and_a_hash_for_each(python_version: str):
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements-hashed.txt").read_text(), flags=re.MULTILINE)
    hashed = set()
    for entry in re.split(r"\n(?=[a-z])", text):
        pin, *hashes = entry.strip().split(" \\\n    ")
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), pin
        hashed.add(str(Requirement(pin)))
    assert hashed == {str(pin) for pin in _read("constraints.txt")}
    assert "://" not in text  # nothing says where they come from


CI_EXTRAS = ("dev", "eval", "serve", "scoring", "synthesis", "tpu", "parity")  # those of scripts/test.sh for .ci/run
BROUGHT = {"datasets": "lm-eval", "libtpu": "jax"}  # module: the requirement that brings it
NOT_IN_CI = {
    "inspect_ai": "its fsspec and click are older than our pins",
    "wandb": "some forty packages with mlflow, not pinned",
    "mlflow": "some forty packages with wandb, not pinned",
}


def test_continuous_integration_installs_what_tests_would_skip_without():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [line for extra in CI_EXTRAS for line in project["optional-dependencies"][extra]]
    installed = {canonicalize_name(Requirement(line).name) for line in listed}
    asked = set()
    for path in (ROOT / "tests").rglob("*.py"):
        asked |= set(re.findall(r'importorskip\(\s*"(\w+)', path.read_text()))
    assert asked >= {"datatrove", *BROUGHT, *NOT_IN_CI}
    assert not [name for name in asked - {*NOT_IN_CI} if canonicalize_name(BROUGHT.get(name, name)) not in installed]


def _install(tmp_path: pathlib.Path, *extras: str, **environment: str) -> subprocess.CompletedProcess:
    """install.sh with a Python that only writes down what it is asked."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\n[ "$3" = --version ] || echo "$*" >>{tmp_path}/asked.txt\n')
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "SAFELM_VENV": str(tmp_path / "venv"), **environment}
    command = ["bash", str(ROOT / "scripts" / "install.sh"), *extras]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_install_pins_pip_first_and_does_nothing_twice(tmp_path):
    assert _install(tmp_path, "eval", "serve").returncode == 0
    pip, project = (tmp_path / "asked.txt").read_text().splitlines()
    assert pip.endswith("--constraint constraints.txt pip")
    assert project.endswith("--constraint constraints.txt --editable .[eval,serve]")
    assert any(pin.name == "pip" for pin in _read("constraints.txt"))
    again = _install(tmp_path, "eval", "serve")
    assert (again.returncode, again.stdout) == (0, "")
    assert len((tmp_path / "asked.txt").read_text().splitlines()) == 2


def test_install_with_hashes(tmp_path):
    assert _install(tmp_path, "eval", SAFELM_HASHES="1").returncode == 0
    pins, project = (tmp_path / "asked.txt").read_text().splitlines()
    assert pins.endswith("--require-hashes --no-deps --requirement requirements-hashed.txt")
    assert project.endswith("--no-deps --no-build-isolation --editable .")
    for extra in ("parity", "tracking"):
        done = _install(tmp_path, extra, SAFELM_HASHES="1")
        assert done.returncode == 2 and f"does not go with the extra {extra}" in done.stderr


@pytest.mark.parametrize(("package", "flags"), [("pip", "--clear "), ("jax", "")])
def test_install_makes_an_interrupted_environment_anew_but_clears_no_packages(tmp_path, package, flags):
    venv = tmp_path / "venv"
    (venv / "lib" / "python3.12" / "site-packages" / package).mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || {{ echo "$*" >>{tmp_path}/asked.txt; exit 7; }}\n')
    python.chmod(0o755)
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to("/bin/false")
    env = {"PATH": os.environ["PATH"], "SAFELM_VENV": str(venv), "SAFELM_PYTHON": str(python)}
    done = subprocess.run(["bash", str(ROOT / "scripts" / "install.sh")], env=env, capture_output=True, timeout=60)
    assert done.returncode == 7
    assert (tmp_path / "asked.txt").read_text() == f"-m venv {flags}{venv}\n"


def test_install_names_an_extra_that_is_none(tmp_path):
    done = _install(tmp_path, "evla")
    assert done.returncode == 2 and "no extra 'evla'" in done.stderr and not (tmp_path / "asked.txt").exists()
