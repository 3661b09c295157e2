"""Refuses to continue an output folder with other settings than those it was begun with."""

import itertools
from collections.abc import Mapping
from typing import Any


def check_same(
    place: str,
    former: Mapping[str, Any],
    wanted: Mapping[str, Any],
    flags: Mapping[str, str] | None = None,
    *,
    remedy: str = "choose another --output, or remove that folder",
) -> None:
    """Raises ValueError naming the first setting that has changed, by its flag in `flags` if it has one.

    Columns are compared last, since they follow from other settings. `remedy` says what to do about a change.
    """
    flags = flags or {}
    for key in sorted({*former, *wanted}, key=lambda key: (key == "columns", key)):
        if former.get(key) != wanted.get(key):
            was, now = _shown(former.get(key), wanted.get(key))
            raise ValueError(f"{place} was begun with {flags.get(key, key)} {was}, now it is {now}: {remedy}")


def _shown(was: Any, now: Any) -> tuple[Any, Any]:
    """Two differing settings for a message; of two lists, the first entries that differ."""
    if not (isinstance(was, list) and isinstance(now, list)):
        return was, now
    pairs = itertools.zip_longest(was, now, fillvalue="nothing more")
    return next((old, new) for old, new in pairs if old != new)
