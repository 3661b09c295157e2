"""The scorers a run asks, named by `--scorers`, and checked to be the same ones in every worker."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safelm.io import hub
from safelm.safety.scorer import BUNDLED, KINDS, Scorer, Verdict, load_scorer

_ALIAS = re.compile(rf"([a-z][a-z0-9_]*)=(?=(?:{'|'.join(KINDS)}):|{BUNDLED}\b)")


_kept: dict[tuple["ScorerSpec", ...], list[Scorer]] = {}


@dataclasses.dataclass(frozen=True)
class ScorerSpec:
    """`spec` is what `load_scorer` takes; name and fingerprint are "" until the scorer was loaded once.

    `measured` and `settings` are what the manifest keeps of it (see `safelm.safety.scorer`), JSON-able.
    """

    spec: str
    name: str = ""
    fingerprint: str = ""
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class _Renamed:
    scorer: Scorer
    name: str

    @property
    def fingerprint(self) -> str:
        return self.scorer.fingerprint

    def __getattr__(self, name: str) -> Any:
        if name == "scorer":
            raise AttributeError(name)
        return getattr(self.scorer, name)

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        return self.scorer.score(texts)


def parse_specs(text: str) -> tuple[ScorerSpec, ...]:
    """The scorers of a flag: KIND:PLACE or NAME=KIND:PLACE, by comma; models of a hub are pinned to their commit.

    Raises ValueError for none or one named twice, OSError for a model that the hub doesn't give.
    """
    specs = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        piece = hub.pinned_in(piece)
        alias = _ALIAS.match(piece)
        specs.append(ScorerSpec(piece[alias.end() :], alias[1]) if alias else ScorerSpec(piece))
    if not specs:
        raise ValueError(f"--scorers names nothing: {text!r}")
    if len(specs) > len(set(specs)):
        raise ValueError(f"--scorers names one twice: {text!r}")
    return tuple(specs)


def load_scorers(specs: Sequence[ScorerSpec], *, check: bool = False) -> list[Scorer]:
    """Loads scorers under the names they were given. `check`: they must be those that the specs describe.

    Raises ValueError for two of one name or a name that can't begin a column's, and what loading a scorer raises.
    """
    if check and tuple(specs) in _kept:
        return _kept[tuple(specs)]
    scorers: list[Scorer] = []
    for spec in specs:
        scorer = load_scorer(spec.spec)
        if check and scorer.fingerprint != spec.fingerprint:
            raise ValueError(
                f"scorer {spec.spec}: it is {scorer.fingerprint} now, the run began with {spec.fingerprint}"
            )
        if spec.name and spec.name != scorer.name:
            scorer = _Renamed(scorer, spec.name)
        if not re.fullmatch(r"\w+", scorer.name):
            raise ValueError(f"scorer {spec.spec}: its name {scorer.name!r} can't begin the name of a column")
        if any(scorer.name == other.name for other in scorers):
            raise ValueError(f"--scorers: two are named {scorer.name!r}; name one by NAME=KIND:PLACE")
        scorers.append(scorer)
    return scorers


def keep(specs: Sequence[ScorerSpec], scorers: Sequence[Scorer]) -> None:
    """Lets workers that are threads of this process use what was loaded here, instead of loading it again."""
    _kept[tuple(specs)] = list(scorers)


def forget() -> None:
    """Lets go of what `keep` kept, before other processes load it."""
    _kept.clear()


def describe(specs: Sequence[ScorerSpec], scorers: Sequence[Scorer]) -> tuple[ScorerSpec, ...]:
    """The specs with the names and fingerprints of what was loaded from them."""
    return tuple(
        ScorerSpec(
            spec.spec,
            scorer.name,
            scorer.fingerprint,
            measured=_kept_of(scorer, "measured"),
            settings=_kept_of(scorer, "manifest_settings"),
        )
        for spec, scorer in zip(specs, scorers, strict=True)
    )


def _kept_of(scorer: Scorer, attribute: str) -> dict[str, Any]:
    """A mapping that a scorer may have, as JSON holds it; empty where it has none."""
    found = getattr(scorer, attribute, None)
    if not isinstance(found, Mapping):
        return {}
    named = {str(name): value for name, value in found.items()}
    try:
        return json.loads(json.dumps(named, default=_json_value, skipkeys=True))
    except (ValueError, RecursionError):  # it holds itself
        return {name: str(value) for name, value in named.items()}


def _json_value(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
