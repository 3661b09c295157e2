"""The lists of requirements agree: pyproject.toml's ranges, constraints.txt's pins, the lean requirements-train.txt."""

import pathlib
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
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
