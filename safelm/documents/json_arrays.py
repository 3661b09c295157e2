"""Reads `.json` files that are one array of objects."""

import json
from collections.abc import Iterator
from typing import Any

from safelm.documents.opening import DAMAGED, PACKED, open_binary, read_text

_NAMES = tuple(f".json{end}" for end in ("", *PACKED))
_BLANK = b" \t\r\n"


def is_array(path: str) -> bool:
    """Whether a file is called `.json`, packed or not, and its content begins like an array of objects.

    Raises ValueError for a damaged file.
    """
    if not path.endswith(_NAMES):
        return False
    try:
        with open_binary(path, decompress=True) as file:
            begin = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip(_BLANK)
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged or cut short ({error})") from error
    return begin.startswith(b"[") and begin[1:].lstrip(_BLANK)[:1] in (b"{", b"]", b"")


def iter_array(path: str) -> Iterator[tuple[int, Any]]:
    """Yields (row number from 1, row) of a JSON array, which is held in memory (see `read_text`)."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, damaged or cut short ({error})") from error
    yield from enumerate(found, 1)
