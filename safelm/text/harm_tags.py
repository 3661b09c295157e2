"""Inserts the harm tag between the words of unsafe texts and removes it from others, by pure functions.

Randomness is stateless. Every draw is a function of (seed, document id, text) through a hash that keys a Philox counter
generator, whose raw stream NumPy guarantees: the same call gives the same text in every process and under every NumPy
version; another seed gives another text.

Whitespace is Unicode's: what `str.isspace` (and `\\s` of `re`) accepts, so tabs, line ends, the no-break space U+00A0
and the ideographic space U+3000 separate words, and the zero-width space U+200B does not.
"""

import hashlib
import re

import numpy as np
from jaxtyping import Float

from safelm.tags import HARM_TAG, MAX_SCORE, TAG_RATE

_WORD_GAP = re.compile(r"(?<=\S)\s+(?=\S)")


def remove_harm_tags(text: str) -> tuple[str, int]:
    """Removes literal harm tags, so that no document tags itself; returns the text and how many there were.

    Removing a tag can join characters into a new one, so the kept text is checked again after every ">", with which a
    tag ends.
    """
    if HARM_TAG not in text:
        return text, 0
    tag, removed, kept = HARM_TAG.encode(), 0, bytearray()
    *closed, rest = utf8(text).split(b">")
    for piece in closed:
        kept += piece + b">"
        if kept.endswith(tag):
            del kept[-len(tag) :]
            removed += 1
    return (kept + rest).decode("utf-8", "surrogatepass"), removed


def kept_characters(text: str) -> list[int]:
    """The places in a text of the characters that `remove_harm_tags` keeps, in order."""
    kept: list[int] = []
    for place, character in enumerate(text):
        kept.append(place)
        if character == HARM_TAG[-1] and "".join(text[i] for i in kept[-len(HARM_TAG) :]) == HARM_TAG:
            del kept[-len(HARM_TAG) :]
    return kept


def inject_harm_tag(
    text: str, *, harm_score: int, doc_id: str, seed: int, tag_rate: float = TAG_RATE, min_harm_score: int = 4
) -> str:
    """Puts the harm tag into the word gaps of an unsafe text (Maini et al. 2025, algorithm 2).

    Every gap between two words gets the tag with probability `tag_rate`, in front of its whitespace ("w1<tag> w2"), so
    words keep the tokens they have without tags, and removing the tags restores the text byte for byte. No tag comes
    before the first word or after the last. A higher rate tags a superset of a lower rate's gaps.

    Raises ValueError for a safe document (`harm_score` below `min_harm_score`, which is at least 1), for a text that
    already holds the tag (see `remove_harm_tags`) and for a rate outside 0 to 1.
    """
    if not 1 <= min_harm_score <= MAX_SCORE:
        raise ValueError(f"min_harm_score must be 1 to {MAX_SCORE}, got {min_harm_score}")
    if harm_score < min_harm_score:
        raise ValueError(
            f"document {doc_id!r}: harm_score {harm_score} is below {min_harm_score}, it must not be tagged"
        )
    if not 0.0 <= tag_rate <= 1.0:
        raise ValueError(f"tag_rate must be from 0 to 1, got {tag_rate}")
    if HARM_TAG in text:
        raise ValueError(f"document {doc_id!r}: its text already holds the harm tag")
    gaps = [gap.start() for gap in _WORD_GAP.finditer(text)]
    drawn_G = uniform_draws(len(gaps), purpose=b"harm_tag", seed=seed, doc_id=doc_id, text=text) < tag_rate
    pieces, begin = [], 0
    for gap in np.flatnonzero(drawn_G):
        pieces.append(text[begin : gaps[gap]])
        begin = gaps[gap]
    return HARM_TAG.join([*pieces, text[begin:]])


def uniform_draws(count: int, *, purpose: bytes, seed: int, doc_id: str, text: str) -> Float[np.ndarray, " count"]:
    """`count` uniform draws from [0, 1), a pure function of the arguments."""
    identity = utf8(doc_id)
    digest = hashlib.blake2b(digest_size=16, person=purpose)
    digest.update(f"{seed}:{len(identity)}:".encode() + identity + utf8(text))
    raw = np.random.Philox(key=int.from_bytes(digest.digest(), "little")).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def utf8(text: str) -> bytes:
    """The text's bytes in UTF-8; a lone surrogate becomes three bytes."""
    return text.encode("utf-8", "surrogatepass")
