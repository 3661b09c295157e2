"""Every command has a test which shows that no side file it writes is taken for a document."""

import ast

from forked_commands import ROOT

from safelm.__main__ import COMMANDS


def test_every_command_s_side_files_are_looked_at():
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "side_files.assert_only_documents":
                assert isinstance(node.args[0], ast.Constant), path
                found.update(node.args[0].value.split())
    assert found == set(COMMANDS)
