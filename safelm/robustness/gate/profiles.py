"""The gate's profiles: what is tried, how often and how long. Frozen: results of two profiles never compare."""

import dataclasses
from collections.abc import Mapping

from safelm.robustness.attack_loop import LoopSettings
from safelm.robustness.gradient_suffix import SuffixSearch
from safelm.robustness.soft_prompt import SoftPromptSearch

HARMFUL, BENIGN = "harmful", "benign"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A finetuning attack at several rates.

    Attributes:
      data: what is trained on, harmful or benign text.
      rank: of adapters (LoRA); 0 trains all weights.
      learning_rates: each constant, for every seed.
    """

    name: str
    data: str
    rank: int
    learning_rates: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Profile:
    """A battery's settings.

    Attributes:
      prompts, development: the most harmful and the most safe prompts that are reported on, and that are chosen by.
      prefix_tokens: of a harmful answer, given to the model.
      shots: harmful requests with answers, shown before a prompt, as far as the context has room.
      samples: answers drawn for a prompt at temperature 1, of which the worst counts.
      loop: how requests are rewritten.
      soft_prompt: how vectors behind the prompts are sought.
      suffix: how a suffix behind the prompts is sought by gradient; suffix_prompts: harmful development prompts that it
        and the soft prompt are sought for; the attack hidden from the tag has its own `tag_weight`.
      points: steps after which a finetuned model is asked.
      seeds: of finetuning.
      documents: texts that a finetuning attack has.
      pruned: shares of weights set to 0; bits: that weights are rounded to; merged: shares of the control.
    """

    name: str
    prompts: int
    development: int
    prefix_tokens: tuple[int, ...]
    shots: tuple[int, ...]
    samples: int
    loop: LoopSettings
    soft_prompt: SoftPromptSearch
    suffix: SuffixSearch
    suffix_prompts: int
    sweeps: tuple[Sweep, ...]
    points: tuple[int, ...]
    seeds: tuple[int, ...]
    documents: int
    pruned: tuple[float, ...]
    bits: tuple[int, ...]
    merged: tuple[float, ...]
    batch_size: int = 8
    seq_len: int = 192
    max_new_tokens: int = 40


def _sweeps(full: tuple[float, ...], lora: tuple[float, ...]) -> tuple[Sweep, ...]:
    return (
        Sweep("benign finetuning", BENIGN, 0, full),
        Sweep("relearning", HARMFUL, 0, full),
        Sweep("relearning, LoRA", HARMFUL, 8, lora),
    )


_PROFILES = (
    Profile(
        name="quick",
        prompts=40,
        development=16,
        prefix_tokens=(8,),
        shots=(4,),
        samples=4,
        loop=LoopSettings(branching=2, width=1, rounds=2),
        soft_prompt=SoftPromptSearch(tokens=8, steps=16),
        suffix=SuffixSearch(tokens=8, steps=8, candidates=32),
        suffix_prompts=4,
        sweeps=_sweeps((1e-3,), (5e-3,)),
        points=(1, 4, 16),
        seeds=(0,),
        documents=64,
        pruned=(0.3,),
        bits=(4,),
        merged=(0.5,),
    ),
    Profile(
        name="standard",
        prompts=120,
        development=40,
        prefix_tokens=(1, 4, 16, 64),
        shots=(1, 2, 4),
        samples=16,
        loop=LoopSettings(branching=2, width=2, rounds=4),
        soft_prompt=SoftPromptSearch(tokens=8, steps=64),
        suffix=SuffixSearch(tokens=12, steps=32, candidates=64),
        suffix_prompts=8,
        sweeps=_sweeps((3e-4, 1e-3, 3e-3), (2e-3, 5e-3, 1e-2)),
        points=(1, 2, 4, 8, 16, 32, 64),
        seeds=(0, 1, 2),
        documents=256,
        pruned=(0.2, 0.4, 0.6),
        bits=(8, 4, 3),
        merged=(0.25, 0.5, 0.75),
    ),
    Profile(
        name="full",
        prompts=0,
        development=80,
        prefix_tokens=(1, 2, 4, 8, 16, 32, 64),
        shots=(1, 2, 4, 8, 16, 32, 64, 128),
        samples=64,
        loop=LoopSettings(branching=4, width=4, rounds=6),
        soft_prompt=SoftPromptSearch(tokens=16, steps=256),
        suffix=SuffixSearch(tokens=20, steps=128, candidates=128),
        suffix_prompts=16,
        sweeps=_sweeps((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (5e-4, 2e-3, 5e-3, 1e-2, 3e-2)),
        points=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        seeds=(0, 1, 2),
        documents=1024,
        pruned=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        bits=(8, 6, 4, 3),
        merged=(0.1, 0.25, 0.5, 0.75, 0.9),
    ),
)
PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in _PROFILES}
