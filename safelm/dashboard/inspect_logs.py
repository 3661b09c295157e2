"""Reads Inspect's binary logs (`.eval`) without inspect_ai: a zip of JSON, whose layout its recorder writes.

A finished log has `header.json`, the log without its samples, and `summaries.json`, a line a sample with id, epoch and
scores. A log that was stopped has `_journal/start.json` and `_journal/summaries/1.json`, `2.json`, ..; the earliest
releases wrote `start.json`, `results.json` and `summary.json`. Samples' transcripts (`samples/`) are not opened.
"""

import json
import pathlib
import zipfile
import zlib
from typing import Any

_MOST_BYTES = 1 << 30  # of one part, unpacked
_JOURNAL = "_journal/summaries/"


def read_eval_log(path: pathlib.Path) -> dict[str, Any]:
    """The log as Inspect's JSON has it, with samples of id, epoch and scores alone.

    Raises ValueError naming the file for what is no such zip, or is packed in a way that Python can't unpack.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            return _header(path, packed) | {"samples": _summaries(path, packed)}
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise ValueError(f"{path}: no log of Inspect: not a zip, or an unfinished one") from None
    except RuntimeError:  # another compression, or encrypted
        raise ValueError(f"{path}: packed in a way this can't read; inspect log convert --to json gives JSON") from None


def _header(path: pathlib.Path, packed: zipfile.ZipFile) -> dict[str, Any]:
    names = set(packed.namelist())
    if "header.json" in names:
        return _part(path, packed, "header.json", dict)
    start = next((name for name in ("_journal/start.json", "start.json") if name in names), None)
    if start is None:
        raise ValueError(f"{path}: no log of Inspect: neither header.json nor a journal in it")
    results = _part(path, packed, "results.json", dict) if "results.json" in names else {}
    return {"status": "started"} | _part(path, packed, start, dict) | results


def _summaries(path: pathlib.Path, packed: zipfile.ZipFile) -> list[dict[str, Any]]:
    names = packed.namelist()
    whole = next((name for name in ("summaries.json", "summary.json") if name in names), None)
    parts = [whole] if whole else sorted((name for name in names if name.startswith(_JOURNAL)), key=_number)
    found = [row for name in parts for row in _part(path, packed, name, list)]
    if not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: no log of Inspect: {parts[0]} is no list of objects")
    samples = [{name: row.get(name) for name in ("id", "epoch", "scores")} for row in found]
    return sorted(samples, key=lambda row: (row["epoch"] or 1, str(row["id"])))


def _number(name: str) -> int:
    """Of a part of the journal, as they were written."""
    number = name.removeprefix(_JOURNAL).removesuffix(".json")
    return int(number) if number.isdecimal() else 0


def _part(path: pathlib.Path, packed: zipfile.ZipFile, name: str, kind: type) -> Any:
    if packed.getinfo(name).file_size > _MOST_BYTES:
        raise ValueError(f"{path}: {name} has more than {_MOST_BYTES >> 20} MiB")
    try:
        found = json.loads(packed.read(name))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: no log of Inspect: {name} is no JSON of the right kind")
    return found
