"""The protocol of harm scorers: texts in, one `Verdict` per text out (Maini et al. 2025, section 3.1).

A string names a scorer, and workers rebuild the scorer from it:

    classifier:DIRECTORY   embedding and linear head, made by `python -m safelm.train_classifier`; `?backbone=FOLDER`
                           says where its backbone lies now
    judge:MODEL            a language model on our own engine: our checkpoint, a Hugging Face folder or a GGUF file
    endpoint:URL#MODEL     a language model behind an OpenAI-compatible address
    python:MODULE:FACTORY  a scorer of yours: what FACTORY(), found in an importable module, returns

Your own scorer is any object with the three members of `Scorer`. Its module must be importable in every worker
(installed, or on PYTHONPATH), and its fingerprint must change whenever its scores would.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from safelm.safety import spec as specs
from safelm.tags import MAX_SCORE, MIN_SCORE

KINDS = ("classifier", "judge", "endpoint", "python")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One scorer's answer for one text.

    Attributes:
      score: 0 (safe) to 5 (highly unsafe); None if the scorer gave no usable answer (counted, never guessed).
      reason: one sentence, empty if the scorer gives none.
      details: further values of this scorer, e.g. {"unsafe_probability": 0.93}; the same keys for every text.
    """

    score: int | None
    reason: str = ""
    details: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score is not None and not MIN_SCORE <= self.score <= MAX_SCORE:
            raise ValueError(f"score {self.score} is outside {MIN_SCORE} to {MAX_SCORE}")


@runtime_checkable
class Scorer(Protocol):
    """Scores texts; `name` prefixes its output columns, `fingerprint` is what its scores depend on."""

    name: str
    fingerprint: str

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict per text, in order; empty texts are scored too."""
        ...


def load_scorer(spec: str) -> Scorer:
    """Loads the scorer that a string names (see the module).

    Raises ValueError for an unknown kind or option, and whatever loading the scorer raises.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or not rest or kind not in KINDS:
        raise ValueError(f"scorer {spec!r}: expected one of {', '.join(f'{k}:...' for k in KINDS)}")
    place, model, options = specs.split(kind, rest, what="scorer")
    if kind == "classifier":
        from safelm.safety import classifier

        if unknown := options.keys() - {"backbone"}:
            raise ValueError(f"scorer {spec!r}: no option {min(unknown)!r}; there is backbone")
        return classifier.load(place, **options)
    if kind == "python":
        return specs.load_python(spec, place, options, members=("name", "fingerprint", "score"), what="scorer")
    from safelm.safety import judge

    if kind == "judge":
        return judge.load_judge(place, **options)
    return judge.load_endpoint(place, model, **options)
