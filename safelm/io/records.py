"""Small JSON records: one object per file, or one object per line of an append-only log."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from safelm.io import files, remote

_MOST_LEVELS = 64  # of values from outside


def read(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """The object in a JSON file, local or at a URL.

    Args:
      remedy: advice about a damaged file, for the message.

    Raises FileNotFoundError if there is no file, ValueError naming the file if it holds no JSON object.
    """
    place = os.fspath(path)
    return parse(remote.read_bytes(place), place, remedy)


def parse(data: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """The object in JSON text. Raises ValueError made of `where` and `remedy` if it holds none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        position = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{where}: damaged, not JSON{position}; {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: damaged, holds a {type(value).__name__} and no object; {remedy}")
    return value


def parse_lines(data: str, where: str, remedy: str) -> list[dict[str, Any]]:
    """The objects of a log, one per line; a last line cut by a kill or a full disk is left out.

    Raises ValueError naming file and line of any other damage.
    """
    *lines, last = data.split("\n")
    found = [parse(line, f"{where}, line {number}", remedy) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        return [*found, parse(last, where, remedy)] if last.strip() else found
    except ValueError:
        return found


def read_log(file: Any, where: str, remedy: str) -> tuple[list[dict[str, Any]], int]:
    """The objects of an open log up to its damaged end, and how many bytes they take.

    Raises ValueError naming the line if whole lines follow a damaged one, which no kill can cause.
    """
    found, size, damaged = [], 0, 0
    for number, line in enumerate(file, 1):
        try:
            value = parse(line if line.endswith(b"\n") else b"", where, remedy)
        except ValueError:
            damaged = damaged or number
            continue
        if damaged:
            raise ValueError(f"{where}, line {damaged}: damaged, and whole lines follow it; {remedy}")
        found.append(value)
        size += len(line)
    return found, size


def write(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes an object to a local or remote file atomically. Raises OSError naming the file."""
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    if remote.is_remote(os.fspath(path)):
        remote.write_text(os.fspath(path), text)
    else:
        files.write_whole(path, text)


def check_depth(value: Any, where: str) -> None:
    """Raises ValueError naming `where` for a JSON value nested so deeply that following it down may fail."""
    level = [value]
    for _ in range(_MOST_LEVELS):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inner for each in values]
    if any(isinstance(each, dict | list) for each in level):
        raise ValueError(f"{where}: nested deeper than {_MOST_LEVELS} levels")


def fingerprint(values: Any) -> str:
    """SHA-256 (hex) of JSON values, independent of the order of an object's keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
