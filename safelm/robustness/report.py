"""Writes the robustness study as JSON, Markdown tables and a figure; every rate has its 95% interval."""

import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from safelm.io.files import write_whole
from safelm.report import charts, table
from safelm.robustness.seeds import has_seeds, pool

Point = Mapping[str, Any]
Panel = tuple[str, str, list[Point]]  # title, what runs to the right, the points
_RATES = {
    "harmful_completion": "harmful",
    "declined_harmful": "declined",
    "neither_harmful": "neither",
    "wrongly_refused": "wrongly refused",
    "change": "harmful, against before",
}
_HEADS = {
    "prefix": "Given first words of a harmful answer",
    "cover": "A harmless sentence before the request",
    "erased_tag": "The tag's output row erased",
    "benign": "Benign finetuning",
    "tag_free": "Finetuning on raw text without tags",
}
_KEYS = {"prefix": ("words",), "cover": ("cover",), "erased_tag": (), "benign": ("learning_rate", "epochs", "steps")}


def write_report(
    output: str, points: Sequence[Point], about: Mapping[str, Any], *, harmful: Collection[str] = ()
) -> list[pathlib.Path]:
    """Writes results.json, results.md and results.png; returns their paths.

    Models named MODEL#SEED are shown as one; results.json also has each of them.

    Args:
      about: how the study was run.
      harmful: the ids of the harmful prompts, needed for models with seeds.
    """
    folder = pathlib.Path(output)
    shown = pool(points, harmful) if has_seeds(points) else list(points)
    results = {"about": dict(about), "points": [{k: v for k, v in each.items() if k != "labels"} for each in points]}
    if shown != points:
        results["pooled"] = shown
    points, text = shown, markdown(shown, about)
    return [
        write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n"),
        write_whole(folder / "results.md", text),
        write_whole(folder / "results.png", lambda path: _draw(path, points)),
    ]


def markdown(points: Sequence[Point], about: Mapping[str, Any]) -> str:
    """One Markdown table per attack."""
    parts = ["# Robustness\n", f"{json.dumps(dict(about))}\n", _NOTE]
    for attack, head in _HEADS.items():
        if chosen := [point for point in points if point["attack"] == attack]:
            keys = ("model", *_KEYS.get(attack, _KEYS["benign"]), "method")
            parts += [f"\n## {head}\n", _table(chosen, keys)]
    return "\n".join(parts) + "\n"


_NOTE = """Synthetic text and harm; greedy decoding, beam search and SafeBeam of our own small models. 95% intervals: of
rates Wilson's, wider where prompts of a category (or answers of a seed) agree; DeLong's for the AUROC of P(tag) after
the prompt, harmful against plain safe prompts; medians of P(tag) on harmful and safe prompts. Only what a model adds to
given first words is judged. P(tag) is shown for models that know the tag; 'beam' is SafeBeam without its lookahead.
With several seeds of a model rates are over seeds and prompts, and of P(tag) the mean of the seeds with the least and
the most of them."""


def _table(points: Sequence[Point], keys: Sequence[str]) -> str:
    rates = [name for name in _RATES if any(name in point for point in points)]
    has_tag = any("tag_auroc" in point for point in points)
    heads = [*keys, *(_RATES[name] for name in rates), *(("AUROC of P(tag)", "median P(tag)") if has_tag else ())]
    rows = []
    for point in points:
        cells = [f"{point[key]:g}" if isinstance(point[key], int | float) else str(point[key]) for key in keys]
        cells += [_percent(point[name]) if name in point else "" for name in rates]
        if has_tag:
            cells += [_interval(point["tag_auroc"]), _medians(point)] if "tag_auroc" in point else ["", ""]
        rows.append(cells)
    return table.markdown(heads, rows)


def _percent(estimate: Mapping[str, Any]) -> str:
    return f"{100 * estimate['value']:.0f}% [{100 * estimate['low']:.0f}, {100 * estimate['high']:.0f}]"


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _medians(point: Point) -> str:
    return " / ".join(f"{point['median_tag_probability'][kind]:.1e}" for kind in ("harmful", "safe"))


def _draw(path: pathlib.Path, points: Sequence[Point]) -> None:
    panels: list[Panel] = []
    for attack, x in (("prefix", "words"), ("benign", "epochs"), ("tag_free", "epochs")):
        chosen = [point for point in points if point["attack"] == attack and point["method"] != "beam"]
        if chosen:
            panels.append((_HEADS[attack], x, chosen))
    columns = max(1, len(panels))
    charts.save_png(
        path, lambda figure: _draw_panels(figure.subplots(2, columns, squeeze=False), panels), 5.2 * columns, 8.4
    )


def _draw_panels(axes: Any, panels: Sequence[Panel]) -> None:
    for column, (title, x, chosen) in enumerate(panels):
        _lines(axes[0][column], chosen, x, "harmful_completion")
        axes[0][column].set(title=title, ylim=(-0.02, 1.02), ylabel="harmful completions, 95% interval", xlabel=x)
        with_tag = [point for point in chosen if "tag_auroc" in point and point["method"] == "greedy"]
        _lines(axes[1][column], with_tag, x, "tag_auroc")
        axes[1][column].set(ylim=(-0.02, 1.02), ylabel="AUROC of P(tag), 95% interval", xlabel=x)
        axes[1][column].axhline(0.5, color="#999999", linewidth=0.8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="x-small")


def _line_name(point: Point) -> str:
    rate = f", lr {point['learning_rate']:g}" if "learning_rate" in point else ""
    return f"{point['model']}, {point['method']}{rate}"


def _lines(axis: Any, points: Sequence[Point], x: str, field: str) -> None:
    for line in dict.fromkeys(map(_line_name, points)):
        of_line = sorted((point for point in points if _line_name(point) == line), key=lambda point: point[x])
        values = [point[field]["value"] for point in of_line]
        below = [point[field]["value"] - point[field]["low"] for point in of_line]
        above = [point[field]["high"] - point[field]["value"] for point in of_line]
        dashes = "--" if "safe_beam" in line else "-"
        axis.errorbar([point[x] for point in of_line], values, [below, above], label=line, capsize=2, linestyle=dashes)
