"""Rates, differences and orderings of a study's rows, from all measurements so far.

A rate is the mean over seeds and prompts. Its interval, and that of a difference of two rows, comes from a bootstrap
that draws seeds and prompts independently, both with replacement, 2,000 times (Owen 2007, the pigeonhole bootstrap):
models answer the same prompts, so differences are paired, and both another training and another prompt would change a
rate. The interval is conservative and, with three seeds, rough. All orderings of a stage are tested on the same models,
so verdicts use p-values from the same draws, corrected by Holm over them.
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
from safelm.stats.bootstrap import crossed_means, percentile_interval
from safelm.stats.comparison import holm
from safelm.stats.intervals import Estimate, rate

_DRAWS, ALPHA = 2000, 0.05
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

    A single seed has no spread, so its interval covers prompts only: Wilson's, for a rate. Values that are no counts,
    such as shares of a prompt's samples, vary less than Wilson's interval supposes, so then a bootstrap alone is taken.
    """
    values_SP = differences(counts, less)
    mean, prompts = float(values_SP.mean()), values_SP.shape[1]
    is_counted = bool(np.isin(values_SP, (0.0, 1.0)).all())
    if less is None and len(values_SP) == 1 and is_counted:
        return rate(round(values_SP.sum()), values_SP.size)
    low, high = percentile_interval(crossed_means(values_SP, _DRAWS))
    if less is not None and not values_SP.any():  # no pair differs, which with more prompts some would
        high = rate(0, prompts).high
        low = -high
    if less is None and is_counted:  # never narrower than Wilson's over prompts: at 0 or 1 a bootstrap sees no spread
        wilson = rate(round(values_SP.mean(0).sum()), prompts)
        low, high = min(low, wilson.low), max(high, wilson.high)
    return Estimate(mean, min(low, mean), max(high, mean), values_SP.size)


def p_value(counts: Counts, less: Counts) -> float:
    """Two-sided p-value of no difference: twice the share of `estimate`'s draws beyond 0, at least one draw."""
    means_D = crossed_means(differences(counts, less), _DRAWS)
    return min(1.0, 2 * (int(min((means_D <= 0).sum(), (means_D >= 0).sum())) + 1) / (_DRAWS + 1))


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
    """The orderings that a stage can test, with the values of both rows."""
    both = {names: tuple(found.get((name, stage, measure), {}) for name in names[:2]) for names in asked}
    return {names: (low, high) for names, (low, high) in both.items() if len(low.keys() & high.keys()) >= least_seeds}


def orderings(found: Found, asked: Sequence[tuple[str, str, str]], stage: str, measure: str) -> list[dict[str, Any]]:
    """The orderings that a stage can test, with p-values corrected for their number."""
    tested = pairs(found, asked, stage, measure)
    p_values = {" < ".join(names[:2]): p_value(*pair) for names, pair in tested.items()}
    adjusted = holm(p_values)
    rows = []
    for names, pair in tested.items():
        difference, ordering = estimate(*pair), " < ".join(names[:2])
        rows.append(
            dict(zip(("lower", "higher", "claim"), names, strict=True))
            | {"stage": stage, "difference": dataclasses.asdict(difference)}
            | {"p_value": p_values[ordering], "holm_p_value": adjusted[ordering]}
            | {"verdict": verdict(difference.value, adjusted[ordering])}
        )
    return rows


def as_dict(counts: Counts) -> dict[str, Any]:
    """The estimate and the mean of every seed."""
    by_seed = {str(seed): round(float(values.mean()), 4) for seed, values in counts.items()}
    return dataclasses.asdict(estimate(counts)) | {"by_seed": by_seed}
