"""Compares results of safelm.evaluate: tables in the paper's form, figures with intervals, one HTML page.

Checkpoints are grouped by name, MODEL@STAGE#SEED. Runs of one stage and suite must have the same protocol; the first
difference ends the command. `--may_differ=FIELD` allows a difference on purpose.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safelm import cli
from safelm.evaluate.comparing import Comparison, Row, compare, read_runs
from safelm.evaluate.comparing.figures import draw_all
from safelm.evaluate.comparing.page import html_page, markdown, sections
from safelm.evaluate.comparing.results import runs_of
from safelm.io.files import write_whole
from safelm.report.table import Table


def main(arguments: argparse.Namespace) -> None:
    """Reads and checks the results and writes the report."""
    comparison = compare(
        read_runs(arguments.results),
        stages=_names(arguments.stages),
        models=_names(arguments.models),
        may_differ=_names(arguments.may_differ),
    )
    model, _, method = arguments.baseline.partition("+")
    baseline = Row(model, method or "greedy") if model else None
    tables = sections(comparison, baseline)
    print("\n\n".join(f"{title}\n{table.plain()}" for title, table in tables.items()))
    paths = write(arguments.output, comparison, tables)
    print("\n".join(map(str, paths)))


def write(output: str, comparison: Comparison, tables: Mapping[str, Table]) -> list[pathlib.Path]:
    """Writes `report.md`, `report.json`, `report.html` and the figures; returns their paths."""
    folder = pathlib.Path(output)
    figures = draw_all(folder, comparison)
    texts = {
        "report.md": markdown(comparison, tables),
        "report.json": json.dumps({title: table.to_json() for title, table in tables.items()}, indent=1) + "\n",
        "report.html": html_page(comparison, tables),
    }
    return [write_whole(folder / name, text) for name, text in texts.items()] + figures


def write_single(output: str, results: Mapping[str, Any]) -> list[pathlib.Path]:
    """Writes one command's `results.json` and, if it decoded, its report."""
    folder = pathlib.Path(output)
    text = json.dumps(results, indent=1) + "\n"
    path = write_whole(folder / "results.json", text)
    runs = runs_of(results, output)
    if not runs:
        return [path]
    comparison = compare(runs)
    tables = sections(comparison)
    for title, table in tables.items():
        print(f"{title}\n{table.plain()}\n")
    return [path, *write(output, comparison, tables)]


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = cli.parser(
        "safelm.evaluate report",
        __doc__,
        "python -m safelm.evaluate report --results=W/base --results=W/chat --stages=base,instruct,benign \\\n"
        "      --baseline=raw --output=W/report",
    )
    add = made.add_argument
    add("--results", action="append", required=True, metavar="PATH", help="results.json or its folder; repeatable")
    add("--output", required=True, metavar="DIR", help="folder for report.md, report.html, report.json and figures")
    add("--stages", default="", help="their order, comma-separated (default: as found)")
    add("--models", default="", help="their order, comma-separated (default: as found)")
    add(
        "--baseline",
        default="",
        metavar="MODEL[+METHOD]",
        help="row that others are compared with (default: the first)",
    )
    add("--may_differ", default="", metavar="FIELDS", help="comma-separated protocol fields that may differ")
    return made


def _names(flag: str) -> list[str]:
    return [name.strip() for name in flag.split(",") if name.strip()]
