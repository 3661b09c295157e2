"""Changes to a document's text, as pure functions on strings and dicts without TensorFlow.

`safelm.text.harm_tags` inserts and removes the harm tag. Randomness is stateless in both modules: reading a corpus
twice gives the same text in any order of documents, with any number of workers and any NumPy version.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from safelm.text.harm_tags import uniform_draws, utf8
from safelm.text.speakers import ROLE_PAIRS, SPEAKER_NAMES

SAFE_SCORE = 0
NO_SCORE = -1  # the document carries no harm score

_SPEAKER_LABEL = re.compile(
    r"^(?P<lead>[ \t]*(?:>[ \t]*)*(?:(?:[-*+]|\d+[.)]|\#{1,6})[ \t]+)?)"  # indent, quote, list or heading marker
    r"(?P<bold>\*{1,3}|_{1,3})?"
    r"(?P<name>User|USER|Assistant|ASSISTANT)"
    r"(?P<tail>(?(bold)(?:(?P=bold):|:(?P=bold)?)|:))"
    r"(?=\s|\Z|[\"'“‘*_(\[<])",
    re.MULTILINE,
)


def in_validation_split(doc_id: str, fraction: float) -> bool:
    """Whether a document is held out, for a corpus without validation files.

    Depends only on the id (whether its `validation_rank` is below `fraction`), so a document is held out of every task,
    in every run, under every seed. For a rewrite `doc_id` is that of the page that it was made from.
    """
    return validation_rank(doc_id) < fraction


def validation_rank(doc_id: str) -> float:
    """BLAKE2b of an id as a number in [0, 1); documents with low ranks are held out first."""
    digest = hashlib.blake2b(utf8(doc_id), digest_size=8, person=b"validation").digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def replace_speaker_names(text: str, *, doc_id: str, seed: int) -> str:
    """Replaces the speaker labels "User" and "Assistant" by two different names or roles (appendix C.3).

    A label stands at the start of a line (after an indent, a quote, list or heading marker), may be bold ("**User:**",
    "**User**:") and is followed by a colon and then space, a line end, a quotation mark or a bracket; "User" in running
    text, "User::f" and "User:name@host" stay. A speaker keeps one name throughout a dialogue. If possible, the chosen
    names do not occur elsewhere in it.
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
    """All documents in one array, each followed by one `eos_id` (text never encodes to it), and their lengths."""
    lengths = np.array([len(document) + 1 for document in documents], np.int32)
    tokens = np.full(int(lengths.sum()), eos_id, np.int32)
    start = 0
    for document, length in zip(documents, lengths.tolist(), strict=True):
        tokens[start : start + length - 1] = document
        start += length
    return tokens, lengths


def _speakers(text: str, *, doc_id: str, seed: int) -> tuple[str, str]:
    """The names of (User, Assistant): personal names for half of the dialogues, a pair of roles for the others."""
    style, first, second = uniform_draws(3, purpose=b"speakers", seed=seed, doc_id=doc_id, text=text)
    if style < 0.5:
        pairs = [pair for pair in ROLE_PAIRS if pair[0] not in text and pair[1] not in text] or list(ROLE_PAIRS)
        return pairs[int(first * len(pairs))]
    names = [name for name in SPEAKER_NAMES if name not in text]
    names = names if len(names) >= 2 else list(SPEAKER_NAMES)
    user = names.pop(int(first * len(names)))
    return user, names[int(second * len(names))]
