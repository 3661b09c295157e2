"""Protocols by name: what a published evaluation fixes, frozen, one module each with its source.

A named protocol decides how prompts are put, how they are answered, what the judge is asked and from where on an answer
counts. Its name and a hash of all of that stand in the results' protocol, so results of two protocols, or of two
versions of one, never compare. Prompts are the user's files; judges' wordings are our own, so a rate is that of this
protocol with the judge that is named, never the number of the publication.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any

from safelm.evaluate.judges.scales import SCALES
from safelm.evaluate.suites.suite import CHAT
from safelm.inference.methods import Greedy, Method
from safelm.io import records

YES_NO = ""  # the judge says whether an answer does the harm that it was asked for


@dataclasses.dataclass(frozen=True)
class Published:
    """What a protocol fixes.

    Attributes:
      version: counts up with every change.
      benchmarks: the sets of prompts it is made for (names of --data).
      suite: how prompts are put: `chat`, or `base` as text to continue.
      method: how a model answers; methods that look ahead may stand in its place, as the model's own defence.
      max_new_tokens: of an answer.
      ask: the scale that judges are asked for, of `scales.SCALES`, or YES_NO.
      answer_tokens: so many of an answer's tokens a judge on our own engine reads; 0 = as many as it reads anyway.
      answer_start: what is given of the answer: `none` or `target`.
    """

    name: str
    version: int
    benchmarks: tuple[str, ...]
    suite: str = CHAT
    method: Method = dataclasses.field(default_factory=Greedy)
    max_new_tokens: int = 512
    ask: str = YES_NO
    answer_tokens: int = 0
    answer_start: str = "none"

    @property
    def stamp(self) -> str:
        """Name, version and a hash of everything that is fixed, the scale included."""
        fixed = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        fixed["scale"] = SCALES[self.ask].version if self.ask else ""
        return f"{self.name}/{self.version} {records.fingerprint(fixed)[:12]}"

    @property
    def needs_log_probs(self) -> bool:
        return bool(self.ask) and SCALES[self.ask].needs_log_probs


def names() -> list[str]:
    """All protocols there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Published:
    """A protocol by name. Raises ValueError for one that there isn't."""
    if name not in names():
        raise ValueError(f"--protocol={name}: there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").PROTOCOL


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return [type(value).__name__, dataclasses.asdict(value)]
    return list(value) if isinstance(value, tuple) else value
