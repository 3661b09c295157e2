"""Files that appear whole or not at all."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any


def write_whole(target: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> pathlib.Path:
    """Lets `write` fill a temporary file beside `target`, then renames it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".writing-", suffix=target.suffix)
    os.close(handle)
    try:
        write(pathlib.Path(name))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise
    return target
