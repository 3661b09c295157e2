"""Token stores behind a URL (`gs://...`): copied once, file by file and atomically, to a local cache folder."""

import hashlib
import os
from collections.abc import Mapping

CACHE_VARIABLE = "SAFELM_CACHE"


def is_remote(path: str) -> bool:
    """Whether the path is a URL that fsspec opens rather than a local file."""
    return "://" in path


def cache_root() -> str:
    """Folder for local copies: `$SAFELM_CACHE`, or `~/.cache/safelm`."""
    return os.environ.get(CACHE_VARIABLE) or os.path.join(os.path.expanduser("~"), ".cache", "safelm")


def read_text(url: str) -> str:
    """A small remote text file; FileNotFoundError or ValueError name the URL."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read().decode("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{url}: no such file: not a token store, or caching it did not finish") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: unreadable: {error}") from error


def fetch_folder(url: str, sizes: Mapping[str, int], *, last: tuple[str, str]) -> str:
    """Local folder with the named files of `url`; files already there with the right size are kept.

    `last` is the (name, text) of the file that makes the folder whole. The folder is named after the URL and that
    text, so a remote store that was rewritten gets a new one. ValueError when a file's size (bytes) is wrong.
    """
    name, text = last
    folder = os.path.join(cache_root(), "stores", hashlib.sha256(f"{url}\n{text}".encode()).hexdigest()[:24])
    os.makedirs(folder, exist_ok=True)
    for file_name, size in sizes.items():
        local = os.path.join(folder, file_name)
        if not (os.path.exists(local) and os.path.getsize(local) == size):
            _fetch_file(f"{url}/{file_name}", local, size)
    temporary = os.path.join(folder, f"{name}.tmp-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, os.path.join(folder, name))
    return folder


def _fetch_file(url: str, local: str, size: int) -> None:
    import fsspec

    temporary = f"{local}.tmp-{os.getpid()}"
    try:
        with fsspec.open(url, "rb") as source, open(temporary, "wb") as target:
            while block := source.read(1 << 24):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        if (got := os.path.getsize(temporary)) != size:
            raise ValueError(f"{url}: truncated or replaced: {got} bytes, the manifest says {size}")
        os.replace(temporary, local)
    except FileNotFoundError:
        raise FileNotFoundError(f"{url}: shard is missing, though the manifest lists it") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
