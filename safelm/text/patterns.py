"""Tries the regular expressions inside other people's `tokenizer.json` before they are used.

The engine behind `tokenizers` (Oniguruma) backtracks up to ten million times from every character of a text, so an
expression such as `(a+)+$` ends in a panic or takes hours on a page. The expressions of well-known models are known to
be harmless. Any other one first cuts texts made of its own characters, in a process with limits. That is a trial and no
proof: if an expression gives up on a text later, `Tokenizer.encode` raises ValueError.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from safelm.text import gguf_tokenizer, stranger_worker

_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_ANY = ("a", "A", "0", " ", "\n", "\r\n", " \n", "\t", ".", "'", "_", "é", "中", "\u0301")
_MOST_UNITS = 48  # of an expression's own characters and words
_LONGEST_WORD = 9
_LONG, _SHORT = 20_000, 200  # characters of a text of one unit, of one behind another


def check(data: bytes, origin: str) -> None:
    """Tries the expressions in the bytes of a `tokenizer.json`. Raises ValueError naming `origin` and the fault."""
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not a tokenizer.json ({error})") from error
    if not isinstance(spec, dict):
        raise ValueError(f"{origin}: not a tokenizer.json ({type(spec).__name__}, not an object)")
    parts = {name: spec.get(name) for name in _PARTS}
    found = [pattern for pattern in _patterns(parts) if pattern not in gguf_tokenizer.KNOWN_PATTERNS]
    if not found:
        return
    try:
        _try(json.dumps(parts), tuple(found))
    except ValueError as error:
        shown = ", ".join(repr(pattern[:60]) for pattern in found[:3])
        raise ValueError(f"{origin}: its patterns ({shown}) can't be used: {error}") from error


def _patterns(value: Any) -> Iterator[str]:
    """The regular expressions, and the replacements of normalizers."""
    if isinstance(value, dict):
        pattern = value.get("pattern")
        if isinstance(pattern, dict):
            yield from (str(each) for each in pattern.values())
        for each in value.values():
            yield from _patterns(each)
    elif isinstance(value, list):
        for each in value:
            yield from _patterns(each)


def _words(pattern: str) -> Iterator[str]:
    for is_word, letters in itertools.groupby(pattern, str.isalnum):
        if is_word:
            yield "".join(letters)[:_LONGEST_WORD]


@functools.lru_cache(maxsize=8)
def _try(parts: str, found: tuple[str, ...]) -> None:
    stranger_worker.try_cutting(json.loads(parts), list(texts(found)))


def texts(found: tuple[str, ...]) -> Iterator[str]:
    """Texts that are hard for these expressions: their characters repeated, alone and after another one."""
    spelled = (unit for pattern in found for unit in (*_words(pattern), *pattern))
    own = list(dict.fromkeys(spelled))[:_MOST_UNITS]
    units = list(dict.fromkeys([*own, *_ANY]))
    wanted = "".join(own)  # an expression isn't even tried on a text without a character that it can't do without
    for tail in ("", "\x00" + wanted, "\n" + wanted):
        yield from (unit * (_SHORT // len(unit)) + tail for unit in units)
        yield from (first + unit * (_SHORT // len(unit)) + tail for first in own for unit in units)
    for tail in ("", "\n" + wanted):
        yield from (unit * (_LONG // len(unit)) + tail for unit in units)
