"""Tests marked slow run when asked for, the others are told of them, and no file consists of slow tests alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def collected(*arguments: str) -> str:
    """What pytest says of collecting this file."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_asked_for():
    assert "::test_asked_for" in collected(f"{__file__}::test_asked_for")
    assert "::test_asked_for" in collected("--slow", __file__)


def test_they_are_left_out_and_counted(monkeypatch):
    monkeypatch.delenv("SAFELM_SLOW", raising=False)
    said = collected(__file__)
    assert "::test_asked_for" not in said and "::test_they_are_left_out_and_counted" in said
    assert "slow tests left out: 1; scripts/test.sh --slow runs them too" in said


def is_slow(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(each).startswith("pytest.mark.slow") for each in function.decorator_list)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*/test_*.py")), ids=lambda path: path.stem)
def test_a_file_has_a_test_that_always_runs(path):
    tests = [
        each
        for each in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")
    ]
    assert tests and not all(map(is_slow, tests))
