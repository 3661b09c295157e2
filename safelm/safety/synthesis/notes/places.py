"""Where in a document its notes belong, and what their writer sees: only what stands before.

    pause       one reading pause: a token drawn by document, with a density that rises linearly over the first fifth
                and is uniform after
    every:N     one after every N tokens
    end         one behind the document
    before      a preflection: before the document, and its writer sees the document

Places are between tokens of the first `document_tokens` tokens, and never inside a character.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from safelm.safety.synthesis.kinds import Pause, Source
from safelm.safety.synthesis.notes.constitution import Constitution
from safelm.safety.synthesis.prompt_files import derived_seed
from safelm.text.harm_tags import kept_characters, remove_harm_tags
from safelm.text.token_offsets import encode_with_offsets
from safelm.text.tokenizer import Tokenizer

PAUSE, END, BEFORE = "pause", "end", "before"
_EVERY = re.compile(r"every:(\d{1,9})")
_RISE = 0.2  # the share of the document over which the density rises


@dataclasses.dataclass(frozen=True)
class NoteSettings:
    """What decides places and lengths of notes.

    Attributes:
      tokenizer: folder of the vocabulary in which places are counted.
      place: pause, every:N, end or before.
      document_tokens: notes are for the first so many tokens of a document.
      note_tokens: most tokens of a note with what stands around it.
    """

    tokenizer: str
    constitution: Constitution
    place: str = PAUSE
    document_tokens: int = 1920
    note_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        interval = self.interval
        if self.place not in (PAUSE, END, BEFORE) and interval is None:
            raise ValueError(f"--note_place={self.place}: expected {PAUSE}, {END} or every:N with N tokens")
        if interval is not None and not 0 < interval <= self.document_tokens:
            raise ValueError(f"--note_place={self.place}: N must be 1 to --document_tokens, {self.document_tokens}")
        for name in ("document_tokens", "note_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")

    @property
    def interval(self) -> int | None:
        """N of every:N."""
        found = _EVERY.fullmatch(self.place)
        return int(found[1]) if found else None


class ReadingPauses:
    """Finds the places of a document's notes. Deterministic: by the settings and the document's id alone."""

    def __init__(self, settings: NoteSettings, tokenizer: Tokenizer | None = None):
        self.settings, self.tokenizer = settings, tokenizer or Tokenizer.from_pretrained(settings.tokenizer)

    def sources(self, source: Source) -> list[Source]:
        """For each place, the document as the note's writer sees it; none where nothing stands before."""
        text, _ = remove_harm_tags(source.text)
        ((_, offsets_N2),) = encode_with_offsets(self.tokenizer, [text])
        boundaries = _boundaries(offsets_N2, self.settings.document_tokens)
        kept = kept_characters(source.text) if len(text) < len(source.text) else None
        found = []
        for number, index in enumerate(self._indices(boundaries, source.id)):
            place = int(offsets_N2[index, 0]) if index < len(offsets_N2) else len(text)
            seen = text[: int(offsets_N2[boundaries[-1] - 1, 1])] if self.settings.place == BEFORE else text[:place]
            if not seen.strip():
                continue
            # Of the text as it is in the corpus; what stands before the document also stands before a tag there.
            position = place if kept is None or not place else [*kept, len(source.text)][place]
            identity = f"{source.id}#{number}" if self.settings.interval else source.id
            pause = Pause(position, index, self.tokenizer.hash)
            found.append(dataclasses.replace(source, id=identity, text=seen, pause=pause))
        return found

    def _indices(self, boundaries: Sequence[int], identity: str) -> list[int]:
        last = boundaries[-1]
        if not last:
            return []
        if self.settings.place == BEFORE:
            return [0]
        if self.settings.place == END:
            return [last]
        if interval := self.settings.interval:
            return list(dict.fromkeys(_at_or_before(boundaries, at) for at in range(interval, last + 1, interval)))
        uniform = derived_seed(self.settings.seed, "reading pause", identity) / 2**31
        return [_at_or_before(boundaries, max(1, math.ceil(reading_pause(uniform) * last)))]


def reading_pause(uniform: float) -> float:
    """The place of a pause, as a share of the document, of a draw that is uniform in [0, 1).

    The inverse of the distribution whose density rises linearly over the first fifth and is constant after.
    """
    in_rise = _RISE / 2 / (1 - _RISE / 2)  # the probability of the first fifth
    if uniform < in_rise:
        return _RISE * math.sqrt(uniform / in_rise)
    return _RISE + (uniform - in_rise) * (1 - _RISE / 2)


def _boundaries(offsets_N2: Int32[np.ndarray, "N 2"], limit: int) -> list[int]:
    """Token numbers up to `limit` before which a character ends: tokens may share the bytes of one."""
    starts_N, ends_N = offsets_N2[:, 0], offsets_N2[:, 1]
    is_boundary_N = np.concatenate([[True], starts_N[1:] >= ends_N[:-1], [True]])[: len(starts_N) + 1]
    return [int(at) for at in np.flatnonzero(is_boundary_N) if at <= limit]


def _at_or_before(boundaries: Sequence[int], index: int) -> int:
    return boundaries[max(0, int(np.searchsorted(boundaries, index, side="right")) - 1)]
