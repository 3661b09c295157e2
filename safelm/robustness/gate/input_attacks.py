"""The gate's attacks on inputs, from those that need no more than an API to those that need the weights.

Each gives its harmful answers over what it spent (depth, shots, samples, queries, steps), not only the worst.
"""

import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safelm.evaluate.judges import word_lists as judge_lib
from safelm.evaluate.suites.suite import Prompt
from safelm.inference import Sampling
from safelm.robustness import attacks
from safelm.robustness.attack_loop import Chase, check_tried, run_loop
from safelm.robustness.gate.asking import (
    GREEDY,
    INPUT,
    REPORTED,
    SAFE_BEAM,
    Asking,
    Job,
    Row,
    as_candidates,
    cost,
    harmful_share,
    worst_point,
)
from safelm.robustness.gradient_suffix import FoundSuffix, find_suffix
from safelm.robustness.rephraser import Rephraser
from safelm.robustness.soft_prompt import SoftPrompt, find_soft_prompt, soft_contexts, with_vectors
from safelm.robustness.target import Target, Tokens
from safelm.safety.synthesis.writer import Writer

_ANSWER_WORDS = 12  # of a harmful answer, that a suffix or a soft prompt is to make likely
_TAG_WEIGHT = 1.0  # of the attack hidden from the tag: see `SuffixSearch`


@dataclasses.dataclass(frozen=True)
class InputAttacks:
    """The attacks on one model's inputs.

    Attributes:
      knows_tag: whether SafeBeam is a way of decoding the model.
      attacker: writes requests anew; None for the synthetic web's own, which needs no model.
    """

    asking: Asking
    knows_tag: bool
    attacker: Writer | None = None

    def jobs(self) -> Iterator[Job]:
        """The attacks; those that need no weights are also tried on SafeBeam, which a server can insist on."""
        for method in (GREEDY, *([SAFE_BEAM] if self.knows_tag else [])):
            behind = ", SafeBeam" if method == SAFE_BEAM else ""
            black_box: list[tuple[str, Callable[[str], Row]]] = [
                ("first tokens", self._first_tokens),
                ("many-shot", self._many_shot),
                (self._loop_name, self._loop),
            ]
            for name, run in black_box:
                asked = functools.partial(run, method)
                yield Job(name + behind, INPUT, asked, black_box=True, method=method)
            if method == GREEDY:  # SafeBeam draws nothing: asked again it gives the same answer
                yield Job("worst of samples", INPUT, self._samples, black_box=True)
        yield Job("suffix by gradient", INPUT, lambda: self._suffix(0.0, GREEDY))
        if self.knows_tag:
            yield Job("suffix hidden from the tag, SafeBeam", INPUT, lambda: self._suffix(_TAG_WEIGHT, SAFE_BEAM))
        yield Job("soft prompt", INPUT, self._soft_prompt)

    @property
    def _loop_name(self) -> str:
        return f"requests rewritten by {self.attacker.name}" if self.attacker else "requests rewritten"

    def _first_tokens(self, method: str) -> Row:
        """The first tokens of a harmful answer are given, as many as frees most development answers."""

        def contexts(prompts: Sequence[Prompt], depth: float | int) -> list[Tokens]:
            answers = attacks.harmful_answers(prompts, words=max(self.asking.profile.prefix_tokens))
            return attacks.prefill_contexts(self.asking.target, prompts, answers, int(depth))

        return self._by_setting("first tokens", (0, *self.asking.profile.prefix_tokens), contexts, method)

    def _many_shot(self, method: str) -> Row:
        """Harmful requests of other topics stand before the prompt, each with its answer."""
        asking, most = self.asking, max(self.asking.profile.shots)
        answers = attacks.harmful_answers(asking.development)
        shots = attacks.ManyShot(asking.target, asking.development, answers, asking.profile.max_new_tokens)
        room = min(shots.room(prompt, most) for prompt in asking.development)

        def contexts(prompts: Sequence[Prompt], count: float | int) -> list[Tokens]:
            return [shots.context(prompt, int(count)) for prompt in prompts]

        settings = sorted({0, *(min(count, room) for count in asking.profile.shots)})
        return self._by_setting("shots", settings, contexts, method)

    def _by_setting(
        self,
        unit: str,
        settings: Sequence[int],
        contexts: Callable[[Sequence[Prompt], float | int], list[Tokens]],
        method: str,
    ) -> Row:
        asking = self.asking
        points = [asking.point(each, contexts(asking.development, each), method=method) for each in settings]
        chosen = worst_point(points)
        asked = asking.row(asking.harmful, contexts(asking.harmful, chosen["setting"]), method=method)
        return asked | as_candidates(unit, points, chosen)

    def _samples(self) -> Row:
        """k answers drawn at temperature 1: a prompt counts as harmful if one of them is."""
        asking, most = self.asking, self.asking.profile.samples
        prompts = asking.harmful
        contexts = [asking.target.context(prompt.prompt) for prompt in prompts]
        seeds = [random.Random(f"{prompt.id}/{draw}").getrandbits(31) for draw in range(most) for prompt in prompts]
        found = asking.answers(contexts * most, Sampling(), seeds=seeds)
        drawn = [found.labels[start : start + len(prompts)] for start in range(0, len(found.labels), len(prompts))]
        points = [
            {
                "setting": count,
                **cost(queries=count * len(prompts), tokens=found.tokens * count // most),
                "labels": {
                    prompt.id: judge_lib.HARMFUL if judge_lib.HARMFUL in labels else labels[0]
                    for prompt, labels in zip(prompts, zip(*drawn[:count], strict=True), strict=True)
                },
            }
            for count in doublings(most)
        ]
        return _per_prompt("samples", points, "sample")

    def _loop(self, method: str) -> Row:
        """Every prompt is rewritten until an answer is harmful, see `attack_loop`.

        Raises NotTriedError where the attacker gave no rewrite to ask.
        """
        asking, settings = self.asking, self.asking.profile.loop

        def ask(texts: Sequence[str]) -> Any:
            return asking.answers([asking.target.context(text) for text in texts], method)

        attacker = self.attacker or Rephraser()
        chases, tokens = run_loop(attacker, asking.harmful, ask, settings)
        check_tried(chases)
        points = [_loop_point(chases, most, tokens) for most in doublings(settings.most_queries)]
        found = _per_prompt("queries a prompt", points, method)
        told = {"rewrites asked": sum(chase.asked for chase in chases)}
        for why, count in sum((chase.dropped for chase in chases), collections.Counter[str]()).items():
            told[f"rewrites not asked, {why}"] = count
        return found | {"chosen": found["chosen"] | told}

    def _suffix(self, tag_weight: float, method: str) -> Row:
        """One suffix for all prompts: of steps 0, 1, 2, 4, .. the one that frees most development answers."""
        asking = self.asking
        search = dataclasses.replace(asking.profile.suffix, tag_weight=tag_weight)
        prompts, starts = self._wanted()
        tried = _Tried(asking, self._tokens_read(prompts, starts, search.tokens), method)

        def ask(found: FoundSuffix) -> None:
            if found.step in (0, *doublings(search.steps)):
                contexts = [asking.target.context(prompt.prompt + found.text) for prompt in asking.development]
                tried.add(found, contexts)

        find_suffix(asking.target, prompts, starts, search, ask)
        text = tried.best.text
        contexts = [asking.target.context(prompt.prompt + text) for prompt in asking.harmful]
        return asking.row(asking.harmful, contexts, method=method) | tried.row()

    def _soft_prompt(self) -> Row:
        """Vectors behind all prompts: of steps 0, 1, 2, 4, .. those that free most development answers."""
        asking, search = self.asking, self.asking.profile.soft_prompt
        prompts, starts = self._wanted()
        tried = _Tried(asking, self._tokens_read(prompts, starts, search.tokens), GREEDY)

        def ask(found: SoftPrompt) -> None:
            if found.step in (0, *doublings(search.steps)):
                wider, ids = with_vectors(asking.target, found.vectors_SD)
                texts = [prompt.prompt for prompt in asking.development]
                tried.add(found, soft_contexts(asking.target, texts, ids), wider)

        find_soft_prompt(asking.target, prompts, starts, search, ask)
        wider, ids = with_vectors(asking.target, tried.best.vectors_SD)
        contexts = soft_contexts(asking.target, [prompt.prompt for prompt in asking.harmful], ids)
        return asking.row(asking.harmful, contexts, target=wider) | tried.row()

    def _wanted(self) -> tuple[list[str], list[str]]:
        """Some development prompts and the beginnings of their harmful answers."""
        chosen = self.asking.development[: self.asking.profile.suffix_prompts]
        answers = attacks.harmful_answers(chosen)
        starts = [" ".join(answers[prompt.id].split()[:_ANSWER_WORDS]) for prompt in chosen]
        return [prompt.prompt for prompt in chosen], starts

    def _tokens_read(self, prompts: Sequence[str], starts: Sequence[str], more: int) -> int:
        """The longest prompt with its answer's beginning and so many tokens: what a pass reads."""
        return max(map(len, map(self.asking.target.context, prompts, starts))) + more


def doublings(most: int) -> list[int]:
    """1, 2, 4, .. and `most` itself."""
    return sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most} - {0})


def _loop_point(chases: Sequence[Chase], most: int, tokens: int) -> Row:
    queries, all_queries = (sum(min(chase.queries, each) for chase in chases) for each in (most, 1 << 60))
    labels = {chase.prompt.id: chase.label(most) for chase in chases}
    return {"setting": most, **cost(queries=queries, tokens=tokens * queries // all_queries), "labels": labels}


def _per_prompt(unit: str, points: Sequence[Row], method: str) -> Row:
    """The row of an attack on every prompt by itself: its points are of the reported prompts, the last is its rate."""
    last = points[-1]
    found = as_candidates(unit, points, last, REPORTED) | {"labels": last["labels"], "method": method}
    return found | {"cost": cost(queries=last["queries"], tokens=last["tokens"])}


class _Tried:
    """What a search by gradient has come to at some steps; every point costs what was spent until then."""

    def __init__(self, asking: Asking, read: int, method: str):
        """`read`: tokens that a forward pass reads."""
        self._asking, self._read, self._method = asking, read, method
        self._tried: list[tuple[Row, Any]] = []
        self._asked = cost()  # to choose by, so far

    def add(self, found: FoundSuffix | SoftPrompt, contexts: Sequence[Tokens], target: Target | None = None) -> None:
        """Asks the development prompts; `target`: the model that the attacker made."""
        passes, asked = found.forward_passes, self._asked
        spent = cost(found.step, passes * self._read + asked["tokens"], passes + asked["queries"])
        point = self._asking.point(found.step, contexts, method=self._method, target=target, spent=spent)
        for name in ("queries", "tokens"):
            asked[name] += point[name] - spent[name]
        self._tried.append((point | {"loss": round(found.loss, 4)}, found))

    @property
    def best(self) -> Any:
        """What frees most development answers; of several the one of the least loss."""
        return self._best()[1]

    def row(self) -> Row:
        """What a row says of the search."""
        points = [point for point, _ in self._tried]
        last = points[-1]
        found = as_candidates("steps", points, self._best()[0])
        return found | {"cost": cost(last["steps"], last["tokens"], last["queries"])}

    def _best(self) -> tuple[Row, Any]:
        return max(self._tried, key=lambda each: (harmful_share(each[0]["labels"]), -each[1].loss))
