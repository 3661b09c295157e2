"""How a vocabulary spells bytes: every byte as a character (GPT-2, Llama 3, Qwen), or, in SentencePiece's way, words as
they are with `\u2581` for a space and other characters as tokens of bytes, `<0x0A>` (Gemma).
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

_SPACE = "\u2581"  # a text that has it itself comes back with a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@dataclasses.dataclass(frozen=True)
class ByteLevel:
    """Every character of a token is a byte."""

    byte_of: Mapping[str, int]

    def bytes_of(self, token: str) -> bytes:
        """What a token that isn't special adds to a text."""
        if all(character in self.byte_of for character in token):
            return bytes(self.byte_of[character] for character in token)
        return token.encode()

    def bytes_without_token(self, vocabulary: Collection[str]) -> bytes:
        """Those that vanish when a text is encoded."""
        return bytes(byte for character, byte in self.byte_of.items() if character not in vocabulary)


@dataclasses.dataclass(frozen=True)
class ByteFallback:
    """Tokens are text; every byte has a token of its own besides."""

    def bytes_of(self, token: str) -> bytes:
        """What a token that isn't special adds to a text."""
        found = _BYTE.fullmatch(token)
        return bytes([int(found[1], 16)]) if found else token.replace(_SPACE, " ").encode()

    def bytes_without_token(self, vocabulary: Collection[str]) -> bytes:
        """None: a vocabulary that lacks one is refused."""
        return b""


Spelling = ByteLevel | ByteFallback


def found(spec: Mapping[str, Any]) -> Spelling | None:
    """The spelling of a `tokenizer.json`; None for one that would lose or add something (a prefix space, say)."""
    if spec["model"].get("type") != "BPE":
        return None
    parts = _parts(spec["pre_tokenizer"], "pretokenizers")
    if any(part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in parts):
        return ByteLevel({character: byte for byte, character in enumerate(byte_characters())})
    return ByteFallback() if _falls_back(spec) else None


def _falls_back(spec: Mapping[str, Any]) -> bool:
    normalizers = _parts(spec["normalizer"], "normalizers")
    is_space = [part.get("pattern") == {"String": " "} and part.get("content") == _SPACE for part in normalizers]
    cuts = [part["type"] for part in _parts(spec["pre_tokenizer"], "pretokenizers")]
    decoders = [part["type"] for part in _parts(spec["decoder"], "decoders")]
    bytes_there = all(f"<0x{byte:02X}>" in spec["model"]["vocab"] for byte in range(256))
    is_plain = is_space == [True] and set(cuts) <= {"Split"} and set(decoders) == {"Replace", "ByteFallback", "Fuse"}
    return bool(spec["model"].get("byte_fallback")) and is_plain and bytes_there


def _parts(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    return list(part.get(name, [part])) if part else []
