"""Turns tokens into text as they arrive: whole characters only, cut at stop strings, never showing the start of one."""

import codecs
import collections
import dataclasses
from collections.abc import Sequence

from safelm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token and its share of the text. The pieces' texts, joined, are the text.

    Attributes:
      text: the token's text; a character that several tokens spell belongs to the last of them, and special tokens have
        none.
      tag_prob: P(tag | text up to and including this token); None if the vocabulary has no tag.
      special: the string of a special token.
    """

    id: int
    text: str
    tag_prob: float | None
    special: str | None = None


class TextStream:
    """Takes tokens and releases what can no longer turn out to be part of a stop string.

    A stop string counts as soon as a token completes it; of several completed by one token, the one that begins first
    counts. The text ends before it. A stop string that is a special token ends the text at that token, which is not
    part of the text.

    Attributes:
      is_stopped: whether a stop string was found; later tokens are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, [string for string in stop if string]
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text not yet released, the waiting pieces' but for what of the first has gone out
        self._waiting: collections.deque[Piece] = collections.deque()
        self._gone = 0  # characters of the first waiting piece that are released

    def add(self, token: int, tag_prob: float | None = None) -> None:
        """Takes the next token."""
        if self.is_stopped:
            return
        special = self._tokenizer.special_token(token)
        if special is not None and special in self._stop:
            self.finish()
            self.is_stopped = True
            return
        text = "" if special is not None else self._utf8.decode(self._tokenizer.token_bytes(token))
        self._append(Piece(token, text, tag_prob, special))

    def finish(self) -> None:
        """Ends the input: the next `release` returns the text held back, with a broken character as U+FFFD."""
        if not self.is_stopped:
            rest = self._utf8.decode(b"", final=True)
            if rest and self._waiting:
                last = self._waiting.pop()
                self._append(dataclasses.replace(last, text=last.text + rest), new_text=rest)
            self._stop = []

    def release(self) -> tuple[str, list[Piece]]:
        """The text that has become certain since the last call, and the tokens that it completes."""
        num_out = len(self._held) - (0 if self.is_stopped else self._num_doubtful())
        text, self._held = self._held[:num_out], self._held[num_out:]
        pieces, available = [], self._gone + num_out
        is_broken = bool(self._utf8.getstate()[0]) and not self.is_stopped  # the last token's character isn't whole
        while len(self._waiting) > is_broken and len(self._waiting[0].text) <= available:
            piece = self._waiting.popleft()
            available -= len(piece.text)
            pieces.append(piece)
        self._gone = available
        return text, pieces

    def _append(self, piece: Piece, new_text: str | None = None) -> None:
        self._waiting.append(piece)
        num_searched = len(self._held)
        self._held += piece.text if new_text is None else new_text
        found = (self._held.find(string, max(0, num_searched - len(string) + 1)) for string in self._stop)
        cut = min((at for at in found if at >= 0), default=None)
        if cut is not None:
            self.is_stopped = True
            self._cut_at(cut)

    def _cut_at(self, length: int) -> None:
        """Removes what lies beyond `length` characters of the held text."""
        self._held = self._held[:length]
        kept: collections.deque[Piece] = collections.deque()
        room = self._gone + length
        for piece in self._waiting:
            if room == 0 and piece.text:
                break
            kept.append(dataclasses.replace(piece, text=piece.text[:room]))
            room -= len(kept[-1].text)
        self._waiting = kept

    def _num_doubtful(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0
