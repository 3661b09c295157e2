"""Asks an attacked model and labels its answers; rows of attacks and points of their curves."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safelm.evaluate.judges import word_lists as judge_lib
from safelm.evaluate.suites.suite import Prompt
from safelm.inference import Method
from safelm.inference.methods import METHODS
from safelm.robustness.gate.material import Material
from safelm.robustness.gate.profiles import Profile
from safelm.robustness.target import Labelled, Target, Tokens, label_answers

Row = dict[str, Any]
PLAIN, INPUT, EDIT, TRAINING = KINDS = ("plain", "input", "edit", "finetuning")
NONE = "none"  # the job without an attack, which every report rests on
GREEDY, SAFE_BEAM = "greedy", "safe_beam"
DEVELOPMENT, REPORTED = "development", "reported"


@dataclasses.dataclass(frozen=True)
class Job:
    """An attack of a kind.

    Attributes:
      run: gives its row; NotTriedError where the attack can't be tried on the model.
      black_box: whether it needs no more than an API.
      method: of decoding, by which a server's attacks are told from others.
      data: of finetuning, what is trained on.
    """

    name: str
    kind: str
    run: Callable[[], Row]
    black_box: bool = False
    method: str = GREEDY
    data: str = ""


@dataclasses.dataclass(frozen=True)
class Asking:
    """A model, what is asked of it, and how long its answers are."""

    target: Target
    profile: Profile
    material: Material

    @property
    def harmful(self) -> list[Prompt]:
        """The harmful prompts that are reported on."""
        return [prompt for prompt in self.material.prompts if prompt.harmful]

    @property
    def development(self) -> list[Prompt]:
        """The harmful prompts that attackers choose by."""
        return [prompt for prompt in self.material.development if prompt.harmful]

    def answers(
        self,
        contexts: Sequence[Tokens],
        method: str | Method = GREEDY,
        *,
        target: Target | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Labelled:
        """The answers of the model, or of one that an attacker made of it."""
        chosen = METHODS[method]() if isinstance(method, str) else method
        most = self.profile.max_new_tokens
        return label_answers(target or self.target, contexts, chosen, max_new_tokens=most, seeds=seeds)

    def row(
        self,
        prompts: Sequence[Prompt],
        contexts: Sequence[Tokens] | None = None,
        *,
        method: str = GREEDY,
        target: Target | None = None,
    ) -> Row:
        """The labels of the answers, by prompt id."""
        asked = target or self.target
        contexts = contexts or [asked.context(prompt.prompt) for prompt in prompts]
        found = self.answers(contexts, method, target=asked)
        return {"labels": _by_id(prompts, found.labels), "method": method, "cost": cost()}

    def point(
        self,
        setting: float | int,
        contexts: Sequence[Tokens],
        *,
        method: str = GREEDY,
        target: Target | None = None,
        spent: Mapping[str, int] | None = None,
    ) -> Row:
        """A point of a curve: labels of the development prompts at a setting, and what it has cost.

        Args:
          contexts: of the harmful development prompts.
          spent: before they were asked.
        """
        found = self.answers(contexts, method, target=target)
        before = spent or cost()
        added = cost(queries=len(contexts), tokens=found.tokens)
        total = {name: before[name] + added[name] for name in added}
        return {"setting": setting, **total, "labels": _by_id(self.development, found.labels)}


def worst_point(points: Sequence[Row]) -> Row:
    """The point with most harmful answers; of several the first."""
    return max(points, key=lambda point: harmful_share(point["labels"]))


def as_candidates(unit: str, points: Sequence[Row], chosen: Row, asked: str = DEVELOPMENT) -> Row:
    """What a row says of its curve: its unit, its points, which was chosen, and what all of them cost."""
    last = {name: sum(point[name] for point in points) for name in ("queries", "tokens")}
    return {
        "unit": unit,
        "asked": asked,
        "points": list(points),
        "chosen": {unit: chosen["setting"]},
        "cost": cost(chosen["steps"], **last),
    }


def harmful_share(labels: Mapping[str, str]) -> float:
    """The share of harmful answers."""
    return sum(label == judge_lib.HARMFUL for label in labels.values()) / len(labels)


def cost(steps: int = 0, tokens: int = 0, queries: int = 0) -> dict[str, int]:
    """Of an attack: updates, tokens read or written to find it, and prompts asked of the model to choose by."""
    return {"steps": steps, "tokens": tokens, "queries": queries}


def _by_id(prompts: Sequence[Prompt], labels: Sequence[str]) -> dict[str, str]:
    return dict(zip((prompt.id for prompt in prompts), labels, strict=True))
