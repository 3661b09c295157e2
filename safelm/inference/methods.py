"""The decoding methods, each a small frozen dataclass of its settings.

`tag_candidate` says how the harm tag is treated as the next token: "mask" (never chosen; the default, since the tag
annotates training text and isn't meant to be shown), "stop" (choosing it ends the sequence with `stopped_by="tag"`),
or, in the methods that do not look ahead, "allow" (a token like any other).
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from safelm.inference.monitors.monitor import Monitor
from safelm.models.config import ModelConfig

MAX_END_IDS = 16  # of one prompt
TagCandidate = str  # "allow", "mask" or "stop": checked by value, with an error that names the choices


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely next token; of equally likely ones that with the smallest id."""

    tag_candidate: TagCandidate = "mask"

    def __post_init__(self) -> None:
        _check_tag_candidate(self, ("allow", "mask", "stop"))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A draw from softmax(logits / temperature), cut to the `top_k` likeliest tokens, then to the nucleus.

    `top_p` keeps the smallest set of likeliest tokens whose probability (after temperature and `top_k`) reaches it.
    `top_k=0` and `top_p=1` cut nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    tag_candidate: TagCandidate = "mask"

    def __post_init__(self) -> None:
        _check_tag_candidate(self, ("allow", "mask", "stop"))
        _check_sampling(self)


@dataclasses.dataclass(frozen=True)
class Beam:
    """Beam search. A hypothesis' score is its log-prob / (generated tokens, the ending one included) ** length_penalty.

    The score is used both to prune and to choose at the end; 0 (the default) compares plain log-probs, larger values
    favour longer texts.
    """

    num_beams: int = 4
    length_penalty: float = 0.0
    tag_candidate: TagCandidate = "mask"

    def __post_init__(self) -> None:
        _check_tag_candidate(self, ("allow", "mask", "stop"))
        _check(self, "num_beams", self.num_beams >= 1, "at least 1")
        _check(self, "length_penalty", 0 <= self.length_penalty < math.inf, "a finite number of at least 0")


@dataclasses.dataclass(frozen=True)
class SafeBeam:
    """Beam search steered by the harm tag's one-token lookahead (Maini et al. 2025, algorithm 1).

    See `safelm.inference.safe_beam` for what the paper leaves open, and for `drop_above`: a candidate is only dropped
    if its P(tag) exceeds this (0 is the paper's algorithm), and `anchor`: beams are compared by log-prob less this part
    of that of the likeliest token at every step (0 is the paper's). With a `monitor` (`safelm.inference.monitors`) its
    level stands in the place of P(tag), and the model needs no harm tag.
    """

    num_beams: int = 4
    num_candidates: int = 4
    drop_fraction: float = 0.5
    tag_candidate: TagCandidate = "mask"
    drop_above: float = 0.0
    anchor: float = 0.0
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        _check_tag_candidate(self, ("mask", "stop"))
        _check(self, "num_beams", self.num_beams >= 1, "at least 1")
        if self.monitor is not None:
            _check(self, "monitor", self.monitor.every == 1, "one that reads every token (every=1)")
        _check(self, "drop_above", 0 <= self.drop_above <= 1, "a probability in [0, 1]")
        _check(self, "anchor", 0 <= self.anchor <= 1, "a number in [0, 1]")
        _check(self, "num_candidates", self.num_candidates >= 1, "at least 1")
        _check(self, "drop_fraction", 0 <= self.drop_fraction < 1, "in [0, 1)")

    def drop_counts(self) -> tuple[int, ...]:
        """The number of candidates to drop from a pool of 0, 1, .. num_beams * num_candidates, rounded down.

        Exact on the decimal as written, so 0.3 of 10 is 3; since the fraction is below 1, one always stays.
        """
        fraction = Fraction(repr(float(self.drop_fraction)))
        return tuple(math.floor(fraction * size) for size in range(self.num_beams * self.num_candidates + 1))


@dataclasses.dataclass(frozen=True)
class TagPenalty:
    """Sampling with a penalty on tokens after which the harm tag is likely: cheap, with one sequence and no beams.

    Each step draws `num_candidates` different tokens without replacement (the largest log-probs + Gumbel noise), looks
    one token ahead over all of them in one forward, subtracts `penalty` (nats) from those whose P(tag) exceeds
    `threshold`, and takes the best under the same noise. So with `penalty=0` it is `Sampling` with the same seed, token
    for token; with all tokens as candidates it is an exact draw from p(t) * exp(-penalty * [P(tag) > threshold]).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_candidates: int = 4
    threshold: float = 0.01
    penalty: float = 10.0
    tag_candidate: TagCandidate = "mask"

    def __post_init__(self) -> None:
        _check_tag_candidate(self, ("mask", "stop"))
        _check_sampling(self)
        _check(self, "num_candidates", self.num_candidates >= 1, "at least 1")
        _check(self, "threshold", 0 <= self.threshold <= 1, "a probability in [0, 1]")
        _check(self, "penalty", 0 <= self.penalty < math.inf, "a finite number of at least 0 (nats)")


@dataclasses.dataclass(frozen=True)
class AnyDepth:
    """Greedy decoding that thinks again: Any-Depth Alignment (Zhang et al. 2025), see `safelm.inference.planning`.

    After every `check_every` tokens the assistant's header, or `header`, stands behind the answer for `rethink_tokens`
    tokens; a refusal there becomes the answer.
    """

    check_every: int = 32
    rethink_tokens: int = 24
    header: str = ""
    tag_candidate: TagCandidate = "mask"

    def __post_init__(self) -> None:
        _check_tag_candidate(self, ("allow", "mask", "stop"))
        _check(self, "check_every", self.check_every >= 1, "at least 1")
        _check(self, "rethink_tokens", self.rethink_tokens >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class SelfStop:
    """Greedy decoding that stops at the model's own verdict, see `safelm.inference.planning`.

    After every `check_every` tokens, and wherever the model begins a note by itself, the answer is withheld for
    `message` if P(unsafe) over the probability of both verdicts is at least `threshold`.
    """

    check_every: int = 32
    threshold: float = 0.5
    message: str = "I can't help with that."
    open_token: str = "<note>"
    close_token: str = "</note>"
    tag_candidate: TagCandidate = "mask"

    def __post_init__(self) -> None:
        _check_tag_candidate(self, ("allow", "mask", "stop"))
        _check(self, "check_every", self.check_every >= 1, "at least 1")
        _check(self, "threshold", 0 < self.threshold <= 1, "a probability in (0, 1]")


Method = Greedy | Sampling | Beam | SafeBeam | TagPenalty | AnyDepth | SelfStop
METHODS: dict[str, type[Method]] = {
    "greedy": Greedy,
    "sample": Sampling,
    "beam": Beam,
    "safe_beam": SafeBeam,
    "tag_penalty": TagPenalty,
    "any_depth": AnyDepth,
    "self_stop": SelfStop,
}


def settings_of(name: str) -> dict[str, Any]:
    """The settings of the named method of METHODS that are numbers or words, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(METHODS[name]) if field.name != "monitor"}


def described(method: Method) -> dict[str, Any]:
    """All settings of a method, JSON-able; a monitor by its name and fingerprint."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    monitor = values.pop("monitor", None)
    return values if monitor is None else values | {"monitor": f"{monitor.name} {monitor.fingerprint}"}


def draws(method: Method | type[Method]) -> bool:
    """Whether the method draws the next token at random."""
    return "temperature" in {field.name for field in dataclasses.fields(method)}


def is_planned(method: Method) -> bool:
    """Whether the method takes several requests to the engine: `EngineRequest.plan`."""
    return isinstance(method, AnyDepth | SelfStop)


def steps_of(method: Method) -> Method:
    """What decodes the method's requests to the engine: the method itself, or that of a planned one's steps."""
    return Greedy(method.tag_candidate) if is_planned(method) else method


def looks_ahead(method: Method) -> bool:
    """Whether the method looks one token ahead."""
    return isinstance(method, SafeBeam | TagPenalty)


def needs_tag(method: Method) -> bool:
    """Whether the method needs a model with the harm tag."""
    return looks_ahead(method) and getattr(method, "monitor", None) is None


def check_ids(
    config: ModelConfig,
    method: Method,
    end_ids: Sequence[int],
    harm_tag_id: int | None,
    watch_ids: Sequence[int] = (),
) -> None:
    """Raises ValueError for ids outside the vocabulary, or a method that this vocabulary can't serve."""
    if not 1 <= len(end_ids) <= MAX_END_IDS:
        raise ValueError(f"{len(end_ids)} end_ids: want 1 to {MAX_END_IDS}")
    named = {"end_ids": end_ids, "watch_ids": watch_ids, "harm_tag_id": (harm_tag_id,)}
    for name, token in ((name, token) for name, tokens in named.items() for token in tokens):
        if token is not None and not 0 <= token < config.vocab_size:
            raise ValueError(f"{name}={token} is not in the model's vocabulary of {config.vocab_size}")
    for token in config.banned_ids:
        if not 0 <= token < config.vocab_size or token in end_ids:
            why = "ends a text" if token in end_ids else f"is not in the model's vocabulary of {config.vocab_size}"
            raise ValueError(f"banned_ids={token} {why}")
    if harm_tag_id in end_ids:
        raise ValueError(f"the harm tag's id {harm_tag_id} is among the end_ids")
    name = type(method).__name__
    if harm_tag_id is None and (needs_tag(method) or method.tag_candidate == "stop"):
        raise ValueError(f"{name} needs a model with the harm tag, and this vocabulary has none (harm_tag_id=None)")
    for field in ("num_beams", "num_candidates"):
        if (wanted := getattr(method, field, 0)) > config.vocab_size:
            raise ValueError(f"{name}: {field}={wanted} is more than the vocabulary of {config.vocab_size}")


def _check(method: object, field: str, is_good: bool, want: str) -> None:
    if not is_good:
        raise ValueError(f"{type(method).__name__}: {field}={getattr(method, field)!r}, want {want}")


def _check_tag_candidate(method: Method, known: tuple[str, ...]) -> None:
    _check(method, "tag_candidate", method.tag_candidate in known, f"one of {', '.join(known)}")


def _check_sampling(method: Sampling | TagPenalty) -> None:
    _check(method, "temperature", 0 < method.temperature < math.inf, "a number above 0 (use Greedy for 0)")
    _check(method, "top_k", method.top_k >= 0, "at least 0 (0 keeps all)")
    _check(method, "top_p", 0 < method.top_p <= 1, "in (0, 1]")
