"""Parses the strings that name scorers and writers: `KIND:PLACE?name=value&name=value`."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl


def split(kind: str, rest: str, *, what: str) -> tuple[str, str, dict[str, Any]]:
    """Place, model and options of `PLACE?options` or, for an endpoint, `URL#MODEL?options`.

    Args:
      what: what the string names, such as "scorer", for messages.

    Raises ValueError for malformed options.
    """
    if kind == "endpoint":
        place, _, rest = rest.partition("#")  # the address may have a query of its own
        model, _, query = rest.partition("?")
        return place, model, options(query, what=what)
    place, _, query = rest.rpartition("?") if "?" in rest else (rest, "", "")
    return place, "", options(query, what=what)


def load_python(spec: str, place: str, options: Mapping[str, Any], *, members: Sequence[str], what: str) -> Any:
    """Calls a factory of an importable module, `place` being MODULE:FACTORY, and returns its result.

    Raises ValueError if there is no such factory, or if its result lacks one of `members`.
    """
    module, _, factory = place.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"{what} {spec!r}: expected python:MODULE:FACTORY ({error})") from error
    try:
        inspect.signature(make).bind(**options)
    except (TypeError, ValueError) as error:  # ValueError: what has no signature
        if options or isinstance(error, TypeError):
            raise ValueError(f"{what} {spec!r}: {error}") from error
    made = make(**options)
    for member in members:
        if not hasattr(made, member):
            raise ValueError(f"{what} {spec!r}: its result has no {member!r}")
    return made


def options(query: str, *, what: str) -> dict[str, Any]:
    """The options in `a=1&b=x`, with numbers and true/false parsed."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        return {name: _value(text) for name, text in pairs}
    except ValueError as error:
        raise ValueError(f"{what} options {query!r}: expected name=value&name=value") from error


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
