"""Rates, differences and orderings of a study's rows, from all measurements so far.

A rate is the mean over seeds and prompts. Models answer the same prompts, so differences of two rows are paired. Both
another training and another prompt would change a rate, so intervals and p-values are those of `safelm.stats.crossed`.
All orderings of a stage are tested on the same models, so verdicts are corrected by Holm over them. An ordering with
one seed has no verdict, since nothing tells how far another training would lie.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from safelm.ladder.jobs import read_done
from safelm.ladder.plan import chosen_models, measured, study_of
from safelm.stats import crossed
from safelm.stats.comparison import holm
from safelm.stats.intervals import Estimate

ALPHA = 0.05
ONE_SEED = "one seed"  # in place of a verdict
Counts = Mapping[int, Float[np.ndarray, " P"]]  # of every seed, a number a prompt: such as 1 where the measure holds
Found = Mapping[tuple[str, str, str], Counts]  # by (cell, stage, measure)
Values = Callable[[Mapping[str, Any]], Mapping[str, Float[np.ndarray, " P"]]]


def collect(config: ConfigDict, output: pathlib.Path, values: Values) -> Found:
    """(cell, stage, measure) -> the values of every finished seed.

    Args:
      values: of a measurement's result, the numbers of every measure, prompt by prompt.

    Raises ValueError for measurements of a cell with different prompts or judges.
    """
    names, study = {model.name for model in chosen_models(config.models)}, study_of(config)
    found: dict[tuple[str, str, str], dict[int, Any]] = {}
    for cell in (cell for cell in study.cells if cell.model in names and cell.method in config.methods):
        for stage in study.stages:
            jobs = {seed: measured(seed, cell.model, stage, cell.method) for seed in config.seeds}
            results = {
                seed: result for seed, job in jobs.items() if job is not None and (result := read_done(output, job))
            }
            if len({(result["prompts_sha256"], result["judge"]) for result in results.values()}) > 1:
                raise ValueError(f"{output}: {cell.name} at {stage} was measured with different prompts or judges")
            for seed, result in results.items():
                for name, value_P in values(result).items():
                    found.setdefault((cell.name, stage, name), {})[seed] = value_P
    return found


def estimate(counts: Counts, less: Counts | None = None) -> Estimate:
    """The mean, or the mean difference of two rows over their common seeds, with a 95% interval over seeds and prompts.

    A single seed has no spread, so its interval covers prompts only.
    """
    value_SP = differences(counts, less)
    rows = (counts,) if less is None else (counts, less)
    if not all(((value_P >= 0) & (value_P <= 1)).all() for row in rows for value_P in row.values()):
        return crossed.mean(value_SP)
    return crossed.rate(value_SP) if less is None else crossed.difference(value_SP)


def p_value(counts: Counts, less: Counts) -> float:
    """Two-sided p-value of no difference. Raises ValueError for fewer than two common seeds."""
    return crossed.p_value(differences(counts, less))


def differences(counts: Counts, less: Counts | None) -> Float[np.ndarray, "S P"]:
    """A row's values, or the paired differences of two rows, over their common seeds and all prompts."""
    common = [seed for seed in counts if less is None or seed in less]
    return np.stack([counts[seed] - (0.0 if less is None else less[seed]) for seed in common])


def verdict(difference: float, holm_p_value: float) -> str:
    """The verdict on an ordering, from (should be lower - should be higher) and its corrected p-value."""
    if holm_p_value >= ALPHA:
        return "open"
    return "holds" if difference < 0 else "reversed"


def pairs(
    found: Found, asked: Sequence[tuple[str, str, str]], stage: str, measure: str, least_seeds: int = 1
) -> dict[tuple[str, str, str], tuple[Counts, Counts]]:
    """The orderings whose rows have so many common seeds at a stage, with the values of both rows."""
    both = {names: tuple(found.get((name, stage, measure), {}) for name in names[:2]) for names in asked}
    return {names: (low, high) for names, (low, high) in both.items() if len(low.keys() & high.keys()) >= least_seeds}


def orderings(found: Found, asked: Sequence[tuple[str, str, str]], stage: str, measure: str) -> list[dict[str, Any]]:
    """The orderings that a stage has measured, with p-values corrected for the number of those that can be tested."""
    tested = pairs(found, asked, stage, measure, least_seeds=2)
    p_values = {_name(names): p_value(*pair) for names, pair in tested.items()}
    adjusted = holm(p_values)
    rows = []
    for names, pair in pairs(found, asked, stage, measure).items():
        difference, corrected = estimate(*pair), adjusted.get(_name(names))
        rows.append(
            dict(zip(("lower", "higher", "claim"), names, strict=True))
            | {"stage": stage, "difference": dataclasses.asdict(difference)}
            | {"p_value": p_values.get(_name(names)), "holm_p_value": corrected}
            | {"verdict": ONE_SEED if corrected is None else verdict(difference.value, corrected)}
        )
    return rows


def p_text(row: Mapping[str, Any]) -> str:
    """An ordering's corrected p-value as a table shows it; "" of one seed."""
    return "" if row["holm_p_value"] is None else f"{row['holm_p_value']:.3f}"


def _name(names: Sequence[str]) -> str:
    return " < ".join(names[:2])


def as_dict(counts: Counts) -> dict[str, Any]:
    """The estimate and the mean of every seed."""
    by_seed = {str(seed): round(float(values.mean()), 4) for seed, values in counts.items()}
    return dataclasses.asdict(estimate(counts)) | {"by_seed": by_seed}
