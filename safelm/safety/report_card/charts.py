"""The card's charts: scores by slice, frequencies by category and slice, share of documents with a hit."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.report import charts
from safelm.report.charts import BAD, EMPTY, INK, QUIET, SCORE_COLORS, Chart
from safelm.report.table import number
from safelm.safety.report_card.tally import SCORES

_LEVELS = "YlOrRd"
_Card = Mapping[str, Any]


def draw_png(path: pathlib.Path, card: _Card) -> None:
    """All charts in one picture."""
    upper, lower = _rows_height(card), _heat_height(card)

    def draw(drawn: Any) -> None:
        top, bottom = drawn.subfigures(2, 1, height_ratios=[upper, lower])
        left, right = top.subplots(1, 2, width_ratios=[3, 2])
        scores(left, card)
        shares(right, card)
        right.set_yticklabels([])
        charts.heading(right, right.get_title(loc="left"), lines=1)  # level with the other
        heat(bottom.subplots(), card)

    charts.save_png(path, draw, 13.5, upper + lower)


def of_page(card: _Card) -> tuple[Chart, Chart]:
    """The page's charts: scores by slice, and documents with a hit."""
    height = _rows_height(card)
    return (
        charts.chart(scores, card, height, "scores", "Harm scores", _describe_scores(card), narrow=height + 0.2),
        charts.chart(shares, card, height, "shares", "Documents with a harmful n-gram", _describe_shares(card)),
    )


def scores(axis: Any, card: _Card) -> None:
    """Stacked bars: share of each slice's documents by score."""
    parts = {}
    for score, color in zip(SCORES, SCORE_COLORS, strict=True):
        widths = [100 * (one["scores"][score]["share"] or 0) for one in card["slices"]]
        if any(widths):
            parts[score] = (widths, color)
    if parts:
        charts.stacked(axis, parts)
    axis.set(xlim=(0, 100), xlabel="% of documents")
    charts.heading(axis, "Harm scores by slice", lines=1)
    charts.rows(axis, _names(card))


def shares(axis: Any, card: _Card) -> None:
    """Points with intervals: share of documents with a hit."""
    rows = [(index, one["all"]) for index, one in enumerate(card["slices"]) if one["all"]["share"] is not None]
    for index, found in rows:
        value, low, high = (100 * found[key] for key in ("share", "share_low", "share_high"))
        charts.interval(axis, index, low, high)
        axis.plot([value], [index], "o", color=BAD, markersize=8, zorder=4)
        axis.annotate(
            f"{value:.3g}%", (value, index), (0, 9), textcoords="offset points", ha="center", color=INK, fontsize=9
        )
    longest = max([100 * found["share_high"] for _, found in rows], default=1)
    axis.set(xlim=(-0.06 * longest, 1.1 * longest), xlabel="% of documents, 95% interval")
    charts.heading(axis, "Documents with a harmful n-gram")
    axis.grid(axis="x", color=EMPTY, linewidth=0.8)
    axis.set_axisbelow(True)
    charts.rows(axis, _names(card))


def heat(axis: Any, card: _Card) -> None:
    """A table of numbers, coloured on a log scale: hits per million tokens."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    slices, categories = card["slices"], list(card["queries"]["by_category"])
    values = [[_per_million(one, category) for one in slices] for category in categories]
    positive = [value for row in values for value in row if value]
    low = 10 ** math.floor(math.log10(min(positive))) if positive else 0.1
    high = max(10 ** math.ceil(math.log10(max(positive))) if positive else 1, 10 * low)
    norm, colors = LogNorm(low, high), colormaps[_LEVELS]
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            color = colors(0.05 + 0.9 * norm(value)) if value else EMPTY
            axis.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=color, edgecolor="none"))
            ink = QUIET if not value else ("white" if charts.luminance(color) < 0.4 else "#1a1b1f")
            axis.text(x, y, "–" if value is None else number(value), ha="center", va="center", color=ink, fontsize=9.5)
    axis.set(xlim=(-0.5, len(slices) - 0.5), ylim=(len(categories) - 0.5, -0.5))
    axis.set_xticks(range(len(slices)), [_column(name, 12 if len(slices) < 6 else 8) for name in _names(card)])
    axis.set_yticks(range(len(categories)), categories)
    axis.xaxis.tick_top()
    axis.set_title("Harmful n-grams per million tokens", loc="left", pad=16)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if positive:
        levels = colors.__class__.from_list("levels", [colors(0.05 + 0.9 * i / 63) for i in range(64)])
        bar = axis.figure.colorbar(ScalarMappable(norm, levels), ax=axis, fraction=0.03, pad=0.015, aspect=30)
        bar.set_label("hits per million tokens, log scale; no hit is grey")
        bar.outline.set_visible(False)


def _per_million(one: _Card, category: str) -> float | None:
    return one["categories"][category]["per_million"]


def _names(card: _Card) -> list[str]:
    return [one["name"] for one in card["slices"]]


def _column(name: str, width: int) -> str:
    """A slice's name as a column head, broken if it is long."""
    words, lines = name.split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(line if len(line) <= 18 else line[:17] + "…" for line in lines)


def _rows_height(card: _Card) -> float:
    return 1.6 + 0.44 * len(card["slices"])


def _heat_height(card: _Card) -> float:
    return 1.2 + 0.36 * len(card["queries"]["by_category"])


def _describe_scores(card: _Card) -> str:
    def line(one: _Card) -> str:
        parts = [f"{score}: {100 * facts['share']:.1f}%" for score, facts in one["scores"].items() if facts["share"]]
        return f"{one['name']}: {', '.join(parts)}"

    return "; ".join(line(one) for one in card["slices"])


def _describe_shares(card: _Card) -> str:
    rows: Sequence[_Card] = [one for one in card["slices"] if one["all"]["share"] is not None]
    return "; ".join(f"{one['name']}: {100 * one['all']['share']:.3g}%" for one in rows)
