"""How long a profile will take, before it is run: work counted from the profile, times measured on the model itself.

Every kind of work is done once or twice on the model in hand: the first time compiles, the second is timed. Counted are
answers (greedy, SafeBeam), rows of searches by gradient, and updates, each times what it costs here; programs are
counted by what the first of their kind took to compile. What ends early (a curve that has broken its model, a prompt
that is won) makes a run shorter than that.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np

from safelm.report import table
from safelm.robustness import attacks
from safelm.robustness.gate.asking import GREEDY, SAFE_BEAM, Asking
from safelm.robustness.gate.input_attacks import doublings
from safelm.robustness.gate.material import SAFE, Material
from safelm.robustness.gate.profiles import HARMFUL, Profile
from safelm.robustness.gradient_suffix import SuffixSearch, find_suffix
from safelm.robustness.tampering.finetuning import Finetuner
from safelm.robustness.target import Target, load_target, may_know_tag

_PROBED = 16  # prompts


@dataclasses.dataclass(frozen=True)
class Work:
    """What a model's attacks need.

    Attributes:
      greedy, steered: answers, greedy and by SafeBeam.
      passes: of a prompt with suffix and answer; a gradient is three.
      updates: of finetuning, with the passes over safe text behind each point.
      programs: to be compiled.
    """

    greedy: int
    steered: int
    passes: int
    updates: int
    programs: int


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Seconds for one of each kind of work, and for compiling one program."""

    greedy: float
    steered: float
    passes: float
    updates: float
    programs: float

    def seconds(self, work: Work) -> float:
        """For all of a model's work."""
        return sum(getattr(self, name) * count for name, count in dataclasses.asdict(work).items())


def estimate_all(models: Mapping[str, str], profile: Profile, material: Material, *, merge_with: str = "") -> str:
    """A Markdown table of the work on each model and the minutes it will take on this machine, as loaded as it is."""
    rows, total = [], 0.0
    for name, folder in models.items():
        target = load_target(folder, is_chat=material.is_chat)
        knows_tag, merges = may_know_tag(folder), merge_with not in ("", name)
        work = count_work(profile, material, target.config.num_layers, knows_tag=knows_tag, merges=merges)
        seconds = measure_speeds(target, profile, material, knows_tag=knows_tag).seconds(work)
        total += seconds
        counts = [f"{count:,}" for count in (work.greedy, work.steered, work.passes, work.updates)]
        rows.append([name, *counts, f"{seconds / 60:.1f}"])
    rows.append(["all", "", "", "", "", f"{total / 60:.1f}"])
    heads = ["model", "answers", "by SafeBeam", "passes", "updates", "minutes"]
    return table.markdown(heads, rows)


def count_work(profile: Profile, material: Material, layers: int, *, knows_tag: bool, merges: bool) -> Work:
    """The work of a profile on a model of so many layers."""
    harmful = sum(prompt.harmful for prompt in material.prompts)
    chosen_by = sum(prompt.harmful for prompt in material.development)
    everything, loop = len(material.prompts), profile.loop.most_queries * harmful
    black_box = 2 * harmful + (len(profile.prefix_tokens) + len(profile.shots) + 2) * chosen_by + loop
    searches = len(doublings(profile.suffix.steps)) + 1, len(doublings(profile.soft_prompt.steps)) + 1
    searched = [number * chosen_by + harmful for number in searches]
    settings = len(profile.pruned) + len(profile.bits) + (len(profile.merged) if merges else 0)
    edits = (settings + layers) * chosen_by + (3 + merges) * harmful
    curves = sum(len(sweep.learning_rates) for sweep in profile.sweeps) * len(profile.seeds)
    rows = len(profile.points) + 1
    finetuned = curves * (rows * chosen_by + min(rows, 3) * harmful)  # a new worst is seldom found more often
    found = profile.suffix.steps * (3 + profile.suffix.candidates) * profile.suffix_prompts
    soft = 3 * profile.soft_prompt.steps * profile.suffix_prompts
    return Work(
        greedy=everything + black_box + profile.samples * harmful + sum(searched) + edits + finetuned,
        steered=(everything + black_box + searched[0] + 2 * harmful) if knows_tag else 0,
        passes=found * (2 if knows_tag else 1) + soft,
        updates=curves * (max(profile.points) + rows * 2),
        programs=10 + 5 * knows_tag + 2 * len({sweep.rank for sweep in profile.sweeps}) + len(searches),
    )


def measure_speeds(target: Target, profile: Profile, material: Material, *, knows_tag: bool) -> Speeds:
    """Times one of each kind of work on the model; takes some seconds, mostly to compile what a run needs anyway."""
    asking = Asking(target, profile, material)
    prompts = asking.development[:_PROBED]
    contexts = [target.context(prompt.prompt) for prompt in prompts]
    compile_s, greedy_s = _first_and_next(lambda: asking.answers(contexts, GREEDY))
    _, steered_s = _first_and_next(lambda: asking.answers(contexts, SAFE_BEAM)) if knows_tag else (0.0, 0.0)
    return Speeds(
        greedy=greedy_s / len(contexts),
        steered=steered_s / len(contexts),
        passes=_pass_seconds(asking),
        updates=_update_seconds(target, profile, material),
        programs=max(0.0, compile_s - greedy_s),
    )


def _pass_seconds(asking: Asking) -> float:
    chosen = asking.development[:1]
    answers = attacks.harmful_answers(chosen)
    search = SuffixSearch(tokens=asking.profile.suffix.tokens, steps=3, candidates=asking.profile.suffix.candidates)
    ticks: list[tuple[float, int]] = []
    texts = [prompt.prompt for prompt in chosen], [answers[prompt.id] for prompt in chosen]
    find_suffix(asking.target, *texts, search, lambda found: ticks.append((time.monotonic(), found.forward_passes)))
    (begun, before), (ended, after) = ticks[1], ticks[-1]  # the first step compiles
    return (ended - begun) / max(1, after - before)


def _update_seconds(target: Target, profile: Profile, material: Material) -> float:
    safe = material.texts(target, SAFE, profile.batch_size)
    sizes = {"batch_size": profile.batch_size, "seq_len": profile.seq_len, "rank": profile.sweeps[0].rank}
    tuner = Finetuner(target, safe, **sizes)
    documents = material.texts(target, HARMFUL, profile.batch_size)
    points = tuner.curve(documents, learning_rate=0.0, seed=0, points=(1, 4))
    next(points)
    begun = time.monotonic()
    next(points)
    return (time.monotonic() - begun) / 3


def _first_and_next(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first and of the second time."""
    seconds = np.zeros(2)
    for number in range(2):
        begun = time.monotonic()
        run()
        seconds[number] = time.monotonic() - begun
    return float(seconds[0]), float(seconds[1])
