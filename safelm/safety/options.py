"""Parses and checks the options of a judge or a writer, given in code or in the string that names it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

_Settings = TypeVar("_Settings")


def make_settings(kind: type[_Settings], options: Mapping[str, Any], *, where: str, others: str) -> _Settings:
    """Settings of a kind; an integer is accepted for a float or a string.

    Args:
      others: names of options that aren't settings, for messages.

    Raises ValueError, naming option and value, for one that doesn't exist, is of another type or out of range.
    """
    types = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    values = {}
    for name, value in options.items():
        if name not in types:
            raise ValueError(f"{where}: no option {name!r}; there are {', '.join(sorted(types))} and {others}")
        if types[name] in (float, str) and type(value) is int:
            value = types[name](value)
        if type(value) is not types[name]:
            raise ValueError(f"{where}: {name}={value!r}: expected {types[name].__name__}")
        values[name] = value
    return kind(**values)


def check_least(where: str, settings: Any, **least: int) -> None:
    """Raises ValueError for the first setting below its least value."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise ValueError(f"{where}: {name}={getattr(settings, name)}: must be at least {value}")


def check_share(where: str, settings: Any, name: str) -> None:
    """Raises ValueError for a setting outside 0 to 1."""
    if not 0 <= getattr(settings, name) <= 1:
        raise ValueError(f"{where}: {name}={getattr(settings, name)}: must be a share from 0 to 1")
