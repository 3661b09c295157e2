"""Reads other programs' JSON files and checks every value's type; errors name the file, the key and the value."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_LARGEST_SIZE = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class JsonFields:
    """The values of a JSON object with checked types; null counts as missing. Errors name `where` and the key."""

    where: str
    values: Mapping[str, Any]

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least` that fits into 31 bits."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST_SIZE:
            raise ValueError(f"{self.where}: {key} = {value!r}: want an integer from {least} to {_LARGEST_SIZE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{self.where}: {key} = {value!r}: want a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {key} = {value!r}: want true or false")
        return value

    def inside(self, key: str) -> "JsonFields":
        """The object at a key; empty if there is none."""
        values = self.values.get(key)
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{self.where}: {key} = {values!r}: want an object")
        return JsonFields(f"{self.where}: {key}", values or {})

    def expect(self, expected: Mapping[str, tuple[object, ...]]) -> None:
        """Applies `check_expected` to these values."""
        check_expected(self.where, self.values, expected)

    def expect_no_others(self, known: Iterable[str]) -> None:
        """Raises ValueError naming the first unknown key."""
        if unknown := sorted(self.values.keys() - set(known)):
            shown = repr(self.values[unknown[0]])[:200]
            raise ValueError(f"{self.where}: {unknown[0]} = {shown} is not supported")

    def _value(self, key: str, default: Any) -> Any:
        value = default if self.values.get(key) is None else self.values[key]
        if value is None:
            raise ValueError(f"{self.where}: {key} is missing")
        return value


def check_expected(where: str, values: Mapping[str, object], expected: Mapping[str, tuple[object, ...]]) -> None:
    """Raises ValueError naming the first key that is present with a value that our models don't support."""
    for key, allowed in expected.items():
        if key in values and values[key] not in allowed:
            spelled = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"{where}: {key} = {values[key]!r} is not supported; it must be {spelled}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values
