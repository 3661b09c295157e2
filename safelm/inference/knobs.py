"""Knobs: how readily a model refuses, by a threshold on the probability of one of its control tokens.

- `refusal`: the first token of an answer is <refuse> or <respond> (refusal tokens, Jain et al. 2024, arXiv 2412.06748).
  The knob's value is P(<refuse>) over the probability of both; from the threshold on the answer begins with <refuse>.
  A threshold t is the same as adding log((1 - t) / t) to the token's logit.
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
_NEVER = math.nextafter(1.0, 2.0)  # a threshold that no probability reaches
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
      calibration: what it was calibrated on; decides nothing.
    """

    kind: str
    token: str
    threshold: float | int
    other: str = ""
    message: str = MESSAGE
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"knob: kind {self.kind!r}: one of {', '.join(KINDS)}")
        if bool(self.other) != (self.kind == REFUSAL):
            raise ValueError(f"knob: other is {self.other!r}: {REFUSAL} needs the other token, {RED_FLAG} has none")
        if not (isinstance(self.threshold, float | int) and 0 < self.threshold <= _NEVER):
            raise ValueError(f"knob: threshold is {self.threshold!r}: must be above 0 and no more than 1")

    @property
    def logit_bias(self) -> float:
        """What added to the token's logit is the same as the threshold, in nats; of `refusal`."""
        return math.log((1 - self.threshold) / self.threshold) if self.threshold < 1 else -math.inf

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers, for a protocol."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "calibration"}

    def bound(self, tokenizer: Tokenizer) -> "BoundKnob":
        """The knob for a vocabulary; ValueError where it lacks a token."""
        tokens = [self.token, *([self.other] if self.other else [])]
        return BoundKnob(self.kind, tuple(control_id(tokenizer, token) for token in tokens), float(self.threshold))


@dataclasses.dataclass(frozen=True)
class BoundKnob:
    """A knob for a vocabulary.

    Attributes:
      token_ids: its token's id and, of `refusal`, the other one's.
    """

    kind: Literal["refusal", "red_flag"]
    token_ids: tuple[int, ...]
    threshold: float

    @property
    def flag_id(self) -> int | None:
        """What takes the harm tag's place in decoding; None: nothing."""
        return self.token_ids[0] if self.kind == RED_FLAG else None

    def value_at_start(self, log_probs: Sequence[float]) -> float:
        """The knob's value at an answer's start, from the log-probs of its tokens there."""
        if self.kind == RED_FLAG:
            return math.exp(log_probs[0])
        return 1 / (1 + math.exp(min(log_probs[1] - log_probs[0], 700.0)))

    def choice(self, value: float) -> int:
        """Of `refusal`: the token with which the answer begins."""
        return self.token_ids[0] if value >= self.threshold else self.token_ids[1]


def read_knob(path: str | os.PathLike[str]) -> Knob:
    """A file of `safelm.calibrate_knob`. Raises FileNotFoundError, or ValueError naming file and field."""
    path = os.fspath(path)
    try:
        values = records.read(path, _MENDING)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of a knob; safelm.calibrate_knob writes one") from None
    known = {field.name for field in dataclasses.fields(Knob)}
    if unknown := values.keys() - known:
        raise ValueError(f"{path}: unknown field {min(unknown)!r}, a knob has {', '.join(sorted(known))}")
    try:
        return Knob(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; {_MENDING}") from None
