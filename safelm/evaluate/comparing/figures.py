"""Draws a comparison as charts with 95% intervals and a dot per seed if there are several.

`outcomes` shows the outcomes of harmful prompts, `stages` the paper's figure 2, `ladder` its figure 4, and `frontier`
attack success against over-refusal.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from safelm.evaluate.comparing.results import ATTACK, REFUSAL, Column, Comparison, Row
from safelm.evaluate.comparing.tables import label, name_of
from safelm.evaluate.outcomes import OUTCOMES
from safelm.io.files import write_whole
from safelm.report import charts
from safelm.report.charts import BAD, CALM, EMPTY, GOOD, GREY, INK, QUIET, WARM, Chart
from safelm.stats.intervals import Estimate

OUTCOME_COLORS: Mapping[str, str] = dict(zip(OUTCOMES, (BAD, GREY, GOOD, CALM), strict=True))
Figure = tuple[Callable[[Any, Comparison], None], float, str]


def wanted(comparison: Comparison) -> dict[str, Figure]:
    """The charts that the comparison has data for: drawing function, height in inches, description."""
    found: dict[str, Figure] = {}
    if columns := comparison.columns_with(ATTACK):
        found["outcomes"] = (outcomes, _height(comparison, columns), "What became of harmful prompts, a bar a model.")
        if len(columns) > 1:
            found["stages"] = (stages, _height(comparison, columns), "Attack success by stage and model.")
            if len(comparison.rows) > 1:
                found["ladder"] = (ladder, _height(comparison, columns[-1:]), "Attack success at the last stage.")
        if len(frontier_points(comparison, columns[-1].stage)) > 1:
            found["frontier"] = (frontier, 4.4, "Attack success against refused safe prompts, a point a model.")
    if columns := comparison.columns_with(REFUSAL):
        found["refusals"] = (refusals, _height(comparison, columns), "Refused safe prompts by stage and model.")
    return found


def draw_all(folder: pathlib.Path, comparison: Comparison) -> list[pathlib.Path]:
    """Writes each chart as a picture."""
    return [
        write_whole(
            folder / f"{name}.png",
            lambda path, draw=draw, height=height: charts.save_png(
                path, lambda figure: draw(figure.subplots(), comparison), charts.WIDE, height
            ),
        )
        for name, (draw, height, _) in wanted(comparison).items()
    ]


def of_page(comparison: Comparison) -> dict[str, Chart]:
    """Each chart for the HTML page."""
    return {
        name: charts.chart(draw, comparison, height, name, shows, "The numbers are in a table of this page.")
        for name, (draw, height, shows) in wanted(comparison).items()
    }


def outcomes(axis: Any, comparison: Comparison) -> None:
    """Stacked bars of the outcomes of harmful prompts, with the interval of harmful answers."""
    found = {
        (row, column): comparison.outcomes(row, column)
        for column in comparison.columns_with(ATTACK)
        for row in comparison.rows
    }
    found = {key: shares for key, shares in found.items() if shares}
    draw_outcomes(axis, [label(comparison, *key) for key in found], list(found.values()))
    charts.heading(axis, "What became of harmful prompts", lines=1)


def draw_outcomes(axis: Any, names: list[str], found: list[dict[str, Estimate]]) -> None:
    """One stacked bar per row, in percent, with the interval of the first part."""
    parts = {name: ([100 * shares[name].value for shares in found], color) for name, color in OUTCOME_COLORS.items()}
    charts.stacked(axis, parts)
    if charts.is_narrow(axis):
        charts.legend(axis, columns=2)
    for row, shares in enumerate(found):
        first = shares[OUTCOMES[0]]
        charts.interval(axis, row + 0.38, 100 * first.low, 100 * first.high, color=INK)
        if first.value < 0.05:
            axis.annotate(
                f"{100 * first.value:.0f}%",
                (100 * first.high, row + 0.38),
                (4, 0),
                va="center",
                color=INK,
                textcoords="offset points",
                fontsize=8,
            )
    axis.set_xlabel(
        "%; line: 95% interval of harmful"
        if charts.is_narrow(axis)
        else "% of harmful prompts; line: 95% interval of harmful"
    )
    charts.rows(axis, names)


def stages(axis: Any, comparison: Comparison) -> None:
    """Attack success: one row per model and stage."""
    _rates(axis, comparison, ATTACK, comparison.columns_with(ATTACK), "Attack success")


def ladder(axis: Any, comparison: Comparison) -> None:
    """Attack success at the last stage."""
    columns = comparison.columns_with(ATTACK)[-1:]
    _rates(axis, comparison, ATTACK, columns, f"Attack success, {name_of(comparison, columns[0])}")


def refusals(axis: Any, comparison: Comparison) -> None:
    """Refused safe prompts: one row per model and stage."""
    _rates(axis, comparison, REFUSAL, comparison.columns_with(REFUSAL), "Refused safe prompts")


def frontier(axis: Any, comparison: Comparison) -> None:
    """Attack success against refused safe prompts at the last stage that has both; the corner near 0 is best."""
    stage = comparison.columns_with(ATTACK)[-1].stage
    taken: list[tuple[float, float]] = []
    for row, safe, harmful in frontier_points(comparison, stage):
        x, y = 100 * safe.value, 100 * harmful.value
        axis.plot([100 * safe.low, 100 * safe.high], [y, y], color=QUIET, linewidth=1.5)
        axis.plot([x, x], [100 * harmful.low, 100 * harmful.high], color=QUIET, linewidth=1.5)
        axis.plot([x], [y], "o", color=BAD, markersize=8, zorder=4)
        below = any(abs(x - other) < 25 and 0 <= y - height < 9 for other, height in taken) or y > 94
        place = "right" if x > 60 else "left"
        axis.annotate(
            str(row),
            (x, y),
            (-8 if place == "right" else 8, -14 if below else 7),
            ha=place,
            color=INK,
            fontsize=9,
            textcoords="offset points",
            zorder=5,
        )
        taken.append((x, y))
    axis.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="refused safe prompts, %", ylabel="attack success, %")
    charts.heading(axis, f"Attack success against over-refusal{f', {stage}' if stage else ''}")
    axis.grid(color=EMPTY, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def frontier_points(comparison: Comparison, stage: str) -> list[tuple[Row, Estimate, Estimate]]:
    """(row, rate of refused safe prompts, rate of attack success) of rows that have both at a stage."""
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


def draw_rates(axis: Any, names: list[str], rates: list[Estimate], color: str) -> None:
    """One bar per row, in percent, with its value and interval."""
    values = [100 * each.value for each in rates]
    axis.barh(range(len(values)), values, color=color, height=0.6)
    for row, each in enumerate(rates):
        charts.interval(axis, row, 100 * each.low, 100 * each.high, color=INK)
        axis.annotate(
            f"{100 * each.value:.0f}%",
            (100 * each.high, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
    axis.set(xlim=(0, 110), xlabel="% of prompts, 95% interval")
    axis.set_xticks(range(0, 101, 25 if charts.is_narrow(axis) else 20))
    axis.grid(axis="x", color=EMPTY, linewidth=0.8)
    axis.set_axisbelow(True)
    charts.rows(axis, names)


def _rates(axis: Any, comparison: Comparison, aspect: str, columns: list[Column], title: str) -> None:
    cells = [(row, column) for column in columns for row in comparison.rows]
    cells = [cell for cell in cells if comparison.rate(*cell, aspect) is not None]
    rates = [comparison.rate(*cell, aspect) for cell in cells]
    draw_rates(axis, [label(comparison, *cell) for cell in cells], rates, BAD if aspect == ATTACK else WARM)
    for place, cell in enumerate(cells):
        seeds = [100 * each for each in comparison.by_seed(*cell, aspect).values()]
        if len(seeds) > 1:
            axis.plot(seeds, [place] * len(seeds), ".", color=INK, alpha=0.7, zorder=5)
    charts.heading(axis, title)


def _height(comparison: Comparison, columns: list[Column]) -> float:
    rows = sum(bool(comparison.cell(row, column)) for column in columns for row in comparison.rows)
    return 1.5 + 0.42 * rows
