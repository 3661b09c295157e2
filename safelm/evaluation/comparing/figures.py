"""A comparison as figures; every value with its 95% interval, every seed as a dot where there are several.

`stages` is the paper's figure 2, `ladder` its figure 4, `frontier` attack success against over-refusal.
"""

import pathlib
from collections.abc import Callable
from typing import Any

from safelm.evaluation.comparing.results import ATTACK, REFUSAL, Column, Comparison, Row
from safelm.evaluation.comparing.tables import name_of

# Distinct for the colour-blind (Okabe and Ito), repeated with another hatch.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6a6d75")
_HATCHES = ("", "///", "...", "xxx")
_MARKERS = "osD^vP*X"


def draw_all(folder: pathlib.Path, comparison: Comparison, write: Callable[..., Any]) -> dict[str, pathlib.Path]:
    """Draws what the comparison has data for, by name; `write` is `whole_files.write_whole`."""
    wanted: dict[str, Callable[[Any, Comparison], None]] = {}
    if columns := comparison.columns_with(ATTACK):
        wanted["stages"] = stages
        if len(comparison.rows) > 1:
            wanted["ladder"] = ladder
        if frontier_points(comparison, columns[-1].stage):
            wanted["frontier"] = frontier
    if comparison.columns_with(REFUSAL):
        wanted["refusals"] = refusals
    found = {}
    for name, draw in wanted.items():
        found[name] = write(folder / f"{name}.png", lambda path, draw=draw: _save(path, draw, comparison))
    return found


def stages(axis: Any, comparison: Comparison) -> None:
    """Grouped bars: attack success by stage, a bar a model."""
    _grouped(axis, comparison, ATTACK, "Attack success by stage")


def refusals(axis: Any, comparison: Comparison) -> None:
    """Grouped bars: refused safe prompts by stage."""
    _grouped(axis, comparison, REFUSAL, "Refused safe prompts by stage")


def ladder(axis: Any, comparison: Comparison) -> None:
    """A bar a model at the last stage."""
    column = comparison.columns_with(ATTACK)[-1]
    rows = [row for row in comparison.rows if comparison.cell(row, column)]
    for place, row in enumerate(rows):
        _bar(axis, comparison, row, column, ATTACK, place, 0.66, comparison.rows.index(row))
    names = [str(row).replace(" + ", "\n+ ") for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=9, rotation=0 if len(rows) < 9 else 60)
    axis.set(ylim=(0, 100), ylabel="attack success, %, 95% interval")
    axis.set_title(f"Attack success, {name_of(comparison, column)}", loc="left")


def frontier(axis: Any, comparison: Comparison) -> None:
    """Attack success against refused safe prompts at the last stage that has both; nearer to the corner is better."""
    stage = comparison.columns_with(ATTACK)[-1].stage
    for row, safe, harmful in frontier_points(comparison, stage):
        style = comparison.rows.index(row)
        axis.errorbar(
            100 * safe.value, 100 * harmful.value,
            xerr=[[100 * (safe.value - safe.low)], [100 * (safe.high - safe.value)]],
            yerr=[[100 * (harmful.value - harmful.low)], [100 * (harmful.high - harmful.value)]],
            fmt=_MARKERS[style % len(_MARKERS)], color=_COLORS[style % len(_COLORS)], capsize=3, label=str(row),
            markersize=8,
        )  # fmt: skip
    axis.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="refused safe prompts, %, 95% interval",
             ylabel="attack success, %, 95% interval")  # fmt: skip
    axis.set_title(f"Attack success against over-refusal{f', {stage}' if stage else ''}", loc="left")
    axis.legend(frameon=False, fontsize=9)


def frontier_points(comparison: Comparison, stage: str) -> list[tuple[Row, Any, Any]]:
    """(row, rate of refused safe prompts, rate of attack success) of the rows that have both at a stage."""
    found = []
    for row in comparison.rows:
        of_stage = [column for column in comparison.columns if column.stage == stage]
        rates = {
            aspect: next((rate for c in of_stage if (rate := comparison.rate(row, c, aspect)) is not None), None)
            for aspect in (REFUSAL, ATTACK)
        }
        if None not in rates.values():
            found.append((row, rates[REFUSAL], rates[ATTACK]))
    return found


def _grouped(axis: Any, comparison: Comparison, aspect: str, title: str) -> None:
    columns = comparison.columns_with(aspect)
    rows = [row for row in comparison.rows if any(comparison.rate(row, c, aspect) for c in columns)]
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        for group, column in enumerate(columns):
            place = group + (number - (len(rows) - 1) / 2) * width
            _bar(axis, comparison, row, column, aspect, place, 0.9 * width, comparison.rows.index(row))
    axis.set_xticks(range(len(columns)), [name_of(comparison, column) for column in columns])
    axis.set(ylim=(0, 100), ylabel="%, 95% interval")
    axis.set_title(title, loc="left", pad=12 + 14 * -(-len(rows) // 3))
    handles, labels = axis.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    axis.legend(by_label.values(), by_label.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False,
                fontsize=9, borderaxespad=0.2)  # fmt: skip


def _bar(
    axis: Any,
    comparison: Comparison,
    row: Row,
    column: Column,
    aspect: str,
    place: float | int,
    width: float,
    style: int,
) -> None:
    estimate = comparison.rate(row, column, aspect)
    if estimate is None:
        return
    value = 100 * estimate.value
    error = [[value - 100 * estimate.low], [100 * estimate.high - value]]
    axis.bar(place, value, width, yerr=error, color=_COLORS[style % len(_COLORS)], ecolor="#1a1b1e", capsize=3,
             hatch=_HATCHES[style // len(_COLORS) % len(_HATCHES)], edgecolor="white", label=str(row))  # fmt: skip
    seeds = comparison.by_seed(row, column, aspect)
    if len(seeds) > 1:
        axis.plot([place] * len(seeds), [100 * each for each in seeds.values()], ".", color="#1a1b1e", alpha=0.7)
    axis.annotate(f"{value:.0f}", (place, min(96, 100 * estimate.high)), ha="center", va="bottom", fontsize=8,
                  xytext=(0, 2), textcoords="offset points")  # fmt: skip


def _save(path: pathlib.Path, draw: Callable[[Any, Comparison], None], comparison: Comparison) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = len(comparison.rows) * (1 if draw is ladder else len(comparison.columns))
    size = (7.0, 6.0) if draw is frontier else (max(7.0, min(16.0, 3.0 + 0.55 * bars)), 5.0)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    draw(axis, comparison)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(axis="both" if draw is frontier else "y", color="#e9eaed")
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
