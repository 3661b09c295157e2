"""Knobs: how readily a model refuses, by a threshold on the probability of one of its control tokens.

- `refusal`: the first token of an answer is <refuse> or <respond> (refusal tokens, Jain et al. 2024, arXiv 2412.06748).
  The knob's value is P(<refuse>) over the probability of both; from the threshold on the answer begins with <refuse>.
  A threshold t is the same as adding log((1 - t) / t) to the token's logit. Refusal tokens of categories have a
  threshold each on P(token) over that and P(<respond>); of those that reach theirs the answer begins with the one whose
  logit is highest after the addition, so the rule is the likeliest token under the biases.
- `red_flag`: <red_flag> may come anywhere in what is unsafe (arXiv 2502.16366). The knob's value is the largest
  P(<red_flag>) from the answer's start on; at the threshold the answer is withheld for a message. The flag itself is
  treated as the harm tag is, in whose place the engine has it: never shown, and what SafeBeam steers by.

`safelm.calibrate_knob` sets the threshold to a wanted rate of safe prompts that are refused.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from safelm.io import records
from safelm.text.control_tokens import control_id
from safelm.text.tokenizer import Tokenizer

REFUSAL, RED_FLAG = KINDS = ("refusal", "red_flag")
MESSAGE = "I can't help with that."
KNOB_HELP = "how readily the model refuses: a file of safelm.calibrate_knob"
NEVER = math.nextafter(1.0, 2.0)  # a threshold that no probability reaches
VOCABULARY = "vocabulary"  # the field of `calibration` that has its hash
_MENDING = "safelm.calibrate_knob writes it"


@dataclasses.dataclass(frozen=True)
class Knob:
    """A knob as `safelm.calibrate_knob` writes it.

    Attributes:
      kind: one of KINDS.
      token: the control token whose probability decides.
      other: of `refusal`, the token of an answer that isn't refused.
      threshold: the knob's value from which on an answer is refused, in (0, 1]; above 1 none is.
      message: of `red_flag`, what is said in place of an answer.
      categories: of `refusal`, the thresholds of further refusal tokens, each of a category, by token.
      calibration: what it was calibrated on. Its `vocabulary` must be the model's; the rest decides nothing.
      origin: the file that it was read from.
    """

    kind: str
    token: str
    threshold: float | int
    other: str = ""
    message: str = MESSAGE
    categories: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    origin: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"knob: kind {self.kind!r}: one of {', '.join(KINDS)}")
        if bool(self.other) != (self.kind == REFUSAL):
            raise ValueError(f"knob: other is {self.other!r}: {REFUSAL} needs the other token, {RED_FLAG} has none")
        if not all(isinstance(each, Mapping) for each in (self.categories, self.calibration)):
            raise ValueError("knob: categories and calibration must be objects")
        if self.categories and self.kind != REFUSAL:
            raise ValueError(f"knob: categories {', '.join(self.categories)}: {self.kind} has none, {REFUSAL} may")
        for name in ("token", "other", "message"):
            if not isinstance(value := getattr(self, name), str) or value in self.categories:
                raise ValueError(f"knob: {name} is {value!r}: must be a string and none of the categories' tokens")
        for name, threshold in {"threshold": self.threshold, **self.categories}.items():
            if isinstance(threshold, bool) or not (isinstance(threshold, float | int) and 0 < threshold <= NEVER):
                of = name if name == "threshold" else f"threshold of {name}"
                raise ValueError(f"knob: {of} is {threshold!r}: must be above 0 and no more than 1")

    @property
    def thresholds(self) -> dict[str, float]:
        """The threshold of every token that decides."""
        return {token: float(value) for token, value in {self.token: self.threshold, **self.categories}.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers, for a protocol."""
        left_out = {"calibration", "origin", *(() if self.categories else ("categories",))}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    def bound(self, tokenizer: Tokenizer) -> "BoundKnob":
        """The knob for a vocabulary; ValueError where it lacks a token, or is another than it was calibrated with."""
        calibrated = self.calibration.get(VOCABULARY)
        if calibrated not in (None, tokenizer.hash):
            raise ValueError(
                f"{self.origin or 'knob'}: calibrated with the vocabulary {str(calibrated)[:12]}, and "
                f"{tokenizer.origin} is {tokenizer.hash[:12]}: {_MENDING} for this model"
            )
        tokens = [self.token, *([self.other] if self.other else []), *self.categories]
        try:
            ids = tuple(control_id(tokenizer, token) for token in tokens)
        except ValueError as error:
            raise ValueError(f"{self.origin}: {error}" if self.origin else str(error)) from None
        return BoundKnob(self.kind, ids, tuple(self.thresholds.values()))

    def beyond_calibration(self, parameters: int, method: str, max_new_tokens: int, *, is_chat: bool) -> list[str]:
        """A line for each thing by which answers are made otherwise than those that the bound was stated for.

        Args:
          parameters: of the model.
          method: a name of `METHODS`; with `max_new_tokens` it counts for `red_flag` only, and fewer tokens don't.
        """
        given = {"parameters": parameters, "chat": is_chat, "method": method, "max_new_tokens": max_new_tokens}
        found = []
        for name, value in given.items():
            there = self.calibration.get(name, value)
            is_within = value <= there if name == "max_new_tokens" and isinstance(there, int) else value == there
            if not is_within:
                found.append(
                    f"{self.origin or 'knob'}: its bound was calibrated with {name} {there}, here it is {value}"
                )
        return found


def logit_bias(threshold: float) -> float:
    """What added to a refusal token's logit is the same as the threshold, in nats."""
    return math.log((1 - threshold) / threshold) if threshold < 1 else -math.inf


@dataclasses.dataclass(frozen=True)
class BoundKnob:
    """A knob for a vocabulary.

    Attributes:
      token_ids: its token's id and, of `refusal`, the other one's and those of the K - 1 categories.
      thresholds: of its token and of each category.
    """

    kind: Literal["refusal", "red_flag"]
    token_ids: tuple[int, ...]
    thresholds: tuple[float, ...]

    @property
    def flag_id(self) -> int | None:
        """What takes the harm tag's place in decoding; None: nothing."""
        return self.token_ids[0] if self.kind == RED_FLAG else None

    def values_at_start(self, log_probs: Sequence[float]) -> tuple[float, ...]:
        """The knob's K values at an answer's start, from the log-probs of its tokens there."""
        if self.kind == RED_FLAG:
            return (math.exp(log_probs[0]),)
        odds = [each - log_probs[1] for each in (log_probs[0], *log_probs[2:])]
        return tuple(1 / (1 + math.exp(min(-each, 700.0))) for each in odds)

    def choice(self, log_probs: Sequence[float]) -> int:
        """Of `refusal`: the token with which the answer begins, from the log-probs of its tokens there."""
        refusing = (self.token_ids[0], *self.token_ids[2:])
        scores = (log_probs[0], *log_probs[2:])
        reached = [
            (score + logit_bias(threshold), token)
            for token, score, value, threshold in zip(
                refusing, scores, self.values_at_start(log_probs), self.thresholds, strict=True
            )
            if value >= threshold
        ]
        return max(reached, key=lambda each: each[0])[1] if reached else self.token_ids[1]


def read_knob(path: str | os.PathLike[str]) -> Knob:
    """A file of `safelm.calibrate_knob`. Raises FileNotFoundError, or ValueError naming file and field."""
    path = os.fspath(path)
    try:
        values = records.read(path, _MENDING)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of a knob; safelm.calibrate_knob writes one") from None
    known = {field.name for field in dataclasses.fields(Knob)} - {"origin"}
    if unknown := values.keys() - known:
        raise ValueError(f"{path}: unknown field {min(unknown)!r}, a knob has {', '.join(sorted(known))}")
    try:
        return Knob(**values, origin=path)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; {_MENDING}") from None
