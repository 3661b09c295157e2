"""Fields of a config by name: their values, which of them differ, and the one that isn't there."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from safelm.train.defaults import default_config


def not_default(config: ConfigDict) -> list[str]:
    """ "field=value" for what a config sets, without the phases of its data."""
    defaults = json.loads(default_config().to_json_best_effort())
    lines = changed_fields(defaults, json.loads(config.to_json_best_effort()))
    fields = [line.partition(":")[0] for line in lines]
    return [f"{field}={get_field(config, field)}" for field in fields if field != "data.phases"]


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "field: old -> new" for the leaves in which two nested dicts differ."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        there, here = old.get(name), new.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += changed_fields(there, here, f"{prefix}{name}.")
        elif there != here:
            lines.append(f"{prefix}{name}: {there} -> {here}")
    return lines


def unknown_field(config: ConfigDict, arguments: Iterable[str]) -> str | None:
    """A line about the first `--config.a.b` of a command line that the config doesn't have, or None."""
    for argument in arguments:
        if not (match := re.match(r"--?config\.([^=]+)", argument)):
            continue
        node, known = config, "config"
        for part in match[1].split("."):
            if not isinstance(node, ConfigDict) or part not in node:
                has = ", ".join(node) if isinstance(node, ConfigDict) else "no fields, it is a value"
                return f"unknown config field {argument}: {known} has {has}"
            node, known = node.get(part), f"{known}.{part}"
    return None


def get_field(config: ConfigDict, dotted: str) -> Any:
    """The value of a field named as on the command line, such as "optimizer.peak_lr"."""
    for part in dotted.split("."):
        config = config[part]
    return config
