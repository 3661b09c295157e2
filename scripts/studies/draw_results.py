"""Draws the figures of docs/results/data as pictures, and writes the table above each picture of docs/results.

    python scripts/studies/draw_results.py

Every study keeps its figures in a JSON file with the command and the machine that they come from:

    title, command, machine
    axis      the label of the picture's axis
    scale     "linear", or "log" for ratios, with a line at 1
    head      the table's first head, followed by those of `columns`
    columns   head; unit, written behind every number ("%", "x"); digits, behind the point (default: as in the file);
              drawn: whether the picture has this column
    rows      name; values, one a column: a number, [value, low, high] with a 95% interval, words, or null
    curves    if there, what the picture shows instead of columns, both axes logarithmic: name; x and y, labels;
              points, [x, value, lowest, highest]; law, [a, b] of the line y = a + b * x

The pictures bring their own background and follow the reader's light or dark scheme.
"""

import json
import pathlib
import re
from typing import Any

from safelm import cli
from safelm.io.files import write_whole
from safelm.report import charts, table

DOCS = pathlib.Path(__file__).parents[2] / "docs"
DATA, PICTURES, PAGES = DOCS / "results" / "data", DOCS / "images" / "results", DOCS / "results"
CURVES_IN_A_ROW = 3
COLORS = {charts.GOOD: "first", charts.WARM: "second", charts.BAD: "third"}  # of the columns that are drawn

STYLE = """
  svg { --ink: #1a1b1e; --quiet: #5f636b; --empty: #e4e2da; --paper: #fbfaf6; --edge: #d9d6cc;
        --first: #1f6f70; --second: #b8700d; --third: #b3344a;
        font-family: system-ui, -apple-system, "Segoe UI", sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #eceef1; --quiet: #a4a9b2; --empty: #33373f; --paper: #15171b; --edge: #33373f;
          --first: #5cb8b2; --second: #f2b267; --third: #f0817a; }
  }
"""


def estimate(value: Any) -> tuple[float, float, float] | None:
    """A cell as (value, low, high), the last two equal to the first without an interval; None for words or nothing."""
    if isinstance(value, list):
        return float(value[0]), float(value[1]), float(value[2])
    return (float(value),) * 3 if isinstance(value, int | float) else None


def shown(value: Any, column: dict[str, Any]) -> str:
    """A cell in print, such as `2.14x [2.05, 2.27]`."""
    form = f"{{:,.{column['digits']}f}}" if "digits" in column else "{:,}"
    if isinstance(value, list):
        return f"{form}{column.get('unit', '')} [{form}, {form}]".format(*value)
    return form.format(value) + column.get("unit", "") if isinstance(value, int | float) else value or ""


def markdown(study: dict[str, Any]) -> str:
    """The study's table."""
    columns = study["columns"]
    heads = [study["head"], *(column["head"] for column in columns)]
    rows = [
        [row["name"], *(shown(cell, column) for cell, column in zip(row["values"], columns, strict=True))]
        for row in study["rows"]
    ]
    return table.markdown(heads, rows)


def draw(study: dict[str, Any], name: str) -> str:
    """The study's picture as SVG."""
    if "curves" in study:
        height = 2.2 * -(-len(study["curves"]) // CURVES_IN_A_ROW) + 0.6
        return _finished(charts.svg(_draw_curves, study, (charts.WIDE, height), name, study["title"], study["axis"]))
    drawn = [place for place, column in enumerate(study["columns"]) if column.get("drawn")]
    rows = [row for row in study["rows"] if any(estimate(row["values"][place]) for place in drawn)]
    height = 1.15 + len(rows) * (0.34 + 0.12 * (len(drawn) - 1)) + 0.25 * (len(drawn) > 1)
    values = (study, rows, drawn)
    return _finished(charts.svg(_draw, values, (charts.WIDE, height), name, study["title"], study["axis"]))


def _finished(picture: str) -> str:
    """The picture with its own background, following the reader's light or dark scheme."""
    picture = str(picture)
    for color, variable in COLORS.items():
        picture = picture.replace(color, f"var(--{variable})")
    paper = '<rect width="100%" height="100%" rx="8" style="fill: var(--paper); stroke: var(--edge)"/>'
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return picture.replace("<svg ", head, 1).replace("</desc>", f"</desc><style>{STYLE}</style>{paper}", 1)


def _draw_curves(axis: Any, study: dict[str, Any]) -> None:
    """A small panel for each curve: medians with their ranges, and the law as a line."""
    whole, axis_count = axis.get_figure(root=True), len(study["curves"])
    axis.remove()
    whole.suptitle(study["title"], x=0.02, ha="left", fontsize=12, fontweight="bold")
    whole.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    panels = whole.subplots(-(-axis_count // CURVES_IN_A_ROW), CURVES_IN_A_ROW, squeeze=False).flat
    for curve, panel in zip(study["curves"], panels, strict=False):  # in this order, so that no panel is lost
        panel.set_xscale("log")
        panel.set_yscale("log")
        x, middle, low, high = zip(*curve["points"], strict=True)
        a, b = curve["law"]
        line = [x[0] * (x[-1] / x[0]) ** (step / 40) for step in range(41)]
        panel.plot(line, [a + b * at for at in line], color=charts.WARM, linewidth=1.5, zorder=2)
        panel.vlines(x, low, high, color=charts.GOOD, linewidth=2, zorder=3)
        panel.plot(x, middle, "o", color=charts.GOOD, markersize=4, zorder=4)
        panel.set_title(curve["name"], fontsize=10)
        panel.set_xlabel(curve["x"], fontsize=8)
        panel.set_ylabel(curve["y"], fontsize=8)
        panel.tick_params(labelsize=8)
        panel.minorticks_off()
        if max(high) < 20 * min(low):  # too few powers of ten for ticks
            panel.set_yticks([min(low), max(high)], [f"{min(low):.3g}", f"{max(high):.3g}"])
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels):
        panel.remove()


def _draw(axis: Any, values: tuple[dict[str, Any], list[dict[str, Any]], list[int]]) -> None:
    study, rows, drawn = values
    charts.rows(axis, [row["name"] for row in rows])
    whole = axis.get_figure(root=True)
    whole.get_layout_engine().set(w_pad=0.14, h_pad=0.08)
    whole.suptitle(study["title"], x=0.02, ha="left", fontsize=12, fontweight="bold")
    axis.set_xlabel(study["axis"])
    for row in range(len(rows)):
        axis.axhline(row, color=charts.EMPTY, linewidth=1, zorder=0)
    for series, place in enumerate(drawn):
        column, color = study["columns"][place], list(COLORS)[series]
        shift = (series - (len(drawn) - 1) / 2) * 0.56 / len(drawn)
        for at, row in enumerate(rows):
            found = estimate(row["values"][place])
            if found is not None:
                charts.interval(axis, at + shift, *found[1:], color=color)
                axis.plot(found[0], at + shift, "o", color=color, markersize=6, zorder=4, clip_on=False)
                if len(drawn) == 1:
                    label = shown(row["values"][place], column)
                    axis.text(1.02, at, label, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
        if len(drawn) > 1:
            axis.plot([], [], "o", color=color, label=column["head"])
    if len(drawn) > 1:
        charts.legend(axis, columns=len(drawn))
    _scale(axis, study, [found for row in rows for at in drawn if (found := estimate(row["values"][at]))])


def _scale(axis: Any, study: dict[str, Any], found: list[tuple[float, float, float]]) -> None:
    """Sets the axis's limits and ticks."""
    least, most = min(low for _, low, _ in found), max(high for *_, high in found)
    if study["scale"] == "log":
        axis.set_xscale("log")
        least, most = min(least, 1.0) / 1.15, max(most, 1.0) * 1.15
        steps = (1, 2, 5) if most / least > 8 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        ticks = [round(step * 10**power, 9) for power in range(-2, 4) for step in steps]
        ticks = [tick for tick in ticks if least <= tick <= most]
        axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.minorticks_off()
        axis.axvline(1, color=charts.QUIET, linewidth=1, linestyle="--", zorder=1)
        axis.set_xlim(least, most)
    else:
        axis.set_xlim(0, 100 if study["axis"].startswith("%") else most * 1.05)


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with the table above each picture written anew."""
    for name, text in tables.items():
        above = re.compile(rf"(?:^\|.*\n)*\n(?=!\[.*\]\(\.\./images/results/{name}\.svg\)$)", re.MULTILINE)
        page = above.sub(lambda _, text=text: f"{text.rstrip()}\n\n", page)
    return page


def studies() -> dict[str, dict[str, Any]]:
    """All studies by the names of their files."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(DATA.glob("*.json"))}


def draw_all() -> None:
    """Writes all pictures, and the tables of all pages."""
    found = studies()
    PICTURES.mkdir(exist_ok=True)
    for name, study in found.items():
        write_whole(str(PICTURES / f"{name}.svg"), draw(study, name))
    tables = {name: markdown(study) for name, study in found.items()}
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (anew := with_tables(text, tables)) != text:
            write_whole(str(page), anew)


if __name__ == "__main__":
    cli.parser("scripts.studies.draw_results", __doc__).parse_args()
    draw_all()
