"""The protocol of harm scorers: texts in, one `Verdict` per text out (Maini et al. 2025, section 3.1).

A string names a scorer, and workers rebuild the scorer from it:

    bundled                words and n-grams, weights that come with SafeLM: fast, rough (see `safelm.safety.ngrams`)
    classifier:DIRECTORY   what `python -m safelm.train_classifier` made; `?backbone=FOLDER` says where its backbone
                           lies now, `?batch_tokens=N` and `?devices=N` as below
    hf:ORG/NAME            a published sequence classifier by name, `hf:./FOLDER` or `hf:/FOLDER` one on this machine;
                           `?labels=` says which scores its labels are (see `safelm.safety.sequence_classifier.labels`),
                           `?max_length=2048&chunks=false`, `?dtype=bfloat16` how it reads, `?batch_tokens=N` the
                           tokens of a device's batch, `?devices=N` how many local devices share a batch (all)
    judge:MODEL            a language model on our own engine: our checkpoint, a Hugging Face folder or a GGUF file
    endpoint:URL#MODEL     a language model behind an OpenAI-compatible address
    python:MODULE:FACTORY  a scorer of yours: what FACTORY(), found in an importable module, returns

`?threshold_1=P&threshold_3=P` sets the probabilities from which on bundled, classifier or hf (with labels that exclude
each other) gives 1 or more, 3 or more.

Your own scorer is any object with the three members of `Scorer`. Its module must be importable in every worker
(installed, or on PYTHONPATH), and its fingerprint must change whenever its scores would. It may have four more:

    usage              a mapping of what it has done since it was loaded ("tokens", "positions" with padding, "programs"
                       compiled), which estimates show
    batch_characters   how many it wants at once
    manifest_settings  a mapping of what its scores depend on, which manifests keep as `settings`
    measured           a mapping of what is known of its errors, which manifests keep too

Of both mappings JSON's values are kept as they are and others as text; an attribute that is no mapping is left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from safelm.io import hub
from safelm.safety import spec as specs
from safelm.tags import MAX_SCORE, MIN_SCORE

BUNDLED = "bundled"
LEVELS = (1, 3)  # scores that a threshold decides about
KINDS = ("classifier", "hf", "judge", "endpoint", "python")


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


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Labelled texts that a scorer was not trained on, and what it says of them.

    Attributes:
      sources: names of labelled sets.
      source_N: the set each text is of. score_N: its label, 0 to 5.
      probability: by level (1 and 3) the scorer's probability that the score is that or more.
    """

    sources: tuple[str, ...]
    source_N: np.ndarray
    score_N: np.ndarray
    probability: Mapping[int, np.ndarray]


@runtime_checkable
class ThresholdScorer(Scorer, Protocol):
    """A scorer that thresholds on probabilities decide for.

    Its verdicts have the details `unsafe_probability` and `unsafe_probability_3`; a text gets a score of `level` or
    more where its probability at that level reaches the threshold.

    Attributes:
      thresholds: by level; None where another rule decides.
      held_out: None where there are no labelled texts left.
      one_value: whether both probabilities rise with one value, so that what reaches level 3 reaches level 1.
    """

    one_value: bool
    thresholds: Mapping[int, float | None]
    held_out: HeldOut | None

    def with_thresholds(self, thresholds: Mapping[int, float]) -> "ThresholdScorer":
        """The same with other thresholds for some levels, and another fingerprint."""
        ...


def load_scorer(spec: str) -> Scorer:
    """Loads the scorer that a string names (see the module).

    Raises ValueError for an unknown kind or option, and whatever loading the scorer raises.
    """
    if spec.partition("?")[0] == BUNDLED:
        from safelm.safety import ngrams

        options = specs.options(spec.partition("?")[2], what="scorer")
        thresholds = _thresholds(spec, options)
        _check_no_other(spec, options)
        return _with_thresholds(ngrams.load_bundled(), thresholds)
    kind, separator, rest = spec.partition(":")
    if not separator or not rest or kind not in KINDS:
        raise ValueError(f"scorer {spec!r}: expected one of {BUNDLED}, {', '.join(f'{k}:...' for k in KINDS)}")
    place, model, options = specs.split(kind, rest, what="scorer")
    if kind == "classifier":
        thresholds = _thresholds(spec, options)
        return _with_thresholds(_load_classifier(spec, place, options), thresholds)
    if kind == "python":
        return specs.load_python(spec, place, options, members=("name", "fingerprint", "score"), what="scorer")
    if kind == "hf":
        from safelm.safety import sequence_classifier

        thresholds = _thresholds(spec, options)
        name = place if hub.is_path(f"{kind}:{place}") else f"{kind}:{place}"
        return _with_thresholds(sequence_classifier.load(name, **options), thresholds)
    from safelm.safety import judge

    if kind == "judge":
        return judge.load_judge(place, **options)
    return judge.load_endpoint(place, model, **options)


def _load_classifier(spec: str, place: str, options: dict[str, Any]) -> Any:
    from safelm.safety import ngrams

    if ngrams.is_ngrams(place):
        _check_no_other(spec, options)
        return ngrams.load(place)
    from safelm.safety import classifier

    _check_no_other(spec, options, "backbone", "batch_tokens", "devices")
    for name in ("batch_tokens", "devices"):
        if not isinstance(options.get(name, 1), int) or options.get(name, 1) < 1:
            raise ValueError(f"scorer {spec!r}: {name}={options[name]!r}: must be a whole number, at least 1")
    return classifier.load(place, **options)


def _thresholds(spec: str, options: dict[str, Any]) -> dict[int, float]:
    """Takes the thresholds out of a spec's options."""
    given = {level: options.pop(f"threshold_{level}") for level in LEVELS if f"threshold_{level}" in options}
    for level, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2:
            raise ValueError(f"scorer {spec!r}: threshold_{level}={value}: must be a probability (above 1: never)")
    return {level: float(value) for level, value in given.items()}


def _with_thresholds(scorer: Any, thresholds: Mapping[int, float]) -> Any:
    return scorer.with_thresholds(thresholds) if thresholds else scorer


def _check_no_other(spec: str, options: Mapping[str, Any], *known: str) -> None:
    if unknown := options.keys() - set(known):
        there = ", ".join((*known, *(f"threshold_{level}" for level in LEVELS)))
        raise ValueError(f"scorer {spec!r}: no option {min(unknown)!r}; there is {there}")
