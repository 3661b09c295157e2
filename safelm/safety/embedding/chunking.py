"""Cuts text into chunks of token ids that fit a backbone, in bounded memory for any text.

A chunk has at most `max_tokens` ids, including its special tokens and prefix. Each chunk is filled before the next
begins; together they hold every token of the text once, in order. A text without tokens gives one chunk.

Special tokens spelled in a text are encoded literally. A lone surrogate becomes U+FFFD.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from safelm.text import tokenizer_backend
from safelm.text.tokenizer import Tokenizer

PART_CHARACTERS = 1 << 16  # of a text are tokenised at once
BATCH_CHARACTERS = 1 << 20
_LONGEST_WORD = 1024  # characters within which an end of a word is looked for
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_LAST_WORD_END = re.compile(r"\S(?=\s+\S*\Z)")
_PROBE = "a"

Chunk = Int32[np.ndarray, " tokens"]


@dataclasses.dataclass(frozen=True)
class ChunkTokenizer:
    """Cuts texts into chunks of ids. Picklable.

    Attributes:
      backend: encodes without special tokens: our `Tokenizer`, or an encoder's own from `tokenizers`.
      before, after: ids at the beginning and end of every chunk (special tokens and the prefix).
      empty: the id for a text without tokens, if a chunk has no ids around it.
      pad_id: the id that pads rows to their bucket's length.
      origin: the name of an encoder's tokenizer in errors.
      cuts_off: whether only the first chunk of a text is given.
    """

    backend: Tokenizer | tokenizers.Tokenizer
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    empty: int | None = None
    pad_id: int = 0
    origin: str = "tokenizer.json"
    cuts_off: bool = False

    def chunks(self, texts: Sequence[str], max_tokens: int) -> Iterator[tuple[int, Chunk]]:
        """Every chunk with the index of its text, in the order of the texts.

        Raises ValueError if `max_tokens` leaves no room for text.
        """
        room = max_tokens - len(self.before) - len(self.after)
        if room < 1:
            raise ValueError(f"max_tokens={max_tokens}: {max_tokens - room} of them are special tokens or the prefix")
        rest = np.zeros(0, np.int32)
        done: set[int] = set()  # texts of which no further chunk is wanted
        for group in _groups(texts, done):
            for (index, _, is_last), ids in zip(group, self._encode([part for _, part, _ in group]), strict=True):
                if index in done:
                    continue
                ids = np.concatenate([rest, ids])
                whole = len(ids) if is_last else (len(ids) // room) * room
                for chunk in self._cut(ids[:whole], room, is_empty=is_last and not whole):
                    yield index, chunk
                    if self.cuts_off:
                        done.add(index)
                        break
                rest = ids[:0] if index in done else ids[whole:]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if isinstance(self.backend, Tokenizer):
            return self.backend.encode_batch(texts)
        with tokenizer_backend.as_value_errors(self.origin, tokenizer_backend.UNCUT):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _cut(self, ids: np.ndarray, room: int, *, is_empty: bool) -> Iterator[Chunk]:
        for start in range(0, 1 if is_empty else len(ids), room):
            chunk = np.concatenate([self._before, ids[start : start + room], self._after])
            yield chunk if len(chunk) else np.asarray([self.empty], dtype=np.int32)

    @property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        if isinstance(self.backend, Tokenizer):
            return self.backend.vocab_size
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the vocabulary and the ids around a chunk."""
        own = self.backend.hash if isinstance(self.backend, Tokenizer) else self.backend.to_str()
        return hashlib.sha256(f"{own}{self.before}{self.after}{self.empty}".encode()).hexdigest()

    @functools.cached_property
    def _before(self) -> np.ndarray:
        return np.asarray(self.before, dtype=np.int32)

    @functools.cached_property
    def _after(self) -> np.ndarray:
        return np.asarray(self.after, dtype=np.int32)

    def with_prefix(self, prefix: str) -> "ChunkTokenizer":
        """A copy with a text before every chunk, such as E5's `query: `."""
        if not prefix:
            return self
        text = prefix if isinstance(self.backend, Tokenizer) else prefix.rstrip()
        return dataclasses.replace(self, before=self.before + tuple(self._encode([text])[0].tolist()))

    def first_only(self) -> "ChunkTokenizer":
        """A copy that gives only the first chunk of a text, and doesn't read much beyond it."""
        return dataclasses.replace(self, cuts_off=True)


def of_decoder(tokenizer: Tokenizer) -> ChunkTokenizer:
    """Chunks for one of our decoders: each begins like its texts; a text without tokens is the end-of-document id."""
    before = tokenizer.conventions.begin_ids
    return ChunkTokenizer(tokenizer, before, empty=tokenizer.eos_id, pad_id=tokenizer.eos_id)


def of_encoder(folder: Path) -> ChunkTokenizer:
    """Chunks for an encoder, from its folder's tokenizer.json, whose post-processor gives the ids around them.

    Raises FileNotFoundError if there is no tokenizer.json, ValueError if it can't be read.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    backend = tokenizer_backend.from_json(path.read_bytes(), str(path))
    padding: dict[str, Any] = backend.padding or {}
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # in `tokenizers`, this name means: encode their strings as plain text
    plain = backend.encode(_PROBE, add_special_tokens=False).ids
    whole = backend.encode(_PROBE).ids
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    if not plain or not starts:
        raise ValueError(f"{path}: its special tokens don't stand before and after the text")
    before, after = whole[: starts[0]], whole[starts[0] + len(plain) :]
    pad_id = padding.get("pad_id", 0)
    return ChunkTokenizer(backend, tuple(before), tuple(after), empty=plain[0], pad_id=pad_id, origin=str(path))


def _groups(texts: Sequence[str], done: Set[int]) -> Iterator[list[tuple[int, str, bool]]]:
    """Parts of texts, tokenised together by the megabyte: (text's index, part, whether it is the last).

    Args:
      done: texts of which no further part is needed, looked at before each part.
    """
    group: list[tuple[int, str, bool]] = []
    size = 0
    for index, text in enumerate(texts):
        for part, is_last in _parts(text):
            if index in done:
                break
            group.append((index, part, is_last))
            size += len(part)
            if size >= BATCH_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """A text in parts, cut before white space if there is any, since no token reaches across it."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        end = start + PART_CHARACTERS
        window = text[max(start, end - _LONGEST_WORD) : end]
        found = _LAST_WORD_END.search(window)
        cut = end - len(window) + found.end() if found else end
        yield _LONE_SURROGATE.sub("\ufffd", text[start:cut]), False
        start = cut
    yield _LONE_SURROGATE.sub("\ufffd", text[start:]), True
