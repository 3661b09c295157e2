"""A folder that appears only once it is complete, here or in a bucket, and that a stopped run goes on with."""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safelm.data.store import MANIFEST_NAME
from safelm.io import cache, files, lease, records, remote

log = logging.getLogger("safelm.convert_tokens")

_SETTINGS, _FILES = "settings.json", "files"


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
def resumable_target(target: str, flag: str, settings: Mapping[str, Any]) -> Iterator[Path]:
    """A local folder that becomes the target when the block ends well.

    After a kill, a full disk or a broken upload what is finished stays in a hidden folder, beside a local target or in
    the cache of remote files, and the next run with the same settings gets it; of other settings it is removed. Bad
    input (ValueError) leaves nothing. To a bucket the files are uploaded at the end, the manifest last, so that what a
    stopped upload leaves there is no folder of tokens.

    Args:
      settings: JSON-able; everything that the folder's content follows from.

    Raises BusyError if another process writes the same target.
    """
    staging = _staging(target)
    staging.mkdir(parents=True, exist_ok=True)
    folder, whole = staging / _FILES, False
    there = lease.held(target) if remote.is_remote(target) else contextlib.nullcontext()
    with files.locked(staging / ".lock", f"{flag}={target}: another process is writing it"), there:
        if _settings(staging) != settings:
            shutil.rmtree(folder, ignore_errors=True)
            records.write(staging / _SETTINGS, settings)
        elif folder.exists():
            log.info("%s: going on with what a former run finished", target)
        folder.mkdir(exist_ok=True)
        for unfinished in folder.rglob(f"{files.UNFINISHED}*"):
            unfinished.unlink()
        try:
            yield folder
            _publish(folder, target, flag)
            whole = True
        except ValueError:
            whole = True  # bad input: nothing of it is worth keeping
            raise
        finally:
            if whole:
                shutil.rmtree(staging, ignore_errors=True)
            else:
                log.warning("%s: finished parts are kept in %s: run the same command again", target, staging)


def _staging(target: str) -> Path:
    if remote.is_remote(target):
        name = hashlib.sha256(target.rstrip("/").encode()).hexdigest()[:16]
        return Path(cache.cache_root()) / "staging" / f"convert_tokens-{name}"
    place = Path(os.path.abspath(target))
    return place.parent / f".{place.name}.partial"


def _settings(staging: Path) -> Mapping[str, Any]:
    try:
        return records.read(staging / _SETTINGS, "")
    except (FileNotFoundError, ValueError):
        return {}


def _publish(folder: Path, target: str, flag: str) -> None:
    if remote.is_remote(target):
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in sorted(found, key=lambda path: path.name == MANIFEST_NAME):
            remote.upload(str(path), f"{target.rstrip('/')}/{path.relative_to(folder).as_posix()}")
        return
    if os.path.exists(target):
        raise FileExistsError(f"{flag}={target}: appeared while writing; nothing was overwritten")
    os.rename(folder, target)
