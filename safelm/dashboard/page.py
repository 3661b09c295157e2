"""Renders a board as JSON and as one HTML page that holds its styles, scripts and data and asks for nothing else.

The page's policy allows its own script and style by their hashes and no request at all. Data stand in the page as JSON
in which no character can end its element, and the script shows them as text, never as markup.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from safelm.dashboard.measures import Board, CaseSet, Cell, Curves, Row

_SCRIPTS = ("elements.js", "board.js", "charts.js", "matrix.js", "frontier.js", "curves.js", "cases.js", "main.js")
_STYLES = ("playground.css", "dashboard.css")
_DIGITS = 5  # of numbers on the page


def to_json(board: Board, title: str) -> dict[str, Any]:
    """The board as JSON: rows, columns, measures, cases, curves, protocols, sources; indices refer to these lists."""
    rows, columns, protocols = board.rows, board.columns, board.protocol_keys
    place = {row: number for number, row in enumerate(rows)}
    return {
        "title": title,
        "headline": headline(board),
        "protocols": [
            {"letter": letter(number), **dataclasses.asdict(board.protocols[key])}
            for number, key in enumerate(protocols)
        ],
        "columns": [dataclasses.asdict(each) | {"protocol": protocols.index(each.protocol)} for each in columns],
        "rows": [dataclasses.asdict(row) | {"label": str(row), "tokens": row.tokens} for row in rows],
        "measures": [
            {"row": place[row], "column": number, **_numbers(cell)}
            for number, column in enumerate(columns)
            for row in rows
            if (cell := board.cell(column, row)) is not None
        ],
        "cases": [
            _cases(cases, protocols.index(cases.protocol), place)
            for cases in sorted(board.cases, key=lambda cases: protocols.index(cases.protocol))
        ],
        "curves": [_curves(each) for each in board.curves],
        "sources": [dataclasses.asdict(each) for each in board.sources],
    }


def render(values: Mapping[str, Any]) -> str:
    """The page of a board's JSON."""
    script, style = (_joined(names) for names in (_SCRIPTS, _STYLES))
    template = _environment().get_template("dashboard.html")
    icon = base64.b64encode(_read("icon.svg").encode()).decode()
    return template.render(
        board=values, script=script, style=style, icon=icon, script_hash=_hash(script), style_hash=_hash(style)
    )


def headline(board: Board) -> str:
    """One sentence: the highest and the lowest rate of harmful answers under the protocol that measured most."""
    rates = [column for column in board.cells if column.title == "harmful answers"]
    if not rates:
        return ""
    column = max(rates, key=lambda each: len(board.cells[each]))
    found = sorted(board.cells[column].items(), key=lambda pair: pair[1].value)
    (best, least), (worst, most) = found[0], found[-1]
    if best == worst:
        return f"Harmful answers to {100 * most.value:.1f}% of harmful prompts ({worst})."
    refusals = board.cells.get(dataclasses.replace(column, title="safe prompts refused"), {})
    price = f", which refuses {100 * refusals[best].value:.1f}% of safe prompts" if best in refusals else ""
    return f"Harmful answers: {100 * most.value:.1f}% ({worst}) down to {100 * least.value:.1f}% ({best}){price}."


def letter(number: int) -> str:
    """A, B, .. Z, AA, AB, .. as spreadsheets name columns."""
    text, number = "", number + 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("A") + rest) + text
    return text


def _numbers(cell: Cell) -> dict[str, Any]:
    found = {"value": _short(cell.value), "low": _short(cell.low), "high": _short(cell.high), "cases": cell.cases}
    if cell.by_seed:
        found["by_seed"] = {str(seed): _short(value) for seed, value in cell.by_seed.items()}
    if cell.by_category:
        found["by_category"] = {name: [_short(each) for each in parts] for name, parts in cell.by_category.items()}
    return found


def _cases(cases: CaseSet, protocol: int, place: Mapping[Row, int]) -> dict[str, Any]:
    """The cases with each label as its place in `labels`; -1 where there is none."""
    names: dict[str, int] = {}

    def coded(values: Sequence[str | None]) -> list[int]:
        return [-1 if value is None else names.setdefault(value, len(names)) for value in values]

    runs = []
    for run in cases.runs:
        found: dict[str, Any] = {"row": place[run.row], "seed": run.seed}
        found["judges"] = {judge: coded(values) for judge, values in run.labels.items()}
        if any(run.outcomes):
            found["outcomes"] = coded(run.outcomes)
        if any(value is not None for value in run.tag_probability):
            found["tag_probability"] = [_short(value) for value in run.tag_probability]
        if any(value is not None for value in run.new_tokens):
            found["new_tokens"] = list(run.new_tokens)
        if run.texts:
            found["texts"] = list(run.texts)
        runs.append(found)
    return {
        "protocol": protocol,
        "ids": list(cases.ids),
        "categories": list(cases.categories),
        "harmful": list(cases.harmful),
        "labels": list(names),
        "runs": runs,
    }


def _curves(curves: Curves) -> dict[str, Any]:
    values = {
        name: {"steps": [step for step, _ in points], "values": [_short(value) for _, value in points]}
        for name, points in sorted(curves.values.items())
    }
    return dataclasses.asdict(dataclasses.replace(curves, values={})) | {"values": values}


def _short(value: float | int | None) -> float | int | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def _joined(names: Sequence[str]) -> str:
    return "\n".join(_read(name) for name in names)


@functools.cache
def _read(name: str) -> str:
    """A file of ours, or of the playground, whose look and elements the page shares."""
    own = importlib.resources.files("safelm.dashboard") / "templates" / name
    shared = importlib.resources.files("safelm.serving") / "playground" / name
    return (own if own.is_file() else shared).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("safelm.dashboard"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment
