"""Charts in one style: as PNG on white, and as SVG that takes the colours of the page around it.

A page gets every chart in two widths, for desktop and phone, so that neither has to scroll. A chart's drawing function
asks `is_narrow(axis)` which of the two it draws.
"""

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import markupsafe

# From safe to unsafe, distinct also in greys and for the colour-blind; the last is for what has no score.
SCORE_COLORS = ("#2c7a7b", "#8ccfc0", "#f5e3a1", "#f2b267", "#d9643a", "#8f1d2c", "#b9bdc4")
GOOD, CALM, WARM, BAD, GREY = SCORE_COLORS[0], SCORE_COLORS[1], SCORE_COLORS[3], SCORE_COLORS[4], SCORE_COLORS[6]
INK, QUIET, EMPTY = "#1a1b1e", "#6a6d75", "#e9eaed"
_THEMED = {INK: "var(--ink)", QUIET: "var(--quiet)", EMPTY: "var(--empty)"}
WIDE, NARROW = 9.2, 4.6  # inches


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart on a page, drawn for desktop and for phone."""

    wide: markupsafe.Markup
    narrow: markupsafe.Markup


def chart(
    draw: Callable[..., None],
    values: Any,
    height: int | float,
    name: str,
    title: str,
    text: str,
    *,
    narrow: int | float = 0,
) -> Chart:
    """Draws `draw(axis, values)` for a page.

    Args:
      height, narrow: heights in inches for desktop and phone (`narrow` 0: the same).
      name: an id, unique on the page.
      title, text: the chart's title and description for screen readers.
    """
    sizes = {"": (WIDE, height), "-phone": (NARROW, narrow or height)}
    wide, small = (svg(draw, values, size, name + suffix, title, text) for suffix, size in sizes.items())
    return Chart(wide, small)


def svg(
    draw: Callable[..., None], values: Any, size: tuple[int | float, int | float], name: str, title: str, text: str
) -> markupsafe.Markup:
    """Draws `draw(axis, values)` as SVG in the ink of the page around it; `size` in inches, the rest as in `chart`."""
    with style():
        drawn = figure(*size)
        draw(drawn.subplots(), values)
        target = io.StringIO()
        drawn.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    found = target.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)
    for color, variable in _THEMED.items():
        found = found.replace(color, variable)
    found = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{name}-", found)  # ids of several charts on one page
    found = re.sub(r"font-family: [^;\"]*", "font-family: inherit", found)
    found = re.sub(r"(font: (?:\w+ )*[\d.]+px) [^;\"]*", r"\g<1> inherit", found)
    head = f'<svg role="img" aria-labelledby="{name}-title {name}-desc" '
    told = markupsafe.Markup('<title id="{0}-title">{1}</title><desc id="{0}-desc">{2}</desc>')
    told = str(told.format(name, title, text))
    return markupsafe.Markup(re.sub(r"^<svg ([^>]*)>", lambda tag: head + _fluid(tag.group(1)) + ">" + told, found))


def save_png(path: pathlib.Path, draw: Callable[[Any], None], width: int | float, height: int | float) -> None:
    """Saves what `draw(figure)` draws as a PNG; width and height in inches."""
    with style():
        drawn = figure(width, height)
        draw(drawn)
        drawn.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def is_narrow(axis: Any) -> bool:
    """Whether an axis belongs to a figure for a phone."""
    return bool(axis.get_figure(root=True).get_figwidth() <= NARROW)


def figure(width: int | float, height: int | float) -> Any:
    """An empty figure; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def style() -> Any:
    """Context manager that sets the fonts and colours of the charts."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.edgecolor": QUIET,
            "svg.fonttype": "none",
            "svg.hashsalt": "safelm",
            "font.family": "sans-serif",
            "axes.titlelocation": "left",
        }
    )


def rows(axis: Any, names: Sequence[str]) -> None:
    """Prepares an axis with one named row per value, from top to bottom, without a frame."""
    axis.set_yticks(range(len(names)), [_row_name(name, 22 if is_narrow(axis) else 40) for name in names])
    axis.set_ylim(len(names) - 0.45, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def stacked(axis: Any, parts: Mapping[str, tuple[Sequence[int | float], str]], *, height: float = 0.66) -> None:
    """Draws stacked bars in percent: for each part its share in every row and its colour, named in a legend above."""
    left = [0.0] * len(next(iter(parts.values()))[0])
    for name, (widths, color) in parts.items():
        axis.barh(range(len(widths)), widths, left=left, color=color, height=height, label=name)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= (9 if is_narrow(axis) else 5):
                axis.text(
                    start + width / 2, row, f"{width:.0f}%", ha="center", va="center", color=ink_on(color), fontsize=9
                )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_xlim(0, 100)
    legend(axis, columns=len(parts))


def legend(axis: Any, columns: int) -> None:
    """Names the parts in their colours above the plot."""
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.99),
        ncols=min(columns, 4) if is_narrow(axis) else columns,
        frameon=False,
        handlelength=1,
        fontsize=9,
        columnspacing=1.2,
        handletextpad=0.5,
        borderaxespad=0.2,
    )


def interval(axis: Any, row: int | float, low: int | float, high: int | float, *, color: str = QUIET) -> None:
    """A 95% interval along a row."""
    axis.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="round", zorder=3)


def heading(axis: Any, title: str, *, lines: int = 0) -> None:
    """Sets the chart's title, leaving room for `lines` of legend; on a phone it starts at the figure's left edge."""
    if is_narrow(axis):
        axis.get_figure(root=True).suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    else:
        axis.set_title(title, loc="left", pad=10 + 16 * lines)


def tint(color: str, strength: int | float) -> tuple[float, float, float]:
    """A colour mixed with white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(color))
    return red, green, blue


def ink_on(color: Any) -> str:
    """Black or white, whichever is more readable on a colour."""
    return "white" if luminance(color) < 0.3 else "#1a1b1f"


def luminance(color: Any) -> float:
    """A colour's relative luminance, 0 to 1."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _row_name(name: str, width: int) -> str:
    """A row's name, broken into lines if it is long."""
    lines = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(line if len(line) <= width + 6 else line[: width + 5] + "…" for line in lines)


def _fluid(attributes: str) -> str:
    return re.sub(r'(?<!\S)(width|height|xmlns(:\w+)?)="[^"]*"\s*', "", attributes)  # in HTML no name space is needed
