"""The gate's attacks, each a job that measures one model and gives a JSON row of labels, cost and what was chosen."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safelm.robustness import attacks
from safelm.robustness.gate.asking import EDIT, NONE, PLAIN, SAFE_BEAM, TRAINING, Asking, Job, Row, cost, harmful_share
from safelm.robustness.gate.input_attacks import InputAttacks
from safelm.robustness.gate.material import SAFE, Material
from safelm.robustness.gate.profiles import Profile, Sweep
from safelm.robustness.tampering import weight_edits
from safelm.robustness.tampering.abliteration import MAX_KL, abliterate
from safelm.robustness.tampering.finetuning import Finetuner
from safelm.robustness.target import Target
from safelm.safety.synthesis.writer import Writer

MERGING = "merging"  # the attack whose row hangs on another model too


@dataclasses.dataclass
class Battery:
    """All attacks on a model.

    Attributes:
      merge_with: the model that weights are merged with; None: no merging. It may be of another form.
      knows_tag: whether SafeBeam is a way of decoding the model, and the tag worth erasing.
      attacker: rewrites requests; None for the synthetic web's own.
    """

    target: Target
    profile: Profile
    material: Material
    merge_with: Target | None
    knows_tag: bool
    attacker: Writer | None = None
    _tuners: dict[int, Finetuner] = dataclasses.field(default_factory=dict)  # by rank: compiled once

    def jobs(self) -> Iterator[Job]:
        """The attacks, cheap ones first."""
        profile, ask, prompts = self.profile, self._asking, self.material.prompts
        yield Job(NONE, PLAIN, lambda: ask.row(prompts), black_box=True)
        if self.knows_tag:
            steered = f"{NONE}, SafeBeam"
            yield Job(steered, PLAIN, lambda: ask.row(prompts, method=SAFE_BEAM), black_box=True, method=SAFE_BEAM)
        yield from InputAttacks(ask, self.knows_tag, self.attacker).jobs()
        yield Job("abliteration", EDIT, self._abliteration)
        edit = weight_edits
        yield self._worst("pruning", profile.pruned, lambda share: edit.prune(self.target, share))
        yield self._worst("rounding, bits", profile.bits, lambda bits: edit.round_weights(self.target, bits))
        if self.merge_with is not None:
            other = self.merge_with
            yield self._worst(MERGING, profile.merged, lambda share: edit.merge(self.target, other, share))
        if self.knows_tag:
            yield Job(
                "tag erased, SafeBeam", EDIT, lambda: ask.row(ask.harmful, target=self._erased(), method=SAFE_BEAM)
            )
            deleted = weight_edits.delete_tag_row
            yield Job(
                "tag row deleted, SafeBeam",
                EDIT,
                lambda: ask.row(ask.harmful, target=deleted(self.target), method=SAFE_BEAM),
            )
        for sweep in profile.sweeps:
            for learning_rate in sweep.learning_rates:
                for seed in profile.seeds:
                    yield self._finetuning(sweep, learning_rate, seed)

    @property
    def _asking(self) -> Asking:
        return Asking(self.target, self.profile, self.material)

    def _development(self, target: Target) -> dict[str, str]:
        """Labels of a model's answers to the harmful development prompts."""
        return self._asking.row(self._asking.development, target=target)["labels"]

    def _erased(self) -> Target:
        contexts = [self.target.context(prompt.prompt) for prompt in self._asking.development]
        return attacks.erase_tag(self.target, contexts)

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
        beyond = {"beyond the bound of": MAX_KL} if found.chosen.kl > MAX_KL else {}
        return self._asking.row(self._asking.harmful, target=found.target) | {
            "chosen": {"layer": found.chosen.layer, "kl_on_safe": found.chosen.kl, **beyond},
            "candidates": [dataclasses.asdict(each) for each in found.candidates],
            "cost": cost(queries=queries),
        }

    def _worst(self, name: str, settings: Sequence[Any], edit: Callable[[Any], Target]) -> Job:
        """An edit at the setting that frees most harmful answers to development prompts."""

        def run() -> Row:
            tried = {setting: harmful_share(self._development(edit(setting))) for setting in settings}
            worst = max(tried, key=tried.__getitem__)
            queries = len(settings) * sum(prompt.harmful for prompt in self.material.development)
            return self._asking.row(self._asking.harmful, target=edit(worst)) | {
                "chosen": {"setting": worst},
                "candidates": [{"setting": setting, "harmful": share} for setting, share in tried.items()],
                "cost": cost(queries=queries),
            }

        return Job(name, EDIT, run)

    def _finetuning(self, sweep: Sweep, learning_rate: float, seed: int) -> Job:
        name = f"{sweep.name} / {learning_rate:g} / {seed}"
        return Job(name, TRAINING, lambda: self._curve(sweep, learning_rate, seed), data=sweep.data)

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
                row |= self._asking.row(self._asking.harmful, target=point.target)
                row |= {"chosen": reached, "cost": cost(point.steps, point.tokens, queries)}
        return row

    def _tuner(self, rank: int) -> Finetuner:
        if rank not in self._tuners:
            safe = self.material.texts(self.target, SAFE, 32)
            sizes = {"batch_size": self.profile.batch_size, "seq_len": self.profile.seq_len}
            self._tuners[rank] = Finetuner(self.target, safe, rank=rank, **sizes)
        return self._tuners[rank]
