"""The report's charts, as a picture (PNG) and for the page (SVG)."""

import bisect
import pathlib
from collections.abc import Sequence
from typing import Any

from safelm.report import charts
from safelm.report.charts import BAD, EMPTY, GOOD, INK, QUIET, SCORE_COLORS, WARM, Chart

_SHOWN = {
    "similarity": "similarity to the source",
    "length_ratio": "words over the source's words",
    "copied_share": "share of words in copied runs",
}
_Report = Any
_TOLD = "The numbers are in a table of this page."


def draw_png(path: pathlib.Path, report: _Report) -> None:
    """All charts in one picture."""
    shown = measured(report)
    heights = [_funnel_height(report), _styles_height(report), 3.2][: 3 if shown else 2]

    def draw(drawn: Any) -> None:
        top, middle, *bottom = drawn.subfigures(len(heights), 1, height_ratios=heights)
        funnel(top.subplots(), report)
        left, right = middle.subplots(1, 2, width_ratios=[3, 2])
        styles(left, report)
        scores(right, report)
        if bottom:
            for axis, name in zip(bottom[0].subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
                distribution(axis, report, name)

    charts.save_png(path, draw, 13.5, sum(heights))


def of_page(report: _Report) -> dict[str, Chart]:
    """The page's charts by name: funnel, styles and the measured distributions."""
    styles_height, funnel_height = _styles_height(report), _funnel_height(report)
    found = {
        "funnel": charts.chart(funnel, report, funnel_height, "funnel", "Drafts left after each gate", _TOLD),
        "styles": charts.chart(styles, report, styles_height, "styles", "Attempts that passed, by style", _TOLD),
    }
    for name in measured(report):

        def draw(axis: Any, values: _Report, name: str = name) -> None:
            distribution(axis, values, name)

        found[name] = charts.chart(draw, report, 2.7, name, f"Drafts by {_SHOWN[name]}", _TOLD)
    return found


def measured(report: _Report) -> list[str]:
    """The distributions that have any draft."""
    return [name for name in _SHOWN if any(report["distributions"][name]["drafts"])]


def funnel(axis: Any, report: _Report) -> None:
    """Bars: the drafts left after each gate, and those that the gate rejected."""
    drafts = report["drafts"]
    gates = [gate for gate in drafts["gates"] if gate["checked"]]
    names = ["attempts", "written", *(gate["gate"] for gate in gates)]
    left = [drafts["attempts"], drafts["written"], *(gate["passed"] for gate in gates)]
    lost = [0, drafts["attempts"] - drafts["written"], *(gate["checked"] - gate["passed"] for gate in gates)]
    axis.barh(range(len(names)), left, color=GOOD, height=0.62)
    axis.barh(range(len(names)), lost, left=left, color=WARM, height=0.62)
    for row, (kept, gone) in enumerate(zip(left, lost, strict=True)):
        text = f"{kept:,}" + (f" left, {gone:,} rejected" if gone else "")
        axis.annotate(text, (kept + gone, row), (5, 0), textcoords="offset points", va="center", color=INK, fontsize=9)
    room = 1.7 if charts.is_narrow(axis) else 1.25
    axis.set(xlim=(0, room * max(drafts["attempts"], 1)), xlabel="drafts")
    charts.heading(axis, "From attempts to drafts that passed every gate")
    charts.rows(axis, names)


def styles(axis: Any, report: _Report) -> None:
    """Points with intervals: share of attempts in a style that passed every gate."""
    groups = [group for group in report["styles"] if group["pass_rate"]]
    for row, group in enumerate(groups):
        found = group["pass_rate"]
        charts.interval(axis, row, 100 * found["low"], 100 * found["high"])
        axis.plot([100 * found["share"]], [row], "o", color=GOOD, markersize=8, zorder=4)
        axis.annotate(
            f"{100 * found['share']:.0f}%",
            (100 * found["high"], row),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
    axis.set(xlim=(-3, 112), xlabel="% of attempts that passed, 95% interval")
    axis.set_xticks(range(0, 101, 25))
    charts.heading(axis, "Styles (attempts)")
    axis.grid(axis="x", color=EMPTY, linewidth=0.8)
    axis.set_axisbelow(True)
    charts.rows(axis, [f"{group['name']} ({group['attempts']:,})" for group in groups])


def scores(axis: Any, report: _Report) -> None:
    """A matrix of counts: harm score of the source, and of the draft by the scorer."""
    from matplotlib.patches import Rectangle

    matrix = report["score_before_after"]["matrix"]
    for before, row in enumerate(matrix):
        total = sum(row)
        for after, count in enumerate(row):
            color = charts.tint(SCORE_COLORS[after], 0.15 + 0.85 * count / total) if count else EMPTY
            axis.add_patch(Rectangle((after - 0.48, before - 0.46), 0.96, 0.92, facecolor=color, edgecolor="none"))
            axis.text(
                after,
                before,
                f"{count:,}" if count else "–",
                ha="center",
                va="center",
                fontsize=9.5,
                color=charts.ink_on(color) if count else QUIET,
            )
    axis.set(xlim=(-0.5, 5.5), ylim=(5.5, -0.5), xlabel="score of the draft", ylabel="score of the source")
    charts.heading(axis, "Drafts by score" if any(map(any, matrix)) else "Drafts by score (none was scored)")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def distribution(axis: Any, report: _Report, name: str) -> None:
    """Bars by bin of all drafts and of those that passed; lines mark the gates' limits."""
    found = report["distributions"][name]
    edges, places = found["upper_edges"], range(len(found["drafts"]))
    axis.bar(places, found["drafts"], width=0.92, color=WARM)
    axis.bar(places, found["passed"], width=0.92, color=GOOD)
    every = max(1, len(edges) // 5)
    ticks = [place for place in places if place % every == every - 1 and place < len(edges)]
    axis.set_xticks([place + 0.5 for place in ticks], [f"{edges[place]:g}" for place in ticks])
    top = 1.3 * max(found["drafts"])
    for side, text, align in (("low", "at least", "left"), ("high", "at most", "right")):
        if (limit := found[side]) is not None:
            at = _place(edges, limit)
            axis.plot([at, at], [0, top], color=BAD, linewidth=1.5, linestyle=(0, (4, 2)))
            shift = 4 if align == "left" else -4
            axis.annotate(
                f"{text} {limit:g}",
                (at, top),
                (shift, -2),
                textcoords="offset points",
                ha=align,
                va="top",
                color=INK,
                fontsize=9,
            )
    axis.set(xlim=(-0.6, len(places) - 0.4), ylim=(0, top), xlabel=_SHOWN[name], ylabel="drafts")
    axis.yaxis.get_major_locator().set_params(integer=True)
    passed, drafts = sum(found["passed"]), sum(found["drafts"])
    charts.heading(axis, f"{_SHOWN[name][0].upper()}{_SHOWN[name][1:]}", lines=1)
    axis.text(
        0, 1.03, f"passed every gate ({passed:,})", color=GOOD, fontsize=9, transform=axis.transAxes, fontweight="bold"
    )
    axis.text(
        1,
        1.03,
        f"rejected ({drafts - passed:,})",
        color=BAD,
        fontsize=9,
        transform=axis.transAxes,
        fontweight="bold",
        ha="right",
    )
    axis.spines[["top", "right"]].set_visible(False)


def _place(edges: Sequence[int | float], value: int | float) -> int | float:
    """Where a value stands among bars a unit apart, bin i ending at i + 1/2."""
    after = bisect.bisect_left(edges, value)
    if after >= len(edges):
        return len(edges) - 0.5
    low = edges[after - 1] if after else 0.0
    return after - 0.5 + (value - low) / (edges[after] - low)


def _funnel_height(report: _Report) -> float:
    return 1.3 + 0.33 * (2 + len(report["drafts"]["gates"]))


def _styles_height(report: _Report) -> float:
    return max(2.6, 1.2 + 0.33 * len(report["styles"]))
