"""Files behind a URL (`gs://...`, `hf://...`): reads, lists and writes them with retries; errors name the URL.

On 408, 429, 5xx or a lost connection gcsfs repeats a request six times within half a minute; tensorstore (checkpoint
arrays) repeats it 32 times. For token shards and uploads `retrying` continues until `$SAFELM_RETRY_SECONDS` (600) have
passed: waits double up to 32 s, with random jitter between half and all of the wait. A connection that is silent for a
minute counts as lost, which gcsfs alone would not notice.

Credentials come only from the environment, in the order of Google's libraries: the file named by
`GOOGLE_APPLICATION_CREDENTIALS`, `gcloud auth application-default login`, the machine's service account. Without any of
them requests are anonymous, which is enough for a public bucket. No flag, config field or URL holds a credential;
messages quote the URL and the server's reason, never the request.
"""

import functools
import io
import itertools
import logging
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

import fsspec

from safelm.io.range_reader import RangeReader

RETRY_VARIABLE = "SAFELM_RETRY_SECONDS"
PART_BYTES = 32 << 20
_PARTS_AT_ONCE = 4
_GCS = ("gs://", "gcs://")
_CREDENTIALS = (
    "credentials come from GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login` or the machine's "
    "service account"
)

# Called before anything is written beside the object at a URL, or below: by URL, see `safelm.io.lease`.
guards: dict[str, Callable[[bool], None]] = {}

_logger = logging.getLogger(__name__)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback of what it raises
_Result = TypeVar("_Result")


def is_remote(path: str) -> bool:
    """Whether the path is a URL for fsspec rather than a local file."""
    return "://" in path


def is_bucket(path: str) -> bool:
    """Whether the path is a URL of Cloud Storage."""
    return path.startswith(_GCS)


def check_guards(url: str, *, asks: bool = True) -> None:
    """Raises what the guard of a folder does if this process may write there no more; it may ask the bucket first."""
    for guarded, check in tuple(guards.items()):
        if f"{url}/".startswith(f"{guarded.rpartition('/')[0]}/"):
            check(asks)


def check_output(folder: str) -> None:
    """Raises ValueError if --output is a URL of a kind that can't be written."""
    if is_remote(folder) and not is_bucket(folder):
        raise ValueError(f"--output {folder}: must be a local folder or gs://")


def check_local_output(place: str | os.PathLike[str], flag: str = "--output") -> None:
    """Raises ValueError naming flag and value for a URL, which `pathlib` would take for a folder called `gs:`."""
    if re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(place)):
        raise ValueError(
            f"{flag}={place}: is written to this machine only: give a local place and copy it when it is done "
            "(gcloud storage cp --recursive)"
        )


def options(url: str) -> dict[str, Any]:
    """Arguments for fsspec: for `gs://` at most 60 s of silence, MD5 checks, and no cached listings."""
    if not is_bucket(url):
        return {}
    import aiohttp

    silence = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"requests_timeout": silence, "use_listings_cache": False, "consistency": "md5"}


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it."""
    return fsspec.core.url_to_fs(url, **options(url))


def kind(path: str) -> str | None:
    """What stands at a local path or a URL: "file", "directory" or nothing (None). Raises OSError naming the URL."""
    if not is_remote(path):
        path = os.path.expanduser(path)
        return "directory" if os.path.isdir(path) else "file" if os.path.exists(path) else None
    files, inner = filesystem(path)
    try:
        found = retrying(path, "listing", lambda: files.info(inner), explain=_as_missing)
    except FileNotFoundError:
        return None
    return "directory" if found["type"] == "directory" else "file"


def exists(path: str) -> bool:
    """Whether anything stands at a local path or a URL. Raises OSError naming a URL that can't be asked."""
    return kind(path) is not None


def is_dir(path: str) -> bool:
    """Whether a local path or a URL is a folder. Raises OSError naming a URL that can't be asked."""
    return kind(path) == "directory"


def missing(path: str, otherwise: str) -> FileNotFoundError:
    """The error for a path or URL where nothing stands: there is no such bucket, or the message `otherwise`."""
    bucket = _missing_bucket(path)
    return FileNotFoundError(f"{path}: there is no bucket {bucket!r}" if bucket else otherwise)


def read_bytes(path: str, stop: int | None = None) -> bytes:
    """The content of a small file at a local path or a URL, up to byte `stop`. Raises OSError naming it."""
    if not is_remote(path):
        with open(os.path.expanduser(path), "rb") as file:
            return file.read(-1 if stop is None else stop)
    files, inner = filesystem(path)
    return retrying(path, "reading", lambda: files.cat_file(inner, 0 if stop else None, stop))


def read_text(url: str) -> str:
    """The text of a small file (UTF-8) at a local path or a URL. Raises OSError or ValueError naming it."""
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: unreadable: {error}") from error


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Byte ranges [start, stop) of files of one file system, fetched together.

    Raises OSError naming the URL, also for an answer that is too short.
    """
    files, _ = filesystem(ranges[0][0])
    paths = [filesystem(url)[1] for url, _, _ in ranges]
    found = files.cat_ranges(paths, [start for _, start, _ in ranges], [stop for *_, stop in ranges], on_error="return")
    for index, (url, start, stop) in enumerate(ranges):
        if isinstance(found[index], Exception):
            again = functools.partial(files.cat_file, paths[index], start, stop)
            found[index] = retrying(url, "reading", again, failed=found[index])
        if len(found[index]) != stop - start:
            raise OSError(f"{url}: truncated: bytes {start} to {stop} gave {len(found[index])} of {stop - start}")
    return found


def download(url: str, size: int, target: BinaryIO, on_bytes: Callable[[int], object] = lambda count: None) -> None:
    """Writes a remote file to an open local one, four parts of 32 MiB at a time.

    Args:
      size: of the file, in bytes.
      on_bytes: called with the number of bytes that have arrived since the last call.

    Raises OSError naming the URL, also if the file is shorter than `size`.
    """
    parts = [(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]
    target.seek(0)
    for at in range(0, len(parts), _PARTS_AT_ONCE):
        for part in read_ranges([(url, *part) for part in parts[at : at + _PARTS_AT_ONCE]]):
            target.write(part)
            on_bytes(len(part))
    target.flush()


def open_file(url: str) -> io.BufferedReader:
    """A remote file to stream or seek in, fetched 8 MiB at a time. Opening and reading raise OSError naming the URL."""
    files, path = filesystem(url)
    size = retrying(url, "reading", lambda: files.info(path)["size"])
    return io.BufferedReader(RangeReader(lambda start, stop: read_ranges([(url, start, stop)])[0], int(size)), 8 << 20)


def list_sizes(url: str) -> dict[str, int] | None:
    """Name and size (bytes) of every file directly in a remote folder; None if listing is not allowed."""
    files, path = filesystem(url)
    try:
        entries = retrying(url, "listing", lambda: files.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    except PermissionError:
        return None
    return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}


def upload(local: str, url: str) -> None:
    """Copies a local file to a URL, where it appears only once it is whole. Raises OSError naming the URL."""
    files, path = filesystem(url)
    check_guards(url)
    retrying(url, "writing", lambda: files.put_file(local, path))


def write_text(url: str, text: str) -> None:
    """Writes a small remote text file (UTF-8). Raises OSError naming the URL."""
    files, path = filesystem(url)
    check_guards(url)
    retrying(url, "writing", lambda: files.pipe_file(path, text.encode()))


def remove(url: str) -> None:
    """Removes a remote file. Raises OSError naming the URL."""
    files, path = filesystem(url)
    check_guards(url)
    retrying(url, "removing", lambda: files.rm_file(path))


def check_writable(folder: str) -> None:
    """Writes and removes a tiny file in a local or remote folder, which is made or, if it is remote, listed.

    Raises OSError saying which step was refused.
    """
    probe = f"{folder.rstrip('/')}/.probe-{secrets.token_hex(8)}"
    if is_remote(folder):
        files, path = filesystem(probe)
        retrying(folder, "writing", lambda: files.pipe_file(path, b"probe"))
        retrying(folder, "listing", lambda: files.ls(path.rpartition("/")[0]))  # how checkpoints are found
        retrying(folder, "removing", lambda: files.rm_file(path))
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with open(probe, "xb"):
            pass
        os.remove(probe)
    except OSError as error:
        raise OSError(error.errno, f"cannot write there: {error.strerror or error}", folder) from error


def retrying(
    url: str,
    action: str,
    call: Callable[[], _Result],
    *,
    failed: Exception | None = None,
    explain: Callable[[Exception], OSError | None] = lambda error: None,
) -> _Result:
    """Returns the result of `call`, repeating it after failures that may pass.

    Args:
      url: of the file, or another name of it, for messages.
      action: a word for messages, such as "reading".
      failed: the error of a first attempt that the caller made, if any.
      explain: maps an error to the one to raise at once, or to None.

    Raises:
      OSError: one line that begins with the URL; FileNotFoundError, PermissionError (401, 403) where it is that.
    """
    seconds = _seconds()
    deadline = time.monotonic() + seconds
    for attempt in itertools.count():
        try:
            if failed is not None and attempt == 0:
                raise failed
            return call()
        except Exception as error:  # the libraries raise many kinds, HTTP errors among them that are no OSError
            if (known := explain(error)) is not None:
                raise known from error
            pause = min(2.0**attempt, 32.0) * random.uniform(0.5, 1.0)
            if not _may_pass(error) or time.monotonic() + pause > deadline:
                raise _clear_error(url, action, error, seconds if _may_pass(error) else None) from error
            _logger.warning("%s: %s failed (%s); trying again in %.1f s", url, action, _reason(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _seconds() -> float:
    text = os.environ.get(RETRY_VARIABLE) or "600"
    try:
        if (seconds := float(text)) >= 0:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"{RETRY_VARIABLE} must be a number of seconds, got {text!r}")


def _status(error: Exception) -> int | None:
    """The HTTP status of a library's error, if it has one."""
    response = getattr(error, "response", None)
    values = (getattr(error, "code", None), getattr(error, "status", None), getattr(response, "status_code", None))
    status = next((value for value in values if value is not None), None)
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs
        return 403
    return int(status) if str(status).isdigit() else None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    roots = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ChecksumError" in names:  # gcsfs, of an upload
        return True
    if "aiohttp" in roots:
        return "ClientError" in names
    return bool(roots & {"requests", "httpx", "httpx2"}) and bool(
        names & {"ConnectionError", "Timeout", "TransportError"}
    )


def _clear_error(url: str, action: str, error: Exception, seconds: float | None) -> OSError:
    status = _status(error)
    if _as_missing(error):
        return missing(url, f"{url}: no such file")
    if status in (401, 403):
        return PermissionError(f"{url}: {action} is refused ({status}: {_reason(error)}); {_CREDENTIALS}")
    if seconds is not None:
        return OSError(f"{url}: {action} failed for {seconds:.0f} s, the last time with {_reason(error)}")
    return OSError(f"{url}: {action} failed: {_reason(error)}")


def _as_missing(error: Exception) -> FileNotFoundError | None:
    return FileNotFoundError(str(error)) if isinstance(error, FileNotFoundError) or _status(error) == 404 else None


def _missing_bucket(url: str) -> str | None:
    if not is_bucket(url):
        return None
    files, path = filesystem(url)
    bucket = path.split("/")[0]
    try:
        files.ls(bucket, max_results=1)
    except FileNotFoundError:
        return bucket
    except Exception:  # only for a better message
        return None
    return None


def _reason(error: Exception) -> str:
    """An error as one line, without the request's address."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Forbidden:")]
    text = re.sub(r"https?://\S+", "<address>", " ".join(lines))
    return text[:300] if text else type(error).__name__
