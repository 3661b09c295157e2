"""The card's charts: scores by slice, frequency by category and slice, share of documents with a hit.

Drawn once for print (PNG, on white) and once for the page (SVG whose ink is the page's, so that dark mode works).
"""

import io
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safelm.safety.report_card.tally import SCORES

# From safe to unsafe, distinct also in greys and for the colour-blind; unscored is grey.
SCORE_COLORS = ("#2c7a7b", "#8ccfc0", "#f5e3a1", "#f2b267", "#d9643a", "#8f1d2c", "#b9bdc4")
_LEVELS = "YlOrRd"
INK, QUIET, EMPTY = "#1a1b1e", "#6a6d75", "#e9eaed"
_THEMED = {INK: "var(--ink)", QUIET: "var(--quiet)", EMPTY: "var(--empty)"}
_Card = Mapping[str, Any]


def draw_png(path: pathlib.Path, card: _Card) -> None:
    """All charts in one picture."""
    with style():
        drawn = figure(13.5, _rows_height(card) + _heat_height(card))
        upper, lower = drawn.subfigures(2, 1, height_ratios=[_rows_height(card), _heat_height(card)])
        left, right = upper.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        scores(left, card)
        shares(right, card)
        heat(lower.subplots(), card)
        drawn.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def svgs(card: _Card) -> dict[str, str]:
    """Each chart as an SVG element with a title and a description, by name."""
    titles = {
        "scores": ("Harm scores by slice", _describe_scores(card)),
        "shares": ("Documents with a harmful n-gram, by slice", _describe_shares(card)),
        "heat": ("Harmful n-grams per million tokens, by category and slice", "The numbers are in the table below it."),
    }
    heights = {"scores": _rows_height(card), "shares": _rows_height(card), "heat": _heat_height(card)}
    drawn: dict[str, Callable[[Any, _Card], None]] = {"scores": scores, "shares": shares, "heat": heat}
    return {name: svg(draw, card, heights[name], name, *titles[name]) for name, draw in drawn.items()}


def scores(axis: Any, card: _Card) -> None:
    """Stacked bars: share of each slice's documents by score."""
    names, slices = _names(card), card["slices"]
    left = [0.0] * len(slices)
    for score, color in zip(SCORES, SCORE_COLORS, strict=True):
        widths = [100 * (one["scores"][score]["share"] or 0) for one in slices]
        if score == "unscored" and not any(widths):
            continue
        bars = axis.barh(names, widths, left=left, color=color, label=score, height=0.62)
        for bar, width in zip(bars, widths, strict=True):
            if width >= 6:
                x, y = bar.get_x() + width / 2, bar.get_y() + bar.get_height() / 2
                ink = "white" if luminance(color) < 0.4 else "#1a1b1f"
                axis.text(x, y, f"{width:.0f}%", ha="center", va="center", color=ink, fontsize=9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set(xlim=(0, 100), xlabel="% of documents")
    axis.set_title("Harm scores by slice", loc="left", pad=26)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=7, frameon=False, handlelength=1, fontsize=9,
                columnspacing=1.2, handletextpad=0.5, borderaxespad=0.2)  # fmt: skip
    _rows(axis)


def shares(axis: Any, card: _Card) -> None:
    """Points with intervals: share of documents with a hit."""
    rows = [(index, one["all"]) for index, one in enumerate(card["slices"]) if one["all"]["share"] is not None]
    for index, found in rows:
        value, low, high = (100 * found[key] for key in ("share", "share_low", "share_high"))
        axis.plot([low, high], [index, index], color=QUIET, linewidth=2.5, solid_capstyle="round")
        axis.plot([value], [index], "o", color=SCORE_COLORS[4], markersize=8)
        axis.annotate(f"{value:.3g}%", (value, index), (0, 9), textcoords="offset points", ha="center", color=INK,
                      fontsize=9)  # fmt: skip
    axis.set_yticks(range(len(card["slices"])), _names(card))
    longest = max([100 * found["share_high"] for _, found in rows], default=1)
    axis.set(xlim=(-0.06 * longest, 1.1 * longest), ylim=(-0.6, len(card["slices"]) - 0.4))
    axis.set_xlabel("% of documents, 95% interval")
    axis.set_title("Documents with a harmful n-gram", loc="left", pad=26)
    axis.grid(axis="x", color=EMPTY, linewidth=0.8)
    axis.set_axisbelow(True)
    _rows(axis)


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
            ink = QUIET if not value else ("white" if luminance(color) < 0.4 else "#1a1b1f")
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


def number(value: int | float | None) -> str:
    """A frequency as people read it: three digits, no exponent."""
    if value is None:
        return "–"
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def _per_million(one: _Card, category: str) -> float | None:
    return one["categories"][category]["per_million"]


def _names(card: _Card) -> list[str]:
    return [one["name"] for one in card["slices"]]


def _column(name: str, width: int) -> str:
    """A slice's name over a column: broken where it is long."""
    words, lines = name.split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(line if len(line) <= 18 else line[:17] + "…" for line in lines)


def _rows(axis: Any) -> None:
    axis.set_ylim(len(axis.get_yticks()) - 0.5, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _rows_height(card: _Card) -> float:
    return 1.6 + 0.44 * len(card["slices"])


def _heat_height(card: _Card) -> float:
    return 1.2 + 0.36 * len(card["queries"]["by_category"])


def luminance(color: Any) -> float:
    """How light a colour is, 0 to 1."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def style() -> Any:
    """The charts' fonts and colours, while this lasts."""
    import matplotlib

    return matplotlib.rc_context(
        {"font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold", "text.color": INK, "axes.labelcolor": INK,
         "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": QUIET, "svg.fonttype": "none",
         "svg.hashsalt": "safelm", "font.family": "sans-serif"}
    )  # fmt: skip


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def svg(
    draw: Callable[[Any, Mapping[str, Any]], None],
    values: Mapping[str, Any],
    height: float,
    name: str,
    title: str,
    text: str,
) -> str:
    """What `draw(axis, values)` draws, as an SVG element for a page.

    Args:
      height: in inches; the width is 9.2.
      name: unique on the page. `title` and `text` say what is to be seen.
    """
    with style():
        drawn = figure(9.2, height)
        draw(drawn.subplots(), values)
        target = io.StringIO()
        drawn.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    found = target.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)
    for color, variable in _THEMED.items():
        found = found.replace(color, variable)
    found = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{name}-", found)  # ids of several charts on one page
    found = re.sub(r"font-family: [^;\"]*", "font-family: inherit", found)
    head = f'<svg role="img" aria-labelledby="{name}-title {name}-desc" '
    named = f'<title id="{name}-title">{_escaped(title)}</title><desc id="{name}-desc">{_escaped(text)}</desc>'
    return re.sub(r"^<svg ([^>]*)>", lambda tag: head + _fluid(tag.group(1)) + ">" + named, found)


def _fluid(attributes: str) -> str:
    return re.sub(r'\b(width|height)="[^"]*"\s*', "", attributes)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _describe_scores(card: _Card) -> str:
    def line(one: _Card) -> str:
        parts = [f"{score}: {100 * facts['share']:.1f}%" for score, facts in one["scores"].items() if facts["share"]]
        return f"{one['name']}: {', '.join(parts)}"

    return "; ".join(line(one) for one in card["slices"])


def _describe_shares(card: _Card) -> str:
    rows: Sequence[_Card] = [one for one in card["slices"] if one["all"]["share"] is not None]
    return "; ".join(f"{one['name']}: {100 * one['all']['share']:.3g}%" for one in rows)
