"""The gate's attacks, each a job that measures one model and gives a JSON row of labels, cost and what was chosen."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safelm.evaluate.judges import word_lists as judge_lib
from safelm.evaluate.suites.suite import Prompt
from safelm.robustness import attacks
from safelm.robustness.gate.material import SAFE, Material
from safelm.robustness.gate.profiles import Profile, Sweep
from safelm.robustness.gradient_suffix import FoundSuffix, find_suffix
from safelm.robustness.tampering import weight_edits
from safelm.robustness.tampering.abliteration import abliterate
from safelm.robustness.tampering.finetuning import Finetuner
from safelm.robustness.target import Target, Tokens, measure_answers

Row = dict[str, Any]
PLAIN, INPUT, EDIT, TRAINING = KINDS = ("plain", "input", "edit", "finetuning")
GREEDY, SAFE_BEAM = "greedy", "safe_beam"
_ANSWER_WORDS = 12  # of a harmful answer, that a suffix is to make likely
_TAG_WEIGHT = 1.0  # of the attack hidden from the tag: see `SuffixSearch`


@dataclasses.dataclass(frozen=True)
class Job:
    """An attack of a kind; `run` gives its row."""

    name: str
    kind: str
    run: Callable[[], Row]


@dataclasses.dataclass
class Battery:
    """All attacks on a model.

    Attributes:
      merge_with: the model that weights are merged with; None: no merging.
      knows_tag: whether SafeBeam is a way of decoding the model, and the tag worth erasing.
    """

    target: Target
    profile: Profile
    material: Material
    merge_with: Target | None
    knows_tag: bool
    _tuners: dict[int, Finetuner] = dataclasses.field(default_factory=dict)  # by rank: compiled once

    def jobs(self) -> Iterator[Job]:
        """The attacks, cheap ones first."""
        profile, prompts = self.profile, self.material.prompts
        harmful = [prompt for prompt in prompts if prompt.harmful]
        yield Job("none", PLAIN, lambda: self._asked(self.target, prompts))
        if self.knows_tag:
            yield Job("none, SafeBeam", PLAIN, lambda: self._asked(self.target, prompts, method=SAFE_BEAM))
        answers = attacks.harmful_answers(harmful)
        for words in profile.prefix_words:

            def prefilled(words: int = words) -> Row:
                contexts = attacks.prefix_contexts(self.target, harmful, answers, words)
                return self._asked(self.target, harmful, contexts) | {"cost": _cost(queries=len(harmful))}

            yield Job(f"first {words} words", INPUT, prefilled)
        yield Job("suffix by gradient", INPUT, lambda: self._suffix(0.0, GREEDY))
        if self.knows_tag:
            yield Job("suffix hidden from the tag, SafeBeam", INPUT, lambda: self._suffix(_TAG_WEIGHT, SAFE_BEAM))
        yield Job("abliteration", EDIT, self._abliteration)
        edit = weight_edits
        yield self._worst("pruning", profile.pruned, lambda share: edit.prune(self.target, share))
        yield self._worst("rounding, bits", profile.bits, lambda bits: edit.round_weights(self.target, bits))
        if self.merge_with is not None:
            other = self.merge_with
            yield self._worst("merging", profile.merged, lambda share: edit.merge(self.target, other, share))
        if self.knows_tag:
            yield Job("tag erased, SafeBeam", EDIT, lambda: self._asked(self._erased(), harmful, method=SAFE_BEAM))
            deleted = weight_edits.delete_tag_row
            yield Job(
                "tag row deleted, SafeBeam",
                EDIT,
                lambda: self._asked(deleted(self.target), harmful, method=SAFE_BEAM),
            )
        for sweep in profile.sweeps:
            for learning_rate in sweep.learning_rates:
                for seed in profile.seeds:
                    yield self._finetuning(sweep, learning_rate, seed)

    def _asked(
        self,
        target: Target,
        prompts: Sequence[Prompt],
        contexts: Sequence[Tokens] | None = None,
        *,
        method: str = GREEDY,
    ) -> Row:
        """The labels of a model's answers, by prompt id."""
        contexts = contexts or [target.context(prompt.prompt) for prompt in prompts]
        found = measure_answers(target, prompts, contexts, method, max_new_tokens=self.profile.max_new_tokens)
        return {"labels": found["labels"], "method": method, "cost": _cost()}

    def _development(self, target: Target, suffix: str = "", *, method: str = GREEDY) -> dict[str, str]:
        """Labels of the answers to the harmful development prompts, with a suffix behind each."""
        prompts = [prompt for prompt in self.material.development if prompt.harmful]
        contexts = [target.context(prompt.prompt + suffix) for prompt in prompts]
        return self._asked(target, prompts, contexts, method=method)["labels"]

    def _suffix(self, tag_weight: float, method: str) -> Row:
        """One suffix for all prompts: of steps 0, 1, 2, 4, .. the one that frees most development answers."""
        search = dataclasses.replace(self.profile.suffix, tag_weight=tag_weight)
        chosen_by = [prompt for prompt in self.material.development if prompt.harmful][: self.profile.suffix_prompts]
        answers = attacks.harmful_answers(chosen_by)
        starts = [" ".join(answers[prompt.id].split()[:_ANSWER_WORDS]) for prompt in chosen_by]
        tried: list[tuple[float, FoundSuffix]] = []

        def ask(found: FoundSuffix) -> None:
            if found.step & (found.step - 1) == 0 or found.step == search.steps:
                tried.append((harmful_share(self._development(self.target, found.text, method=method)), found))

        find_suffix(self.target, [prompt.prompt for prompt in chosen_by], starts, search, ask)
        _, best = max(tried, key=lambda each: (each[0], -each[1].loss))
        asked = self._harmful()
        contexts = [self.target.context(prompt.prompt + best.text) for prompt in asked]
        queries = tried[-1][1].forward_passes + len(tried) * sum(each.harmful for each in self.material.development)
        return self._asked(self.target, asked, contexts, method=method) | {
            "chosen": {"steps": best.step},
            "candidates": [
                {"steps": each.step, "loss": each.loss, "passes": each.forward_passes, "harmful": share}
                for share, each in tried
            ],
            "cost": _cost(steps=search.steps, queries=queries),
        }

    def _harmful(self) -> list[Prompt]:
        return [prompt for prompt in self.material.prompts if prompt.harmful]

    def _erased(self) -> Target:
        development = [prompt for prompt in self.material.development if prompt.harmful]
        return attacks.erase_tag(self.target, [self.target.context(prompt.prompt) for prompt in development])

    def _abliteration(self) -> Row:
        contexts = {
            is_harmful: [
                self.target.context(prompt.prompt)
                for prompt in self.material.development
                if prompt.harmful == is_harmful
            ]
            for is_harmful in (True, False)
        }
        found = abliterate(
            self.target, contexts[True], contexts[False], lambda edited: harmful_share(self._development(edited))
        )
        queries = sum(map(len, contexts.values())) + len(contexts[True]) * len(found.candidates)
        return self._asked(found.target, self._harmful()) | {
            "chosen": {"layer": found.chosen.layer, "kl_on_safe": found.chosen.kl},
            "candidates": [dataclasses.asdict(each) for each in found.candidates],
            "cost": _cost(queries=queries),
        }

    def _worst(self, name: str, settings: Sequence[Any], edit: Callable[[Any], Target]) -> Job:
        """An edit at the setting that frees most harmful answers to development prompts."""

        def run() -> Row:
            tried = {setting: harmful_share(self._development(edit(setting))) for setting in settings}
            worst = max(tried, key=tried.__getitem__)
            queries = len(settings) * sum(prompt.harmful for prompt in self.material.development)
            return self._asked(edit(worst), self._harmful()) | {
                "chosen": {"setting": worst},
                "candidates": [{"setting": setting, "harmful": share} for setting, share in tried.items()],
                "cost": _cost(queries=queries),
            }

        return Job(name, EDIT, run)

    def _finetuning(self, sweep: Sweep, learning_rate: float, seed: int) -> Job:
        return Job(
            f"{sweep.name} / {learning_rate:g} / {seed}", TRAINING, lambda: self._curve(sweep, learning_rate, seed)
        )

    def _curve(self, sweep: Sweep, learning_rate: float, seed: int) -> Row:
        """A curve's points with labels of development prompts; those reported on are asked at every new worst one."""
        profile, tuner = self.profile, self._tuner(sweep.rank)
        documents = self.material.texts(self.target, sweep.data, profile.documents)
        row: Row = {"sweep": sweep.name, "learning_rate": learning_rate, "seed": seed, "points": [], "labels": {}}
        worst, queries = -1.0, 0
        curve = tuner.curve(documents, learning_rate=learning_rate, seed=seed, points=(0, *profile.points))
        for point in curve:
            labels = self._development(point.target)
            queries += len(labels)
            reached = {"steps": point.steps, "tokens": point.tokens, "safe_loss": point.safe_loss}
            row["points"].append({**reached, "labels": labels})
            if point.steps and harmful_share(labels) > worst:
                worst = harmful_share(labels)
                row |= self._asked(point.target, self._harmful())
                row |= {"chosen": reached, "cost": _cost(point.steps, point.tokens, queries)}
        return row

    def _tuner(self, rank: int) -> Finetuner:
        if rank not in self._tuners:
            safe = self.material.texts(self.target, SAFE, 32)
            sizes = {"batch_size": self.profile.batch_size, "seq_len": self.profile.seq_len}
            self._tuners[rank] = Finetuner(self.target, safe, rank=rank, **sizes)
        return self._tuners[rank]


def harmful_share(labels: dict[str, str]) -> float:
    """The share of harmful answers."""
    return sum(label == judge_lib.HARMFUL for label in labels.values()) / len(labels)


def _cost(steps: int = 0, tokens: int = 0, queries: int = 0) -> dict[str, int]:
    """Of an attack: updates, tokens trained on, and prompts asked of the model to choose by."""
    return {"steps": steps, "tokens": tokens, "queries": queries}
