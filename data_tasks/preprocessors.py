"""What is done to a document's text, as pure functions on strings and dicts: no TensorFlow, no state, no clock.

Randomness is stateless. Every draw is a function of (seed, document id, text) through a hash that keys a Philox
counter generator, whose raw stream NumPy guarantees: two reads of a corpus give the same text whatever the order of
documents, the number of workers or the NumPy version; another seed gives another text.

Whitespace is Unicode's: what `str.isspace` (and `\\s` of `re`) accepts, so tabs, line ends, the no-break space U+00A0
and the ideographic space U+3000 separate words, and the zero-width space U+200B does not.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int32

from data_tasks.speakers import ROLE_PAIRS, SPEAKER_NAMES
from safelm.tags import HARM_TAG

SAFE_SCORE = 0
RECONTEXTUALIZE_SCORES = frozenset({1, 2, 3})
UNSAFE_SCORES = frozenset({4, 5})
MAX_SCORE = 5
NO_SCORE = -1  # the document carries no harm score

_WORD_GAP = re.compile(r"(?<=\S)\s+(?=\S)")
_SPEAKER_LABEL = re.compile(
    r"^(?P<lead>[ \t]*(?:>[ \t]*)*(?:(?:[-*+]|\d+[.)]|\#{1,6})[ \t]+)?)"  # indent, quote, list or heading marker
    r"(?P<bold>\*{1,3}|_{1,3})?"
    r"(?P<name>User|USER|Assistant|ASSISTANT)"
    r"(?P<tail>(?(bold)(?:(?P=bold):|:(?P=bold)?)|:))"
    r"(?=\s|\Z|[\"'“‘*_(\[<])",
    re.MULTILINE,
)


def has_score(document: Mapping[str, object], scores: Collection[int]) -> bool:
    """Whether the document's `harm_score` is one of `scores`; a document without a score never is."""
    return document.get("harm_score", NO_SCORE) in scores and document.get("harm_score", NO_SCORE) != NO_SCORE


def split_by_score(documents: Iterable[Mapping[str, object]]) -> dict[str, list[Mapping[str, object]]]:
    """Documents by what the method does with them: `safe` (0), `recontextualize` (1 to 3), `unsafe` (4, 5).

    Maini et al. 2025, section 3. Raises ValueError for a document without a score from 0 to 5.
    """
    parts: dict[str, list[Mapping[str, object]]] = {"safe": [], "recontextualize": [], "unsafe": []}
    for document in documents:
        if has_score(document, {SAFE_SCORE}):
            parts["safe"].append(document)
        elif has_score(document, RECONTEXTUALIZE_SCORES):
            parts["recontextualize"].append(document)
        elif has_score(document, UNSAFE_SCORES):
            parts["unsafe"].append(document)
        else:
            raise ValueError(
                f"document {document.get('id')!r}: harm_score {document.get('harm_score')!r} is not 0 to 5"
            )
    return parts


def in_validation_split(doc_id: str, fraction: float) -> bool:
    """Whether a document is held out, for a corpus without validation files of its own.

    A function of the id alone (its `validation_rank` below `fraction`): the same document is held out of every task,
    in every run, under every seed.
    """
    return validation_rank(doc_id) < fraction


def validation_rank(doc_id: str) -> float:
    """BLAKE2b of an id as a number from 0 to below 1: the lower, the sooner a document is held out."""
    digest = hashlib.blake2b(_utf8(doc_id), digest_size=8, person=b"validation").digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def remove_harm_tags(text: str) -> tuple[str, int]:
    """The text without literal harm tags, and how many there were: a document must not tag itself.

    None is left, though taking one away can put another together: after each ">", with which a tag ends, what is kept
    so far is looked at again.
    """
    if HARM_TAG not in text:
        return text, 0
    tag, removed, kept = HARM_TAG.encode(), 0, bytearray()
    *closed, rest = _utf8(text).split(b">")
    for piece in closed:
        kept += piece + b">"
        if kept.endswith(tag):
            del kept[-len(tag) :]
            removed += 1
    return (kept + rest).decode("utf-8", "surrogatepass"), removed


def inject_harm_tag(
    text: str, *, harm_score: int, doc_id: str, seed: int, tag_rate: float = 0.05, min_harm_score: int = 4
) -> str:
    """Puts the harm tag into the word gaps of an unsafe text (Maini et al. 2025, algorithm 2).

    Every gap between two words gets the tag with probability `tag_rate`, in front of its whitespace ("w1<tag> w2"),
    so words keep the tokens they have without tags, and removing the tags restores the text byte for byte. Never in
    front of the first word nor after the last. A higher rate tags a superset of a lower rate's gaps.

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
    drawn_G = _uniforms(len(gaps), purpose=b"harm_tag", seed=seed, doc_id=doc_id, text=text) < tag_rate
    pieces, begin = [], 0
    for gap in np.flatnonzero(drawn_G):
        pieces.append(text[begin : gaps[gap]])
        begin = gaps[gap]
    return HARM_TAG.join([*pieces, text[begin:]])


def replace_speaker_names(text: str, *, doc_id: str, seed: int) -> str:
    """Replaces the speaker labels "User" and "Assistant" by two different personal names or roles (appendix C.3).

    A label stands at the start of a line (after an indent, a quote, list or heading marker), may be bold ("**User:**",
    "**User**:") and is followed by a colon and then space, a line end, a quotation mark or a bracket; "User" in running
    text, "User::f" and "User:name@host" stay. One speaker has one name in all of a dialogue, and the names chosen do
    not occur in it otherwise as long as the lists have such names.
    """
    if not _SPEAKER_LABEL.search(text):
        return text
    user, assistant = _speakers(text, doc_id=doc_id, seed=seed)

    def rename(label: re.Match[str]) -> str:
        name = user if label["name"].lower() == "user" else assistant
        return f"{label['lead']}{label['bold'] or ''}{name}{label['tail']}"

    return _SPEAKER_LABEL.sub(rename, text)


def append_end_of_document(
    documents: Sequence[Int32[np.ndarray, " _"]], eos_id: int
) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " documents"]]:
    """All documents in one array, `eos_id` after each (exactly one: text never encodes to it), and their lengths."""
    lengths = np.array([len(document) + 1 for document in documents], np.int32)
    tokens = np.full(int(lengths.sum()), eos_id, np.int32)
    start = 0
    for document, length in zip(documents, lengths.tolist(), strict=True):
        tokens[start : start + length - 1] = document
        start += length
    return tokens, lengths


def _speakers(text: str, *, doc_id: str, seed: int) -> tuple[str, str]:
    """The names for (User, Assistant): half the dialogues get personal names, half a pair of roles."""
    style, first, second = _uniforms(3, purpose=b"speakers", seed=seed, doc_id=doc_id, text=text)
    if style < 0.5:
        pairs = [pair for pair in ROLE_PAIRS if pair[0] not in text and pair[1] not in text] or list(ROLE_PAIRS)
        return pairs[int(first * len(pairs))]
    names = [name for name in SPEAKER_NAMES if name not in text]
    names = names if len(names) >= 2 else list(SPEAKER_NAMES)
    user = names.pop(int(first * len(names)))
    return user, names[int(second * len(names))]


def _uniforms(count: int, *, purpose: bytes, seed: int, doc_id: str, text: str) -> Float[np.ndarray, " count"]:
    """`count` draws from [0, 1), a pure function of all arguments."""
    identity = _utf8(doc_id)
    digest = hashlib.blake2b(digest_size=16, person=purpose)
    digest.update(f"{seed}:{len(identity)}:".encode() + identity + _utf8(text))
    raw = np.random.Philox(key=int.from_bytes(digest.digest(), "little")).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
