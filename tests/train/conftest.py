"""What tiny runs are made from, and a copy of a module's finished one."""

import shutil

import pytest
import tiny_runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of `finished`, a fixture of the module."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"
