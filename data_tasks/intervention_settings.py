"""The parameters of all interventions beyond the paper, in one place (`safelm.cache_tasks --interventions`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from safelm.documents.notes import FORMS, VOICES
from safelm.documents.spans import Span
from safelm.tags import MAX_SCORE, TAG_RATE

METADATA_COLUMNS = ("url", "metadata.url")
LOSSES = ("both", "note", "text")
FLAG_LOSSES = ("both", "flag")
_KINDS = (
    ("a string", str),
    ("a list of strings", tuple),
    ("an object", Mapping),
    ("a whole number", int),
    ("a number", float | int),
)


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
    metadata_column: str = ""  # metadata_web: what stands before a document; none: url, metadata.url
    metadata_form: str = "URL: {domain}\n\n"  # how: {domain} of a URL, or {value} whole
    flag_token: str = "<red_flag>"  # red_flag_web, red_flag_span_web: the token that is put in
    flag_loss: str = FLAG_LOSSES[0]  # what is learned of a flagged document: both, or the flag alone
    refuse_token: str = "<refuse>"  # refusal_ultrachat, ..: the first token of an answer that refuses
    respond_token: str = "<respond>"  # and of one that doesn't
    # of a refusal of this category, by refuse_column's value; other refusals begin with refuse_token
    refuse_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refuse_column: str = "subcategory"  # of WildGuardMix as published
    note_voice: str = VOICES[0]  # reflected_web, preflected_web: first_person or third_person
    note_form: str = FORMS[0]  # note, verdict (and category), or verdict_note
    note_loss: str = LOSSES[0]  # what is learned: both, note or text
    note_open_token: str = "<note>"  # before a note
    note_close_token: str = "</note>"  # and behind it
    document_tokens: int = 1920  # reflected_web, preflected_web: what is kept of a document
    note_tokens: int = 128  # the room for all of its notes with the tokens around them, and its end
    tag_rate: float = TAG_RATE  # token_tagged_web: probability of the tag behind a token
    min_harm_score: int = 4
    seed: int = 0

    def __post_init__(self):
        self._check_refusals()
        for label, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                advice = ": unlikelihood_web is what makes tokens unlikely" if weight < 0 else ""
                raise ValueError(f"weights: label {label!r} has loss weight {weight}, must be at least 0{advice}")
        if not 0 < self.unlikelihood < float("inf"):
            raise ValueError(f"unlikelihood must be above 0, got {self.unlikelihood}")
        choices = {"note_voice": VOICES, "note_form": FORMS, "note_loss": LOSSES, "flag_loss": FLAG_LOSSES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not any(slot in self.metadata_form for slot in ("{domain}", "{value}")):
            raise ValueError(f"metadata_form must have {{domain}} or {{value}}, got {self.metadata_form!r}")
        for name in ("document_tokens", "note_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.tag_rate <= 1.0:
            raise ValueError(f"tag_rate must be from 0 to 1, got {self.tag_rate}")
        if not 1 <= self.min_harm_score <= MAX_SCORE:
            raise ValueError(f"min_harm_score must be 1 to {MAX_SCORE}, got {self.min_harm_score}")

    def _check_refusals(self) -> None:
        if not self.refuse_column:
            raise ValueError("refuse_column is empty: it names the column of refusals' categories")
        for category, token in self.refuse_tokens.items():
            if not token.strip() or token in (self.refuse_token, self.respond_token):
                raise ValueError(
                    f"refuse_tokens: category {category!r} has token {token!r}: want one that is neither empty nor "
                    f"{self.refuse_token}, of refusals of no category named, nor {self.respond_token}"
                )

    @property
    def metadata_columns(self) -> tuple[str, ...]:
        """The columns of which the first that a row has is its metadata."""
        return (self.metadata_column,) if self.metadata_column else METADATA_COLUMNS

    def is_risky(self, span: Span) -> bool:
        """Whether a span is one of those that are masked, made unlikely or tagged."""
        return self.is_looked_at(span) and (not self.labels or span.label in self.labels)

    def is_looked_at(self, span: Span) -> bool:
        """Whether a span is of a kind that counts."""
        return not self.kinds or span.kind in self.kinds

    def a_risky_span(self) -> str:
        """`is_risky` in words, for messages."""
        return self._a_span(f"`labels` {', '.join(self.labels)}" if self.labels else "")

    def a_weighted_span(self) -> str:
        """The spans that have a weight, in words."""
        return self._a_span(f"a label of `weights`, {', '.join(self.weights)}")

    def metadata_wanted(self) -> str:
        """What of a document's metadata stands before it, in words."""
        what = "a host" if "{domain}" in self.metadata_form else "a value"
        return f"{what} in {' or '.join(self.metadata_columns)} (`metadata_column`)"

    def _a_span(self, labels: str) -> str:
        kinds = f"`kinds` {', '.join(self.kinds)}" if self.kinds else ""
        return " of ".join(filter(None, ("a span", " and ".join(filter(None, (labels, kinds))))))


def read(given: Mapping[str, Any], **shared: Any) -> InterventionSettings:
    """The parameters of a JSON object, with some that are other tasks' too.

    Raises ValueError for an unknown one, a value of another kind or out of range.
    """
    defaults = {name: value for name, value in vars(InterventionSettings()).items() if name not in shared}
    if unknown := given.keys() - defaults.keys():
        raise ValueError(f"no parameter {min(unknown)!r}: there are {', '.join(sorted(defaults))}")
    for name, value in given.items():
        _check_type(name, value, defaults[name])
    for label, weight in given.get("weights", {}).items():
        _check_type(f"weights: label {label!r}", weight, 0.0)
    for category, token in given.get("refuse_tokens", {}).items():
        _check_type(f"refuse_tokens: category {category!r}", token, "")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return InterventionSettings(**shared, **values)


def _check_type(name: str, value: Any, like: Any) -> None:
    """Raises ValueError for a value of another kind than the default's, as JSON can hold."""
    for kinds, kind in _KINDS:
        if isinstance(like, kind):
            is_of_kind = isinstance(value, kind) and not isinstance(value, bool)
            if kind is tuple:
                is_of_kind = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
            if not is_of_kind:
                raise ValueError(f"{name} must be {kinds}, got {value!r}")
            return
