"""Writes results on the synthetic web as a table, JSON, Markdown and a picture; every file is written atomically."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safelm.evaluate.comparing import figures
from safelm.evaluate.comparing.tables import read_off
from safelm.evaluate.outcomes import OUTCOMES
from safelm.io.files import write_whole
from safelm.report import charts
from safelm.report.charts import WARM
from safelm.report.table import Table, share, words
from safelm.stats.intervals import Estimate

RATES = {  # result field -> column; the first four add up to 100%
    "harmful_completion": "harmful completions, %",
    "neither_harmful": "neither, %",
    "declined_harmful": "refused or redirected, %",
    "page_on_harmful": "harmless page, %",
    "wrongly_refused": "wrongly refused safe, %",
    "answered_safe": "answered safe, %",
}


def results_table(results: Mapping[str, Any]) -> Table:
    """One row per (checkpoint, method); every rate has its 95% interval."""
    heads = ["model, decoding", *RATES.values(), "perplexity", "AUROC P(tag), mean", "AUROC P(tag), last token"]
    rows = []
    for run in results["runs"]:
        model = results["models"][run["checkpoint"]]
        rows.append([words(_name(run)), *(share(run[field]) for field in RATES), *read_off(model)])
    return Table("", heads, rows)


def write_report(output: str, results: Mapping[str, Any]) -> list[pathlib.Path]:
    """Writes `results.json`, `results.md` and `results.png` into `output`; returns their paths."""
    folder = pathlib.Path(output)
    return [
        write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n"),
        write_whole(folder / "results.md", _markdown(results)),
        write_whole(folder / "results.png", lambda path: _draw(path, results)),
    ]


def _name(run: Mapping[str, Any]) -> str:
    return f"{run['checkpoint']}, {run['method']}"


def _markdown(results: Mapping[str, Any]) -> str:
    judge = results["judge"]
    accuracy = ", ".join(
        f"{name.replace('_', ' ')} {share(judge[name])}" for name in judge if isinstance(judge[name], Mapping)
    )
    return f"""# Evaluation: {results["suite"]}

{headline(results)}

{results_table(results).markdown()}

95% intervals: of rates Wilson's, wider where prompts of a category agree; of AUROC DeLong's.
{results["num_prompts"]["harmful"]} harmful and {results["num_prompts"]["safe"]} safe held-out prompts, at most
{results["max_new_tokens"]} new tokens. Text, topics and
harm are synthetic (`safelm.synthetic_web`): the numbers say how the mechanism works on this corpus and nothing about
safety elsewhere. "Neither" counts harmful prompts whose continuation is neither harmful, nor a refusal or a turn to
why it harms, nor a harmless page: it is not counted as safe. P(tag) means nothing for a model that never saw the tag.

Judge `{judge["version"]}` on documents of known label and held-out topics, {judge["num_words"]} words each, %:
{accuracy}.
"""


def headline(results: Mapping[str, Any]) -> str:
    """One sentence with the highest and lowest rate of harmful completions."""
    runs = sorted(results["runs"], key=lambda run: run["harmful_completion"]["value"])
    most, least = (f"{100 * run['harmful_completion']['value']:.0f}% ({_name(run)})" for run in (runs[-1], runs[0]))
    return f"Harmful completions: {most}" + ("." if len(runs) == 1 else f" down to {least}.")


def _draw(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    runs = results["runs"]
    names = [_name(run) for run in runs]
    found = [{name: Estimate(**run[field]) for name, field in zip(OUTCOMES, list(RATES), strict=False)} for run in runs]
    prompts = results["num_prompts"]

    def draw(drawn: Any) -> None:
        drawn.suptitle(headline(results), x=0.01, ha="left", fontsize=14, fontweight="bold")
        left, right = drawn.subplots(1, 2, width_ratios=[5, 3])
        figures.draw_outcomes(left, names, found)
        charts.heading(left, f"Answers to {prompts['harmful']} harmful prompts", lines=1)
        figures.draw_rates(right, names, [Estimate(**run["wrongly_refused"]) for run in runs], WARM)
        right.set_yticklabels([])
        charts.heading(right, f"Wrongly refused of {prompts['safe']} safe prompts", lines=1)

    charts.save_png(path, draw, 12.5, 2.4 + 0.5 * len(runs))
