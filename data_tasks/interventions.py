"""Interventions beyond the paper, each as a task: what becomes of a document's tokens, loss weights and labels.

The parameters of all of them are `InterventionSettings`, the tasks `INTERVENTIONS`. Risky are the spans
(`safelm.documents.spans`) with one of `labels`, of one of `kinds`. A token is in a span, whole, if it has a character
of it. Where spans overlap, the smallest weight holds; tags stand around what overlapping or adjacent spans cover
together.

Tokens are put in between tokens, never into one: without them the ids are those of the text.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from safelm.documents import spans as span_files
from safelm.documents.spans import Span
from safelm.tags import MAX_SCORE, TAG_RATE
from safelm.text.control_tokens import control_id
from safelm.text.harm_tags import kept_characters, remove_harm_tags, uniform_draws
from safelm.text.token_offsets import encode_with_offsets
from safelm.text.tokenizer import Tokenizer

TAG, PREFIX, MASKED, UNLIKELY = range(4)  # places in a document's counts, as `safelm.caching.shards.KINDS` has them


@dataclasses.dataclass(frozen=True)
class InterventionSettings:
    """The parameters of all interventions."""

    labels: tuple[str, ...] = ("4", "5")  # of spans that are risky; none: of any label
    kinds: tuple[str, ...] = ()  # of spans to look at; none: of any kind
    # weighted_web: loss weight by label
    weights: Mapping[str, float | int] = dataclasses.field(default_factory=lambda: {"3": 0.5, "4": 0.0, "5": 0.0})
    unlikelihood: float | int = 1.0  # unlikelihood_web: the weight of -log(1 - p)
    open_token: str = "<risky>"  # span_tagged_web: before a risky span
    close_token: str = "</risky>"  # and behind it
    good_token: str = "<good>"  # conditioned_web: the first token of a document
    bad_token: str = "<bad>"  # of one of at least min_harm_score
    tag_rate: float = TAG_RATE  # token_tagged_web: probability of the tag behind a token
    min_harm_score: int = 4
    seed: int = 0

    def __post_init__(self):
        for label, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                advice = ": unlikelihood_web is what makes tokens unlikely" if weight < 0 else ""
                raise ValueError(f"weights: label {label!r} has loss weight {weight}, must be at least 0{advice}")
        if not 0 < self.unlikelihood < float("inf"):
            raise ValueError(f"unlikelihood must be above 0, got {self.unlikelihood}")
        if not 0.0 <= self.tag_rate <= 1.0:
            raise ValueError(f"tag_rate must be from 0 to 1, got {self.tag_rate}")
        if not 1 <= self.min_harm_score <= MAX_SCORE:
            raise ValueError(f"min_harm_score must be 1 to {MAX_SCORE}, got {self.min_harm_score}")

    def is_risky(self, span: Span) -> bool:
        """Whether a span is one of those that are masked, made unlikely or tagged."""
        return self.is_looked_at(span) and (not self.labels or span.label in self.labels)

    def is_looked_at(self, span: Span) -> bool:
        """Whether a span is of a kind that counts."""
        return not self.kinds or span.kind in self.kinds


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """A document as interventions see it: its tokens, the characters that each is of, and its spans."""

    doc_id: str
    text: str
    harm_score: int
    spans: Sequence[Span]
    ids_N: Int32[np.ndarray, " N"]
    offsets_N2: Int32[np.ndarray, "N 2"]
    tokenizer: Tokenizer

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
      prefix: ids before the document; the loss doesn't count them.
    """

    loss_weight_N: Float32[np.ndarray, " N"]
    unlikelihood_N: Float32[np.ndarray, " N"]
    inserted: Sequence[tuple[int, int]] = ()
    prefix: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class MarkedDocument:
    """A document's tokens with its end, their weights, and how many are a tag, prefix, masked or made unlikely."""

    tokens: Int32[np.ndarray, " tokens"]
    loss_weight: Float32[np.ndarray, " tokens"]
    unlikelihood: Float32[np.ndarray, " tokens"]
    kinds: Int32[np.ndarray, " 4"]
    removed_tags: int


@dataclasses.dataclass(frozen=True)
class Intervention:
    """A task: which documents it takes of the raw web, and what it makes of one."""

    mark: Callable[[TokenizedText, InterventionSettings, Marks], None]
    needs_spans: bool = False
    needs_score: bool = False
    is_unsafe_only: bool = False  # only documents of at least `min_harm_score`
    has_unlikelihood: bool = False


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


def _condition(text: TokenizedText, settings: InterventionSettings, marks: Marks) -> None:
    is_bad = text.harm_score >= settings.min_harm_score
    marks.prefix = [control_id(text.tokenizer, settings.bad_token if is_bad else settings.good_token)]


INTERVENTIONS: Mapping[str, Intervention] = MappingProxyType(
    {
        # SLUNG (arXiv 2505.03052): risky tokens are read, as what goes before others, and not learned ..
        "masked_web": Intervention(_mask, needs_spans=True),
        "masked_unsafe_web": Intervention(_mask_unsafe, needs_spans=True, needs_score=True),
        # .. or made unlikely (its other form; Welleck et al. 2020).
        "unlikelihood_web": Intervention(_make_unlikely, needs_spans=True, has_unlikelihood=True),
        "weighted_web": Intervention(_weigh, needs_spans=True),
        "span_tagged_web": Intervention(_tag_spans, needs_spans=True),
        "token_tagged_web": Intervention(_tag_tokens, needs_score=True, is_unsafe_only=True),
        # Conditional training (Korbak et al. 2023, arXiv 2302.08582).
        "conditioned_web": Intervention(_condition, needs_score=True),
    }
)


def mark_documents(
    intervention: Intervention,
    settings: InterventionSettings,
    tokenizer: Tokenizer,
    rows: Sequence[tuple[str, str, int, Sequence[Span]]],
) -> list[MarkedDocument]:
    """Tokenizes documents (id, text, harm score, spans) without their literal tags and applies an intervention.

    Raises ValueError for a vocabulary without a control token that it needs.
    """
    cleaned = [_without_tags(text, spans) for _, text, _, spans in rows]
    encoded = encode_with_offsets(tokenizer, [text for text, _, _ in cleaned])
    made = []
    for (doc_id, _, score, _), (text, spans, removed), (ids_N, offsets_N2) in zip(rows, cleaned, encoded, strict=True):
        document = TokenizedText(doc_id, text, score, spans, ids_N, offsets_N2, tokenizer)
        marks = Marks(np.ones(len(ids_N), np.float32), np.zeros(len(ids_N), np.float32))
        intervention.mark(document, settings, marks)
        made.append(_assembled(document, marks, removed))
    return made


def _assembled(document: TokenizedText, marks: Marks, removed: int) -> MarkedDocument:
    places = [place for place, _ in marks.inserted]

    def extended(values: np.ndarray, inserted: Any, prefix: Any, end: Any) -> np.ndarray:
        return np.concatenate([prefix, np.insert(values, places, inserted), [end]]).astype(values.dtype)

    tokens = extended(document.ids_N, [i for _, i in marks.inserted], marks.prefix, document.tokenizer.eos_id)
    loss_weight = extended(marks.loss_weight_N, 1, [0] * len(marks.prefix), 1)
    unlikelihood = extended(marks.unlikelihood_N, 0, [0] * len(marks.prefix), 0)
    unlikely = int((marks.unlikelihood_N > 0).sum())
    masked = int((marks.loss_weight_N == 0).sum()) - unlikely
    kinds = np.array([len(places), len(marks.prefix), masked, unlikely], np.int32)
    return MarkedDocument(tokens, loss_weight, unlikelihood, kinds, removed)


def _without_tags(text: str, spans: Sequence[Span]) -> tuple[str, Sequence[Span], int]:
    """The text without literal tags, the spans of it, and how many tags there were."""
    cleaned, removed = remove_harm_tags(text)
    if not removed:
        return text, spans, 0
    kept = kept_characters(text)
    moved = [
        dataclasses.replace(span, **{name: bisect.bisect_left(kept, getattr(span, name)) for name in ("start", "end")})
        for span in spans
    ]
    return cleaned, [span for span in moved if span.start < span.end], removed


def spans_of(text: str) -> Sequence[Span]:
    """The spans of an example of SeqIO, which carries them as JSON; "" is none."""
    return span_files.from_json(text) if text else ()
