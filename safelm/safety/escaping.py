"""Escapes documents for judges and writers, so that a document can neither leave its frame nor hide anything.

Markup becomes entities: `<`, `>`, `&`, the bracket of `[/INST]` and similar, and the characters that a vocabulary's
normalizer may turn into them (full-width and small forms). Invisible characters become numeric entities: controls, zero
width, direction, tags, fillers, and selectors that can spell a message. `unescape` restores the document.
"""

import functools
import re
import sys
import unicodedata

_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_NAMED = {entity: character for character, entity in _MARKUP.items()} | {"&#91;": "["}
_ENTITY = re.compile(r"&(?:amp|lt|gt|#91|#x[0-9A-F]{2,6});")
_BRACKETED = re.compile(r"\[(?=(/?[^\[\]\s]{1,40})[\]\uff3d])")
_TOKEN_NAME = re.compile(r"/?[A-Z_]+")
_INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x2800, 0x2800),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0E),
        (0xFFA0, 0xFFA0),
        (0xE0000, 0xE0FFF),
    )
    for code in range(first, last + 1)
)


def escape(document: str) -> str:
    """The document with entities for markup and invisible characters; lone surrogates become U+FFFD."""
    text = without_surrogates(document)
    table = {ord(character): entity for character in set(text) if (entity := _entity(character)) is not None}
    return _BRACKETED.sub(_escape_bracket, text.translate(table))


def unescape(escaped: str) -> str:
    """The document from which `escape` made this text."""
    return _ENTITY.sub(lambda entity: _character(entity[0]) or entity[0], escaped)


def unescape_seen(text: str) -> str:
    """A writer's text with our entities as characters again, without hidden characters; other numbers stay."""

    def seen(entity: re.Match[str]) -> str:
        character = _character(entity[0])
        if character is None or not (character == "[" or _entity(character)):
            return entity[0]
        return "" if is_hidden(character) else character

    return _ENTITY.sub(seen, text)


def is_hidden(character: str) -> bool:
    """Whether a character is invisible; tabs and line ends don't count."""
    if character in "\t\n\r":
        return False
    return character in _INVISIBLE or unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which UTF-8 and JSON can't encode."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _character(entity: str) -> str | None:
    """The character of an entity; None for a number without a character."""
    if entity in _NAMED:
        return _NAMED[entity]
    code = int(entity[3:-1], 16)
    return chr(code) if code <= sys.maxunicode else None


@functools.cache
def _entity(character: str) -> str | None:
    if character in _MARKUP:
        return _MARKUP[character]
    if character == "[" or (character.isascii() and not is_hidden(character)):
        return None
    becomes_markup = any(
        found in "<>&[" for form in ("NFKC", "NFKD") for found in unicodedata.normalize(form, character)
    )
    return f"&#x{ord(character):02X};" if becomes_markup or is_hidden(character) else None


def _escape_bracket(found: re.Match[str]) -> str:
    return "&#91;" if _TOKEN_NAME.fullmatch(unicodedata.normalize("NFKC", found[1])) else found[0]
