"""Runs the robustness study: finetuning curves, prefilled answers, attackers that know the tag.

Models are finetuned with `safelm.train`. Each point is measured as soon as its checkpoint exists and kept under
`<output>/points`, so a stopped study continues with the next point.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from safelm.data.store import TokenStore
from safelm.evaluate.suites.suite import Prompt, hash_prompts, read_prompts
from safelm.io import records
from safelm.io.progress import Bar
from safelm.robustness import attacks
from safelm.robustness.target import Target, hash_model, hash_store, load_target, measure_answers, measure_tag
from safelm.train import run as train
from safelm.train.defaults import default_config


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """An attack by training on a source of `root` at several learning rates.

    Its points are numbers of epochs, perhaps fractions.
    """

    name: str  # "benign" or "tag_free"
    root: str
    source: str
    learning_rates: tuple[float, ...]
    epochs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """The settings of a study.

    Attributes:
      models: name -> checkpoint folder.
      tagged: names of the models that know the tag; only these are decoded with SafeBeam.
      epoch_tokens: the most tokens of a source that make an epoch, so that large stores stay affordable (0: all).
    """

    models: Mapping[str, str]
    tagged: tuple[str, ...]
    prompts: str
    output: str
    is_chat: bool = True
    finetunings: tuple[Finetuning, ...] = ()
    prefix_words: tuple[int, ...] = (0, 2, 4, 8)
    num_covers: int = 8
    max_prompts: int = 0
    max_new_tokens: int = 40
    batch_size: int = 16
    seq_len: int = 128
    epoch_tokens: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.tagged) - set(self.models)):
            raise ValueError(f"--tagged={unknown[0]}: no such --checkpoint, there are {', '.join(self.models)}")

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """The hashes of the models' parameters."""
        return {name: hash_model(folder) for name, folder in self.models.items()}


def run(study: Study) -> list[dict[str, Any]]:
    """Runs what is missing; returns all points, each {"attack", "model", "method", .., rates with intervals}."""
    prompts = read_prompts(study.prompts, max_prompts=study.max_prompts)
    jobs = [
        job for name in study.models for job in (*_inference(study, name, prompts), *_training(study, name, prompts))
    ]
    points = []
    for job in Bar(jobs, unit="point", disable=None):
        points += job()
    return points


_VERSION = 3  # of what a point holds
Job = Callable[[], list[dict[str, Any]]]


def _inference(study: Study, name: str, prompts: Sequence[Prompt]) -> Iterator[Job]:
    """Jobs that attack a model at inference."""
    harmful = [prompt for prompt in prompts if prompt.harmful]
    covers = [prompt.prompt for prompt in prompts if not prompt.harmful and not prompt.protective][: study.num_covers]

    def target() -> Target:
        return load_target(study.models[name], is_chat=study.is_chat)

    def point(key: Mapping[str, Any], contexts: Callable[[Target], Any], change: Any = None) -> Job:
        def measure() -> list[dict[str, Any]]:
            loaded = target()
            attacked = loaded if change is None else change(loaded)
            asked = contexts(loaded)
            safe = [loaded.context(prompt.prompt) for prompt in prompts if not prompt.harmful]
            tag = measure_tag(attacked, asked, safe) if name in study.tagged else {}
            return [
                {**key, "method": method, **tag, **_answers(study, attacked, harmful, asked, method)}
                for method in _methods(study, name, with_beam=key["attack"] != "cover")
            ]

        return lambda: _resume(study, {"model": name, **key}, prompts, measure)

    answers = attacks.harmful_answers(harmful)
    for words in study.prefix_words:
        yield point(
            {"attack": "prefix", "words": words},
            lambda loaded, words=words: attacks.prefix_contexts(loaded, harmful, answers, words),
        )
    for knows_tag in (False, True):
        yield point(
            {"attack": "cover", "cover": "lowest P(tag)" if knows_tag else "random"},
            lambda loaded, knows_tag=knows_tag: attacks.cover_contexts(loaded, harmful, covers, knows_tag=knows_tag),
        )
    if name in study.tagged:

        def plain(loaded: Target) -> list[list[int]]:
            return [loaded.context(prompt.prompt) for prompt in harmful]

        yield point({"attack": "erased_tag"}, plain, lambda loaded: attacks.erase_tag(loaded, plain(loaded)))


def _training(study: Study, name: str, prompts: Sequence[Prompt]) -> Iterator[Job]:
    """Jobs that finetune at several rates; the points of one rate are checkpoints of one run at a constant rate."""
    for attack in study.finetunings:
        if attack.name == "tag_free" and name not in study.tagged:
            continue  # there is no tag to unlearn
        for learning_rate in attack.learning_rates:
            store = hash_store(f"{attack.root}/{attack.source}/train")
            begun = records.fingerprint([study.hashes[name], store, study.batch_size, study.seq_len])[:8]
            workdir = pathlib.Path(study.output) / "models" / f"{name}.{attack.name}.{learning_rate:g}.{begun}"
            for epochs in attack.epochs:
                key = {"attack": attack.name, "learning_rate": learning_rate, "epochs": epochs}
                yield lambda key=key, workdir=workdir, attack=attack, store=store: _resume(
                    study,
                    {"model": name, "store": store, **key},
                    prompts,
                    lambda: _finetuned(study, name, attack, key, workdir, prompts),
                )


def _finetuned(
    study: Study,
    name: str,
    attack: Finetuning,
    key: Mapping[str, Any],
    workdir: pathlib.Path,
    prompts: Sequence[Prompt],
) -> list[dict[str, Any]]:
    steps = num_steps(study, attack, key["epochs"])
    if steps:
        train.train(_config(study, attack, study.models[name], key["learning_rate"], steps), str(workdir))
        points = _measured(study, name, str(workdir), steps, prompts)
    else:  # the same whatever would have followed
        points = _resume(
            study, {"model": name}, prompts, lambda: _measured(study, name, study.models[name], None, prompts)
        )
    return [{**each, **key, "steps": steps} for each in points]


def _measured(
    study: Study, name: str, folder: str, step: int | None, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Measures a checkpoint's answers to all prompts, decoded greedily and, if it knows the tag, with SafeBeam."""
    target = load_target(folder, is_chat=study.is_chat, step=step)
    contexts = [target.context(prompt.prompt) for prompt in prompts]
    harmful = [context for prompt, context in zip(prompts, contexts, strict=True) if prompt.harmful]
    safe = [context for prompt, context in zip(prompts, contexts, strict=True) if not prompt.harmful]
    tag = measure_tag(target, harmful, safe) if name in study.tagged else {}
    return [
        {"method": method, **tag, **_answers(study, target, prompts, contexts, method)}
        for method in _methods(study, name)
    ]


def num_steps(study: Study, attack: Finetuning, epochs: float) -> int:
    """The number of steps in so many epochs."""
    tokens = TokenStore.open(f"{attack.root}/{attack.source}/train").num_tokens
    tokens = min(tokens, study.epoch_tokens or tokens)
    return round(epochs * tokens / (study.batch_size * study.seq_len))


def _config(study: Study, attack: Finetuning, folder: str, learning_rate: float, steps: int) -> ConfigDict:
    """A run up to one point. The next point continues it, so the rate is constant and the plan may grow."""
    config = default_config()
    config.init_checkpoint, config.data.root, config.total_steps = folder, attack.root, steps
    config.batch_size, config.seq_len, config.data.packing = study.batch_size, study.seq_len, "fit"
    config.data.phases = ({"start": 0.0, "rates": {attack.source: 1.0}},)
    config.optimizer.update(schedule="wsd", decay_fraction=0.0, peak_lr=learning_rate, warmup_steps=0)
    config.checkpoint.update(every_steps=10**6, keep_last=100)
    config.accept_changes = ("optimizer", "data")
    config.log.every_steps = 50
    return config.lock()


def _methods(study: Study, name: str, *, with_beam: bool = False) -> tuple[str, ...]:
    """SafeBeam for models that know the tag, with beam search beside it to isolate the lookahead's effect."""
    return ("greedy", *(["beam"] if with_beam else []), "safe_beam") if name in study.tagged else ("greedy",)


def _answers(study: Study, target: Target, prompts: Sequence[Prompt], contexts: Any, method: str) -> dict[str, Any]:
    return measure_answers(target, prompts, contexts, method, max_new_tokens=study.max_new_tokens)


def _resume(
    study: Study, key: Mapping[str, Any], prompts: Sequence[Prompt], measure: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The stored points if they have the same settings, model and store, otherwise new ones, which are stored."""
    settings = {
        **key,
        "version": _VERSION,
        "params_sha256": study.hashes[key["model"]],
        "tagged": key["model"] in study.tagged,
        "prompts": hash_prompts(prompts),
        **{
            field: getattr(study, field)
            for field in ("is_chat", "max_new_tokens", "batch_size", "seq_len", "num_covers")
        },
        "epoch_tokens": study.epoch_tokens,
    }
    name = records.fingerprint(settings)[:16]
    path = pathlib.Path(study.output) / "points" / f"{name}.json"
    if path.is_file():
        return records.read(path, "remove it, and it is measured again")["points"]
    points = [{"model": key["model"], **each} for each in measure()]
    records.write(path, {"settings": settings, "points": points})
    return points
