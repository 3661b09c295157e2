"""Takes and checks the fields of a JSON object one by one; a field that nobody took is refused by name."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from safelm.serving.errors import ApiError, bad_field


def read_json(data: bytes) -> dict[str, Any]:
    """The JSON object in a UTF-8 body. Raises ApiError for anything else, including NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="bad_json") from None
    except ValueError as error:  # JSONDecodeError, bytes that aren't UTF-8, numbers of thousands of digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ApiError(400, f"the body is not JSON ({reason})", code="bad_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {_type_of(body)}, want an object", code="bad_json")
    return body


async def read_body(request: web.Request, *, most_bytes: int, seconds: float) -> dict[str, Any]:
    """The JSON object that a request brings; ApiError where it is none, too large or too slow."""
    try:
        async with asyncio.timeout(seconds):
            data = await request.read()
    except web.HTTPRequestEntityTooLarge:
        message = f"the body is larger than {most_bytes} bytes"
        raise ApiError(413, message, code="body_too_large", ends_connection=True) from None
    except TimeoutError:
        message = f"the body took longer than {seconds:g} s"
        raise ApiError(408, message, code="body_too_slow", ends_connection=True) from None
    return read_json(data)


class Fields:
    """Takes fields out of an object one by one; null counts as absent.

    Every method raises ApiError naming the field for a value of the wrong type or outside the bounds.
    """

    def __init__(self, body: dict[str, Any], *, prefix: str = ""):
        self._left = {name: value for name, value in body.items() if value is not None}
        self._prefix = prefix

    def take(self, name: str) -> Any:
        """The value of a field, whatever its type; None if it is absent."""
        return self._left.pop(name, None)

    def name_of(self, name: str) -> str:
        """The field's name in errors."""
        return self._prefix + name

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise bad_field(self.name_of(name), value, "true or false")
        return default if value is None else value

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        want = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise bad_field(self.name_of(name), value, want)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # in this order: an integer may be beyond a float's range
            raise bad_field(self.name_of(name), value, f"a number from {low:g} to {high:g}")
        return float(value)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise bad_field(self.name_of(name), _type_of(value), "a string")
        return value

    def choice(self, name: str, known: Sequence[str]) -> str | None:
        value = self.take(name)
        if value is not None and value not in known:
            raise bad_field(self.name_of(name), value, f"one of {', '.join(known)}")
        return value

    def object(self, name: str) -> "Fields":
        """The fields of a nested object; without fields if it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise bad_field(self.name_of(name), _type_of(value), "an object")
        return Fields(value or {}, prefix=f"{self.name_of(name)}.")

    def neutral(self, name: str, *values: Any) -> None:
        """Accepts an unsupported field of the API only if its value asks for nothing."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in values):
            shown = " or ".join(["absent", *(json.dumps(each) for each in values)])
            raise ApiError(
                400,
                f"{self.name_of(name)} is not supported: want it {shown}",
                param=self.name_of(name),
                code="unsupported_field",
            )

    def refuse_rest(self) -> None:
        """Refuses the fields that are left as unknown; call it last."""
        for name in sorted(self._left):
            known_as = self.name_of(name[:80])
            raise ApiError(400, f"unknown field {known_as!r}", param=known_as, code="unknown_field")


def _type_of(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
