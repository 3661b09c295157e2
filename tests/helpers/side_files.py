"""That no file which a command writes beside its data is ever taken for data."""

import os
from pathlib import Path

from safelm import documents
from safelm.__main__ import COMMANDS

NAMES = ("train*", "validation*", "test_sft*", "wildguard_train*", "c4-*")  # that a corpus's files may have


def assert_only_documents(commands: str, folder: str | os.PathLike[str], *corpora: Path) -> None:
    """Whoever reads a folder that these commands wrote gets the documents of these folders below it and nothing else.

    `tests/project/test_side_files.py` finds the names of the commands in the calls.
    """
    assert set(commands.split()) <= set(COMMANDS)
    assert any(path.is_file() for path in Path(folder).rglob("*")), "nothing was written"
    found = documents.find_named(str(folder), NAMES, (*documents.SUFFIXES, *documents.TSV_SUFFIXES))
    try:
        found += documents.list_files(str(folder))
    except FileNotFoundError:
        pass
    beside = [path for path in found if not any(Path(path).is_relative_to(corpus) for corpus in corpora)]
    assert not beside and bool(found) == bool(corpora)
