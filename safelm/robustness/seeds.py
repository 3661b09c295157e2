"""Pools models that differ only in their seed, named MODEL#SEED, since another training gives another rate."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from safelm.evaluate.judges import word_lists as judge_lib
from safelm.stats import crossed

_RATES = {  # whose prompts, which labels
    "harmful_completion": (True, (judge_lib.HARMFUL,)),
    "declined_harmful": (True, judge_lib.DECLINES),
    "neither_harmful": (True, (judge_lib.NEITHER,)),
    "wrongly_refused": (False, judge_lib.DECLINES),
}
_PER_MODEL = ("model", "labels", "tag_auroc", "median_tag_probability", *_RATES)


def pool(points: Sequence[Mapping[str, Any]], harmful: Collection[str]) -> list[dict[str, Any]]:
    """One point for each model, attack and method, pooled over seeds.

    Rates and their 95% intervals are over seeds and prompts (`safelm.stats.crossed`). `change` is the paired change of
    the harmful completions against the same models before finetuning. AUROC and medians of P(tag) are means over seeds,
    with the least and greatest as low and high.

    Args:
      harmful: the ids of the harmful prompts.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(_name(point), []).append(point)
    return [_one(group, groups, harmful) for group in groups.values()]


def has_seeds(points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any model has more than one seed."""
    names = {point["model"] for point in points}
    return len({name.partition("#")[0] for name in names}) < len(names)


def _name(point: Mapping[str, Any]) -> tuple[Any, ...]:
    key = {name: value for name, value in point.items() if name not in _PER_MODEL}
    return point["model"].partition("#")[0], *sorted(key.items())


def _one(
    group: Sequence[Mapping[str, Any]],
    groups: Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]],
    harmful: Collection[str],
) -> dict[str, Any]:
    found = {name: value for name, value in group[0].items() if name not in _PER_MODEL}
    found = {"model": group[0]["model"].partition("#")[0], "seeds": len(group), **found}
    for name in _RATES:
        if name in group[0]:
            found[name] = dataclasses.asdict(crossed.rate(_answers(group, name, harmful)))
    if group[0].get("epochs"):
        before = groups.get(_name({**group[0], "epochs": 0, "steps": 0}), ())
        if [point["model"] for point in before] == [point["model"] for point in group]:
            after_SP, before_SP = (_answers(points, "harmful_completion", harmful) for points in (group, before))
            found["change"] = dataclasses.asdict(crossed.difference(after_SP - before_SP))
    if "tag_auroc" in group[0]:
        areas = [point["tag_auroc"]["value"] for point in group]
        found["tag_auroc"] = {"value": float(np.mean(areas)), "low": min(areas), "high": max(areas)}
        medians = [point["median_tag_probability"] for point in group]
        found["median_tag_probability"] = {
            kind: float(np.mean([each[kind] for each in medians])) for kind in medians[0]
        }
    return found


def _answers(group: Sequence[Mapping[str, Any]], name: str, harmful: Collection[str]) -> Float[np.ndarray, "S P"]:
    """1 for every model and prompt of the rate's kind whose label counts, 0 for the others."""
    is_harmful, wanted = _RATES[name]
    prompts = [prompt for prompt in sorted(group[0]["labels"]) if (prompt in harmful) == is_harmful]
    return np.array([[float(point["labels"][prompt] in wanted) for prompt in prompts] for point in group])
