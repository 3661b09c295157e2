"""Reads the files by which sentence-transformers describes how token vectors become one."""

import json
from pathlib import Path
from typing import Any

from safelm.formats.json_fields import read_json

_POOLING_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def read_modules(folder: Path) -> dict[str, Any]:
    """Reads sentence-transformers' files: "pooling", "normalize" and "max_tokens", as far as the folder has them.

    Raises ValueError for an unknown pooling or module (such as a Dense layer).
    """
    found: dict[str, Any] = {}
    modules_file = folder / "modules.json"
    pooling_folder = "1_Pooling"
    if modules_file.exists():
        types = {str(entry["type"]).rsplit(".", 1)[-1]: entry["path"] for entry in _read_modules(modules_file)}
        if unknown := sorted(set(types) - {"Transformer", "Pooling", "Normalize"}):
            raise ValueError(f"{modules_file}: module {unknown[0]} is not supported")
        found["normalize"] = "Normalize" in types
        pooling_folder = types.get("Pooling", pooling_folder)
    pooling_file = folder / pooling_folder / "config.json"
    if pooling_file.exists():
        values = read_json(pooling_file)
        modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        if len(modes) != 1 or modes[0] not in _POOLING_MODES:
            raise ValueError(f"{pooling_file}: {', '.join(modes) or 'no pooling'} is not supported")
        found["pooling"] = _POOLING_MODES[modes[0]]
    limits_file = folder / "sentence_bert_config.json"
    if limits_file.exists() and isinstance(limit := read_json(limits_file).get("max_seq_length"), int):
        found["max_tokens"] = limit
    return found


def _read_modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(modules, list) or not all(isinstance(m, dict) and {"type", "path"} <= m.keys() for m in modules):
        raise ValueError(f"{path}: not a list of modules, each with a type and a path")
    return modules
