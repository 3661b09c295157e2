"""A scaling law of safety: how rates move with a model's parameters and its tokens, and what that says of a larger one.

Four sizes are trained with three budgets each. The law is linear on the logit scale,

    logit(rate) = intercept + by_size * log10(parameters) + by_tokens * log10(tokens) + noise,

fitted by least squares to the rates of all runs (shrunk by half a prompt from 0 and 1; AUROCs as they are, between .001
and .999). Its intervals are Student's: they cover the noise between runs, whatever its cause, and that few runs are
known. The rates of a fifth, larger size are predicted before it is trained (`predictions.json` is written first and
never again), and then run. *Coverage* says how many runs fall into their 95% prediction interval: of the fifth size,
and of each of the four when the law is fitted to the others.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
from jaxtyping import Float
from ml_collections import ConfigDict

from safelm.io.files import write_whole
from safelm.ladder.estimates import Found
from safelm.ladder.jobs import read_done
from safelm.ladder.plan import SCALING, chosen_models, measured, trained
from safelm.models.config import ModelConfig
from safelm.report import table
from safelm.stats.intervals import Estimate, rate
from safelm.text.tokenizer import Tokenizer

AUROC = "P(tag) AUROC"
PREDICTIONS = "predictions.json"
_EDGE = 1e-3
_LEAST_FREE = 2  # runs beyond the law's three numbers


@dataclasses.dataclass(frozen=True)
class Run:
    """A measured model: its size, its budget, and a rate of `cases` prompts (0: a number that is no count)."""

    parameters: int
    tokens: int
    seed: int
    value: float
    cases: int

    @property
    def logit(self) -> float:
        """The rate on the law's scale."""
        if self.cases:
            count = self.value * self.cases
            return math.log((count + 0.5) / (self.cases - count + 0.5))
        return float(scipy.special.logit(min(max(self.value, _EDGE), 1 - _EDGE)))

    @property
    def row(self) -> tuple[float, float, float]:
        """What the law's numbers are multiplied by."""
        return 1.0, math.log10(self.parameters), math.log10(self.tokens)


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
      numbers: intercept, by_size and by_tokens (logits a factor of ten).
      spread: standard deviation of a run around the law, in logits; `freedom`: the degrees of freedom it has.
      inverse: of the design's cross product.
    """

    numbers: Float[np.ndarray, "3"]
    spread: float
    freedom: int
    inverse: Float[np.ndarray, "3 3"]

    def predict(self, run: Run) -> tuple[float, float, float]:
        """The rate of a new run with its 95% prediction interval."""
        row = np.array(run.row)
        width = scipy.stats.t.ppf(0.975, self.freedom) * self.spread * math.sqrt(1 + row @ self.inverse @ row)
        centre = float(row @ self.numbers)
        value, low, high = (float(scipy.special.expit(centre + shift)) for shift in (0, -width, width))
        return value, low, high

    def slopes(self) -> dict[str, tuple[float, float, float]]:
        """by_size and by_tokens with 95% intervals."""
        half = scipy.stats.t.ppf(0.975, self.freedom) * self.spread * np.sqrt(np.diag(self.inverse))
        names = {"by_size": 1, "by_tokens": 2}
        return {
            name: tuple(float(self.numbers[i] + sign * half[i]) for sign in (0, -1, 1)) for name, i in names.items()
        }


def fit(runs: Sequence[Run]) -> Law:
    """The law of some runs. Raises ValueError for too few, or for runs of one size or one budget."""
    rows = np.array([run.row for run in runs])
    if len(runs) < 3 + _LEAST_FREE or np.linalg.matrix_rank(rows) < 3:
        raise ValueError(f"{len(runs)} runs: the law needs {3 + _LEAST_FREE} of two sizes and two budgets at least")
    logits = np.array([run.logit for run in runs])
    inverse = np.linalg.inv(rows.T @ rows)
    numbers = inverse @ rows.T @ logits
    freedom = len(runs) - 3
    spread = math.sqrt(float(((logits - rows @ numbers) ** 2).sum()) / freedom)
    return Law(numbers, spread, freedom, inverse)


def coverage(runs: Sequence[Run]) -> Estimate:
    """The share of runs in the prediction interval of a law fitted to the other sizes (Wilson's interval)."""
    inside = 0
    for size in {run.parameters for run in runs}:
        law = fit([run for run in runs if run.parameters != size])
        inside += sum(_covers(law.predict(run), run) for run in runs if run.parameters == size)
    return rate(inside, len(runs))


def _covers(prediction: Sequence[float], run: Run) -> bool:
    return bool(prediction[1] <= scipy.special.expit(run.logit) <= prediction[2])


def collect_runs(config: ConfigDict, output: pathlib.Path, found: Found) -> dict[str, list[Run]]:
    """The runs of every measure."""
    runs: dict[str, list[Run]] = {}
    stage = SCALING.stages[0]
    for (cell, _, measure), counts in found.items():
        for seed, value_P in counts.items():
            job = measured(seed, cell, stage, SCALING.methods[0])
            facts = read_done(output, job) if job else None
            work = read_done(output, trained(seed, cell, stage))
            if facts is None or work is None:
                continue
            cases = 0 if measure == AUROC else len(value_P)
            run = Run(facts["parameters"], work["tokens"], seed, float(value_P.mean()), cases)
            runs.setdefault(measure, []).append(run)
    return runs


def values(result: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " n"]]:
    """P(tag)'s AUROC of a measurement."""
    return {AUROC: np.array([result["tag_auroc"]])}


def predict(config: ConfigDict, output: pathlib.Path, found: Found) -> None:
    """Writes the predictions for the held-out size, unless they stand; none of its models may have been measured.

    Raises ValueError if one has.
    """
    if (output / PREDICTIONS).exists():
        return
    held_out = [model.name for model in chosen_models(config.models) if model.name not in SCALING.first]
    if early := [cell for cell, *_ in found if cell in held_out]:
        raise ValueError(f"{output}: {early[0]} was measured before it was predicted")
    vocabulary, pretraining = Tokenizer.from_pretrained(str(output / "tokenizer")), config.stages[SCALING.stages[0]]
    parameters = ModelConfig(vocab_size=vocabulary.vocab_size, **config.sizes[-1]).num_params
    budgets = [pretraining.batch_size * pretraining.seq_len * steps for steps in config.budgets]
    laws = {}
    for measure, runs in collect_runs(config, output, found).items():
        law = fit(runs)
        ahead = {str(tokens): law.predict(Run(parameters, tokens, 0, 0.5, 0)) for tokens in budgets}
        laws[measure] = {"slopes": law.slopes(), "spread": law.spread, "runs": len(runs), "predicted": ahead}
    write_whole(output / PREDICTIONS, json.dumps({"parameters": parameters, "laws": laws}, indent=1) + "\n")


def summarize(config: ConfigDict, output: pathlib.Path, found: Found) -> dict[str, Any]:
    """The runs, the laws, their coverage, and how the predictions fared, as a JSON object."""
    known = {cell for cell, *_ in found if cell in SCALING.first}
    runs = collect_runs(config, output, {key: value for key, value in found.items() if key[0] in known})
    ahead = collect_runs(config, output, {key: value for key, value in found.items() if key[0] not in known})
    path = output / PREDICTIONS
    predicted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"laws": {}}
    laws = {}
    for measure, of_measure in runs.items():
        entry: dict[str, Any] = {"runs": [dataclasses.asdict(run) for run in of_measure]}
        try:
            law = fit(of_measure)
            entry |= {"slopes": law.slopes(), "spread": law.spread}
            entry["coverage"] = dataclasses.asdict(coverage(of_measure))
        except ValueError:
            pass  # too few so far
        said = predicted["laws"].get(measure, {}).get("predicted", {})
        later = [run for run in ahead.get(measure, []) if str(run.tokens) in said]
        entry["held_out"] = [{**dataclasses.asdict(run), "predicted": said[str(run.tokens)]} for run in later]
        entry["held_out_covered"] = sum(_covers(said[str(run.tokens)], run) for run in later)
        laws[measure] = entry
    return {"study": SCALING.name, "laws": laws}


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The laws, and the held-out size beside what was predicted of it."""
    rows, later = [], []
    for measure, entry in summary["laws"].items():
        slopes = [_shown(entry.get("slopes", {}).get(name)) for name in ("by_size", "by_tokens")]
        covered = entry.get("coverage")
        share = f"{covered['value']:.2f} [{covered['low']:.2f}, {covered['high']:.2f}]" if covered else ""
        told = f"{entry['held_out_covered']} of {len(entry['held_out'])}" if entry["held_out"] else "not run yet"
        rows.append((measure, len(entry["runs"]), *slopes, share, told))
        later += [(measure, *_beside(run)) for run in entry["held_out"]]
    heads = (
        "measure",
        "runs",
        "logits a tenfold size",
        "a tenfold budget",
        "coverage, a size left out",
        "held-out size",
    )
    parts = [table.markdown(heads, rows)]
    if later:
        parts.append(table.markdown(("measure", "parameters", "tokens", "seed", "predicted", "found"), later))
    return "\n\n".join(parts) + "\n"


def _beside(run: Mapping[str, Any]) -> tuple[object, ...]:
    sizes = f"{run['parameters']:,}", f"{run['tokens']:,}"
    return *sizes, run["seed"], _shown(run["predicted"]), f"{run['value']:.3f}"


def _shown(values: Sequence[float] | None) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values) if values else ""


def write(config: ConfigDict, output: pathlib.Path, found: Found) -> None:
    """Writes results.json and results.md into the study's folder."""
    summary = summarize(config, output, found)
    write_whole(output / "results.json", json.dumps(summary, indent=1) + "\n")
    write_whole(output / "results.md", to_markdown(summary))
