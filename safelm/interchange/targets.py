"""A folder that appears only once it is complete, here or in a bucket."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safelm.data.store import MANIFEST_NAME
from safelm.io import cache, remote
from safelm.io.files import whole_folder


def check_new(target: str, flag: str) -> None:
    """Raises FileExistsError if the target is there. In a bucket it is once it has a manifest.

    Raises OSError or ValueError for a place that can't be written.
    """
    if not remote.is_remote(target):
        is_there = Path(target).exists()
    else:
        remote.check_output(target)
        remote.check_writable(target)
        is_there = MANIFEST_NAME in (remote.list_sizes(target) or {})
    if is_there:
        raise FileExistsError(f"{flag}={target}: exists already; nothing was written")


@contextlib.contextmanager
def whole_target(target: str, flag: str) -> Iterator[Path]:
    """A local folder that becomes the target when the block ends well.

    For a bucket its files are uploaded then, the manifest last, so that what a stopped upload leaves is no folder of
    tokens; the next try replaces it.
    """
    if not remote.is_remote(target):
        with whole_folder(Path(target), flag) as folder:
            yield folder
        return
    parent = os.path.join(cache.cache_root(), "staging")
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convert_tokens-", dir=parent) as staging:
        yield Path(staging)
        files = [path for path in sorted(Path(staging).rglob("*")) if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == MANIFEST_NAME):
            remote.upload(str(path), f"{target.rstrip('/')}/{path.relative_to(staging).as_posix()}")
