"""The report's charts, in the report card's style: once as a picture (PNG), once for the page (SVG)."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from safelm.safety.report_card import charts
from safelm.safety.report_card.charts import EMPTY, INK, QUIET, SCORE_COLORS

_PASSED, _FAILED = SCORE_COLORS[0], SCORE_COLORS[3]
_SHOWN = {"similarity": "similarity to the source", "length_ratio": "words over the source's words",
          "copied_share": "share of words in copied runs"}  # fmt: skip
_Report = Mapping[str, Any]


def draw_png(path: pathlib.Path, report: _Report) -> None:
    """All charts in one picture."""
    heights = [_funnel_height(report), _styles_height(report), 3.2]
    with charts.style():
        drawn = charts.figure(13.5, sum(heights))
        top, middle, bottom = drawn.subfigures(3, 1, height_ratios=heights)
        funnel(top.subplots(), report)
        left, right = middle.subplots(1, 2, width_ratios=[3, 2])
        styles(left, report)
        scores(right, report)
        for axis, name in zip(bottom.subplots(1, len(_SHOWN)), _SHOWN, strict=True):
            distribution(axis, report, name)
        drawn.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})


def svgs(report: _Report) -> dict[str, str]:
    """Each chart as an SVG element, by name: funnel, styles, scores and the distributions."""
    drawn: dict[str, tuple[Callable[[Any, _Report], None], float, str]] = {
        "funnel": (funnel, _funnel_height(report), "Drafts left after each gate"),
        "styles": (styles, _styles_height(report), "Share of attempts that passed, by style"),
        "scores": (scores, 4.0, "Harm score of source and draft"),
    }
    for name, title in _SHOWN.items():
        drawn[name] = (lambda axis, report, name=name: distribution(axis, report, name), 3.0, f"Drafts by {title}")
    text = "The numbers are in the table below it."
    return {name: charts.svg(draw, report, height, name, title, text) for name, (draw, height, title) in drawn.items()}


def funnel(axis: Any, report: _Report) -> None:
    """Bars: drafts that are left after each gate, and beside them what the gate took out."""
    drafts = report["drafts"]
    names = ["attempts", "written", *(gate["gate"] for gate in drafts["gates"])]
    left = [drafts["attempts"], drafts["written"], *(gate["passed"] for gate in drafts["gates"])]
    lost = [0, drafts["attempts"] - drafts["written"], *(gate["checked"] - gate["passed"] for gate in drafts["gates"])]
    axis.barh(names, left, color=_PASSED, height=0.62, label="left")
    axis.barh(names, lost, left=left, color=_FAILED, height=0.62, label="rejected here")
    for row, (kept, gone) in enumerate(zip(left, lost, strict=True)):
        text = f" {kept:,}" + (f"  (-{gone:,})" if gone else "")
        axis.text(kept + gone, row, text, va="center", color=INK, fontsize=9)
    axis.set(xlim=(0, 1.15 * max(drafts["attempts"], 1)), ylim=(len(names) - 0.4, -0.6), xlabel="drafts")
    axis.set_title("From attempts to drafts that passed every gate", loc="left", pad=22)
    _plain(axis)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)


def styles(axis: Any, report: _Report) -> None:
    """Points with intervals: share of attempts in a style that passed every gate."""
    groups = [group for group in report["styles"] if group["pass_rate"]]
    for row, group in enumerate(groups):
        found = group["pass_rate"]
        axis.plot([100 * found["low"], 100 * found["high"]], [row, row], color=QUIET, linewidth=2.5,
                  solid_capstyle="round")  # fmt: skip
        axis.plot([100 * found["share"]], [row], "o", color=_PASSED, markersize=8)
    axis.set_yticks(range(len(groups)), [f"{group['name']} ({group['attempts']:,})" for group in groups])
    axis.set(xlim=(-3, 103), ylim=(len(groups) - 0.4, -0.6), xlabel="% of attempts that passed, 95% interval")
    axis.set_title("Styles (attempts)", loc="left", pad=10)
    axis.grid(axis="x", color=EMPTY, linewidth=0.8)
    axis.set_axisbelow(True)
    _plain(axis)


def scores(axis: Any, report: _Report) -> None:
    """A matrix of numbers: harm score of the source, and of the draft by the scorer."""
    matrix = report["score_before_after"]["matrix"]
    largest = max(max(row) for row in matrix)
    for before, row in enumerate(matrix):
        total = sum(row)
        for after, count in enumerate(row):
            share = count / total if total else 0.0
            color = (*_rgb(SCORE_COLORS[after]), 0.15 + 0.85 * share) if count else EMPTY
            axis.add_patch(_square(after, before, color))
            ink = (
                QUIET if not count else "white" if share > 0.5 and charts.luminance(SCORE_COLORS[after]) < 0.4 else INK
            )
            axis.text(after, before, f"{count:,}" if count else "–", ha="center", va="center", color=ink, fontsize=9.5)
    axis.set(xlim=(-0.5, 5.5), ylim=(5.5, -0.5), xlabel="score of the draft", ylabel="score of the source")
    axis.set_title("Drafts by score" if largest else "Drafts by score (none was scored)", loc="left", pad=10)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def distribution(axis: Any, report: _Report, name: str) -> None:
    """Bars by bin: all drafts, and those that passed."""
    found = report["distributions"][name]
    edges, places = found["upper_edges"], range(len(found["drafts"]))
    axis.bar(places, found["drafts"], width=0.92, color=_FAILED, label="drafts")
    axis.bar(places, found["passed"], width=0.92, color=_PASSED, label="passed")
    every = max(1, len(edges) // 5)
    ticks = [place for place in places if place % every == every - 1 and place < len(edges)]
    axis.set_xticks([place + 0.5 for place in ticks], [f"{edges[place]:g}" for place in ticks])
    axis.set(xlabel=_SHOWN[name], ylabel="drafts")
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _funnel_height(report: _Report) -> float:
    return 1.4 + 0.33 * (2 + len(report["drafts"]["gates"]))


def _styles_height(report: _Report) -> float:
    return max(3.6, 1.2 + 0.33 * len(report["styles"]))


def _plain(axis: Any) -> None:
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _rgb(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)


def _square(x: int, y: int, color: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=color, edgecolor="none")
