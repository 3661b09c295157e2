"""Results as a table, JSON, Markdown and a figure; every file appears whole or not at all."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.evaluation.whole_files import write_whole

RATES = {  # result field -> column
    "harmful_completion": "harmful completion",
    "declined_harmful": "refused or redirected",
    "neither_harmful": "neither (harmful prompts)",
    "wrongly_refused": "wrongly refused safe",
    "answered_safe": "answered safe",
}


def table_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The header and one row for each (checkpoint, method); every rate with its 95% interval, in percent."""
    rows = [["checkpoint", "method", *RATES.values(), "perplexity", "AUROC mean P(tag)", "AUROC last P(tag)"]]
    for run in results["runs"]:
        model = results["models"][run["checkpoint"]]
        held_out = model.get("perplexity")
        rows.append(
            [
                run["checkpoint"],
                run["method"],
                *(_percent(run[field]) for field in RATES),
                f"{held_out['perplexity']:.2f}" if held_out else "-",
                *(_interval(model["tag_separation"][where]) for where in ("mean", "last")),
            ]
        )
    return rows


def format_table(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Rows as aligned text, or as a Markdown table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if not markdown:
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|" + " --- |" * len(rows[0]), *body])


def write_report(output: str, results: Mapping[str, Any]) -> list[pathlib.Path]:
    """Writes `results.json`, `results.md` and `results.png` into `output`; returns their paths."""
    folder = pathlib.Path(output)
    return [
        write_whole(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n")),
        write_whole(folder / "results.md", lambda path: path.write_text(_markdown(results))),
        write_whole(folder / "results.png", lambda path: _draw(path, results)),
    ]


def _percent(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['value']:.1f}% [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _markdown(results: Mapping[str, Any]) -> str:
    judge = results["judge"]
    accuracy = ", ".join(
        f"{name.replace('_', ' ')} {_percent(judge[name])}" for name in judge if isinstance(judge[name], Mapping)
    )
    return f"""# Evaluation: {results["suite"]}

{format_table(table_rows(results), markdown=True)}

Rates with Wilson 95% intervals, AUROC with DeLong's. {results["num_prompts"]["harmful"]} harmful and
{results["num_prompts"]["safe"]} safe held-out prompts, at most {results["max_new_tokens"]} new tokens. Text, topics and
harm are synthetic (`safelm.synthetic_web`): the numbers say how the mechanism works on this corpus and nothing about
safety elsewhere. "Neither" counts harmful prompts whose continuation is neither harmful, nor a refusal or a turn to
why it harms, nor a harmless page: it is not counted as safe. P(tag) means nothing for a model that never saw the tag.

Judge `{judge["version"]}` on documents of known label and held-out topics, {judge["num_words"]} words each:
{accuracy}.
"""


def _draw(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = results["runs"]
    panels = {
        "Harmful completions of harmful prompts": ("harmful_completion", "#b3423a"),
        "Refused or redirected harmful prompts": ("declined_harmful", "#3b7a57"),
        "Wrongly refused safe prompts": ("wrongly_refused", "#c08a2d"),
    }
    figure = Figure(figsize=(4.0 * len(panels), 1.4 + 0.5 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    names = [f"{run['checkpoint']}, {run['method']}" for run in runs]
    for axis, (title, (field, color)) in zip(axes, panels.items(), strict=True):
        values = [100 * run[field]["value"] for run in runs]
        below = [100 * (run[field]["value"] - run[field]["low"]) for run in runs]
        above = [100 * (run[field]["high"] - run[field]["value"]) for run in runs]
        axis.barh(names, values, xerr=[below, above], color=color, ecolor="#333333", capsize=3, height=0.6)
        axis.set(title=title, xlim=(0, 100), xlabel="% of prompts, 95% interval")
        axis.title.set_fontsize("medium")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=150, metadata={"Software": None})
