"""Interventions beyond the paper, each as a task: what becomes of a document's tokens, loss weights and labels.

The parameters of all of them are `data_tasks.intervention_settings`, the tasks `INTERVENTIONS`. Risky are the spans
(`safelm.documents.spans`) with one of `labels`, of one of `kinds`. A token is in a span, whole, if it has a character
of it. Where spans overlap, the smallest weight holds; tags stand around what overlapping or adjacent spans cover
together.

Tokens are put in between tokens, never into one: without them the ids are those of the text.

Notes (`safelm.documents.notes`) are put in at their places, each between two control tokens, in a window with room for
them: the first `document_tokens` tokens of the document, and `note_tokens` more. A document without notes is cut alike.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from data_tasks.hosts import host
from data_tasks.intervention_settings import InterventionSettings
from data_tasks.readers import Document
from safelm.data.token_kinds import CONTROL, MASKED, NOTE, PREFIX, TAG, TEXT, UNLIKELY
from safelm.documents import notes as note_files
from safelm.documents.notes import Note
from safelm.documents.spans import Span
from safelm.text.control_tokens import control_id
from safelm.text.harm_tags import kept_characters, remove_harm_tags, uniform_draws
from safelm.text.token_offsets import encode_with_offsets
from safelm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """A document as interventions see it: its tokens, the characters that each is of, its spans, notes and metadata."""

    doc_id: str
    text: str
    harm_score: int
    spans: Sequence[Span]
    ids_N: Int32[np.ndarray, " N"]
    offsets_N2: Int32[np.ndarray, "N 2"]
    tokenizer: Tokenizer
    notes: Sequence[Note] = ()
    metadata: str = ""

    def tokens_in(self, span: Span) -> Bool[np.ndarray, " N"]:
        """Which tokens have a character of a span."""
        return (self.offsets_N2[:, 0] < span.end) & (self.offsets_N2[:, 1] > span.start)

    def tokens_in_any(self, spans: Sequence[Span]) -> Bool[np.ndarray, " N"]:
        """Which tokens have a character of one of the spans."""
        return np.logical_or.reduce([np.zeros(len(self.ids_N), bool), *map(self.tokens_in, spans)])


@dataclasses.dataclass
class Marks:
    """What an intervention makes of a document's N tokens.

    Attributes:
      inserted: (place, id) of tokens that are put in, by place: before the token that is there, N behind the last.
      inserted_weight: the loss weight of these.
      prefix: ids before the document; the loss doesn't count them.
      end_weight: the loss weight of the document's end.
      is_text_learned: whether the loss counts the document's tokens and its end at all.
      kept: of the document's tokens, those that stay; None for all.
      inserted_kind: of `safelm.data.token_kinds`, what these are.
    """

    loss_weight_N: Float32[np.ndarray, " N"]
    unlikelihood_N: Float32[np.ndarray, " N"]
    inserted: Sequence[tuple[int, int]] = ()
    inserted_weight: float = 1
    prefix: Sequence[int] = ()
    end_weight: float = 1
    is_text_learned: bool = True
    kept: int | None = None
    inserted_kind: int = TAG

    @property
    def are_there(self) -> bool:
        """Whether the intervention found something in the document to mark."""
        return bool(self.inserted or self.prefix or (self.loss_weight_N != 1).any() or self.unlikelihood_N.any())


@dataclasses.dataclass(frozen=True)
class MarkedDocument:
    """A document's tokens with its end, their weights and kinds (`safelm.data.token_kinds`).

    `is_marked`: whether there was anything to mark, such as a risky span, a note or a URL.
    """

    tokens: Int32[np.ndarray, " tokens"]
    loss_weight: Float32[np.ndarray, " tokens"]
    unlikelihood: Float32[np.ndarray, " tokens"]
    kind: Int32[np.ndarray, " tokens"]
    removed_tags: int
    cut_tokens: int = 0
    is_marked: bool = True


@dataclasses.dataclass(frozen=True)
class Intervention:
    """A task: which documents it takes of the raw web, and what it makes of one.

    `sought`: of one that marks what is beside a text, such as spans, what a document must have, in words.
    """

    mark: Callable[[TokenizedText, InterventionSettings, Marks], None]
    needs_spans: bool = False
    needs_notes: bool = False
    needs_metadata: bool = False
    needs_score: bool = False
    is_unsafe_only: bool = False  # only documents of at least `min_harm_score`
    is_safe_only: bool = False  # only documents of a lower score
    has_unlikelihood: bool = False
    sought: Callable[[InterventionSettings], str] | None = None


def _mask(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    marks.loss_weight_N[text.tokens_in_any([*filter(settings.is_risky, text.spans)])] = 0


def _mask_unsafe(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    if text.harm_score >= settings.min_harm_score:
        _mask(text, settings, marks)


def _make_unlikely(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    is_risky_N = text.tokens_in_any([*filter(settings.is_risky, text.spans)])
    marks.loss_weight_N[is_risky_N] = 0
    marks.unlikelihood_N[is_risky_N] = settings.unlikelihood


def _weigh(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    is_seen_N = np.zeros(len(text.ids_N), bool)
    for span in filter(settings.is_looked_at, text.spans):
        if span.label in settings.weights:
            is_in_N = text.tokens_in(span)
            former_N = np.where(is_seen_N, marks.loss_weight_N, np.inf)
            marks.loss_weight_N[is_in_N] = np.minimum(former_N, settings.weights[span.label])[is_in_N]
            is_seen_N |= is_in_N


def _tag_spans(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    open_id, close_id = (control_id(text.tokenizer, token) for token in (settings.open_token, settings.close_token))
    is_in_N = text.tokens_in_any([*filter(settings.is_risky, text.spans)])
    edges = np.diff(is_in_N.astype(np.int8), prepend=0, append=0)
    marks.inserted = [(int(at), open_id if edges[at] > 0 else close_id) for at in np.flatnonzero(edges)]


def _tag_tokens(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    gaps = max(0, len(text.ids_N) - 1)
    identity = {"seed": settings.seed, "doc_id": text.doc_id, "text": text.text}
    drawn = uniform_draws(gaps, purpose=b"token_tag", **identity) < settings.tag_rate
    marks.inserted = [(int(at) + 1, text.tokenizer.harm_tag_id) for at in np.flatnonzero(drawn)]


def _raise_flag(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    """One flag at a token drawn uniformly; documents below `min_harm_score` stay as they are."""
    if text.harm_score >= settings.min_harm_score:
        _insert_flags(text, settings, marks, [(0, len(text.ids_N))])


def _raise_flags_in_spans(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    """One flag in what risky spans cover together, each, at a token drawn uniformly."""
    is_in_N = text.tokens_in_any([*filter(settings.is_risky, text.spans)])
    edges = np.flatnonzero(np.diff(is_in_N.astype(np.int8), prepend=0, append=0)).tolist()
    _insert_flags(text, settings, marks, [*zip(edges[::2], edges[1::2], strict=True)])


def _insert_flags(
    text: TokenizedText, settings: InterventionSettings, marks: Marks, ranges: Sequence[tuple[int, int]]
) -> None:
    if not ranges:
        return
    flag_id = control_id(text.tokenizer, settings.flag_token)
    identity = {"seed": settings.seed, "doc_id": text.doc_id, "text": text.text}
    draws = uniform_draws(len(ranges), purpose=b"red_flag", **identity)
    marks.inserted = [
        (start + int(draw * (stop - start)), flag_id) for (start, stop), draw in zip(ranges, draws, strict=True)
    ]
    marks.inserted_kind = CONTROL
    if settings.flag_loss == "flag":
        marks.is_text_learned = False


def _condition(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    is_bad = text.harm_score >= settings.min_harm_score
    marks.prefix = [control_id(text.tokenizer, settings.bad_token if is_bad else settings.good_token)]


def _leave(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    """As it is."""


def _put_metadata_before(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    """No loss on it; a document without any, or whose URL names no host, stays as it is."""
    domain = host(text.metadata)
    if text.metadata and (domain or "{domain}" not in settings.metadata_form):
        spelled = settings.metadata_form.replace("{domain}", domain).replace("{value}", text.metadata)
        marks.prefix = text.tokenizer.encode(spelled)


def _insert_notes(kind: str, text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    total, kept = len(text.ids_N), min(len(text.ids_N), settings.document_tokens)
    marks.kept, marks.end_weight = kept, float(kept == total)  # a cut document doesn't end there
    marks.is_text_learned = settings.note_loss != "note"
    found = [note for note in text.notes if note.kind == kind]
    if not found:
        return
    tokenizer, where = text.tokenizer, f"id {text.doc_id}"
    ends = [control_id(tokenizer, token) for token in (settings.note_open_token, settings.note_close_token)]
    spelled = [note_files.spelled(note, settings.note_voice, settings.note_form) for note in found]
    places = [_token_of(note, text, where) for note in found]
    if beyond := [place for place in places if place > kept]:
        raise ValueError(f"{where}: a note belongs before token {beyond[0]}, document_tokens is {kept}")
    ids = [[ends[0], *encoded.tolist(), ends[1]] for encoded in tokenizer.encode_batch(spelled)]
    if (needed := sum(map(len, ids)) + 1) > settings.note_tokens:
        raise ValueError(
            f"{where}: its notes and its end need {needed} tokens, note_tokens reserves {settings.note_tokens}: "
            "manifest.json of the notes' folder has as `note_tokens` what all documents need"
        )
    marks.inserted = [(place, each) for place, some in zip(places, ids, strict=True) for each in some]
    marks.inserted_weight, marks.inserted_kind = float(settings.note_loss != "text"), NOTE


def _token_of(note: Note, text: TokenizedText, where: str) -> int:
    """The token before which a note belongs. ValueError where its two places disagree in the vocabulary of both."""
    starts_N = text.offsets_N2[:, 0]
    if note.vocab_hash != text.tokenizer.hash:
        return int(np.searchsorted(starts_N, note.position))
    is_there = note.token_index <= len(starts_N)
    begins = np.append(starts_N, len(text.text))[note.token_index] if is_there else None
    if begins != note.position:
        found = f"begins at character {begins}" if is_there else "is not there"
        raise ValueError(
            f"{where}: the note at character {note.position} has token {note.token_index}, which {found}: another "
            "tokenizer counted it, or the text was changed"
        )
    return note.token_index


def _risky_and_unsafe(settings: InterventionSettings) -> str:
    return f"{settings.a_risky_span()} and harm score {settings.min_harm_score} or more"


def _of_notes(kind: str) -> Intervention:
    mark = functools.partial(_insert_notes, kind)
    return Intervention(mark, needs_notes=True, sought=lambda settings: f"a note of kind {kind!r}")


_of_spans = functools.partial(Intervention, needs_spans=True, sought=InterventionSettings.a_risky_span)
INTERVENTIONS: Mapping[str, Intervention] = MappingProxyType(
    {
        # SLUNG (arXiv 2505.03052): risky tokens are read, as what goes before others, and not learned ..
        "masked_web": _of_spans(_mask),
        "masked_unsafe_web": _of_spans(_mask_unsafe, needs_score=True, sought=_risky_and_unsafe),
        # .. or made unlikely (its other form; Welleck et al. 2020).
        "unlikelihood_web": _of_spans(_make_unlikely, has_unlikelihood=True),
        "weighted_web": _of_spans(_weigh, sought=InterventionSettings.a_weighted_span),
        "span_tagged_web": _of_spans(_tag_spans),
        "token_tagged_web": Intervention(_tag_tokens, needs_score=True, is_unsafe_only=True),
        # Red-flag tokens (arXiv 2502.16366), in unsafe documents or in each risky span.
        "red_flag_web": Intervention(_raise_flag, needs_score=True),
        "red_flag_span_web": _of_spans(_raise_flags_in_spans),
        # Conditional training (Korbak et al. 2023, arXiv 2302.08582).
        "conditioned_web": Intervention(_condition, needs_score=True),
        # The raw web in two by harm score, for gradient routing (`safelm.models.routing`), which goes by source.
        "unsafe_web": Intervention(_leave, needs_score=True, is_unsafe_only=True),
        "safer_web": Intervention(_leave, needs_score=True, is_safe_only=True),
        # MeCo (Gao et al. 2025, arXiv 2501.01956).
        "metadata_web": Intervention(
            _put_metadata_before, needs_metadata=True, sought=InterventionSettings.metadata_wanted
        ),
        # Notes in or before documents (arXiv 2606.19168).
        "reflected_web": _of_notes("reflection"),
        "preflected_web": _of_notes("preflection"),
    }
)


def mark_documents(
    intervention: Intervention,
    settings: InterventionSettings,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
) -> list[MarkedDocument]:
    """Tokenizes documents without literal tags and applies an intervention.

    Raises ValueError for a vocabulary without a control token that it needs, and that names the id of a document whose
    notes don't fit.
    """
    cleaned = [_without_tags(each.text, each.spans, each.notes) for each in documents]
    encoded = encode_with_offsets(tokenizer, [text for text, *_ in cleaned])
    made = []
    for each, (text, spans, notes, removed), (ids_N, offsets_N2) in zip(documents, cleaned, encoded, strict=True):
        document = TokenizedText(
            each.id, text, each.harm_score, spans, ids_N, offsets_N2, tokenizer, notes, each.metadata
        )
        marks = Marks(np.ones(len(ids_N), np.float32), np.zeros(len(ids_N), np.float32))
        intervention.mark(document, settings, marks)
        made.append(_assembled(document, marks, removed))
    return made


def _assembled(document: TokenizedText, marks: Marks, removed: int) -> MarkedDocument:
    places, kept = [place for place, _ in marks.inserted], marks.kept
    loss_weight_N, end_weight = marks.loss_weight_N * marks.is_text_learned, marks.end_weight * marks.is_text_learned

    def extended(values: np.ndarray, inserted: Any, prefix: Any, end: Any) -> np.ndarray:
        return np.concatenate([prefix, np.insert(values[:kept], places, inserted), [end]]).astype(values.dtype)

    tokens = extended(document.ids_N, [i for _, i in marks.inserted], marks.prefix, document.tokenizer.eos_id)
    loss_weight = extended(loss_weight_N, marks.inserted_weight, [0] * len(marks.prefix), end_weight)
    unlikelihood = extended(marks.unlikelihood_N, 0, [0] * len(marks.prefix), 0)
    of_text_N = np.where(loss_weight_N > 0, TEXT, MASKED).astype(np.int32)
    of_text_N[marks.unlikelihood_N > 0] = UNLIKELY
    end = TEXT if end_weight else MASKED
    kind = extended(of_text_N, marks.inserted_kind, [PREFIX] * len(marks.prefix), end)
    cut_tokens = len(document.ids_N[kept:]) if kept is not None else 0
    return MarkedDocument(tokens, loss_weight, unlikelihood, kind, removed, cut_tokens, marks.are_there)


def _without_tags(
    text: str, spans: Sequence[Span], notes: Sequence[Note]
) -> tuple[str, Sequence[Span], Sequence[Note], int]:
    """The text without literal tags, the spans and notes of it, and how many tags there were."""
    cleaned, removed = remove_harm_tags(text)
    if not removed:
        return text, spans, notes, 0
    kept = kept_characters(text)
    moved = [
        dataclasses.replace(span, **{name: bisect.bisect_left(kept, getattr(span, name)) for name in ("start", "end")})
        for span in spans
    ]
    notes = [dataclasses.replace(note, position=bisect.bisect_left(kept, note.position)) for note in notes]
    return cleaned, [span for span in moved if span.start < span.end], notes, removed
