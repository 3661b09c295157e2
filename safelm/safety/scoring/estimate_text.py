"""An estimate in print: shares of the scores, and how documents, speed, hours and a price follow from each other."""

from collections.abc import Mapping
from typing import Any

from safelm.report.table import Cell, Table, count, number, words


def markdown(report: Mapping[str, Any]) -> str:
    """The report in print."""
    sample, speed, cost = report["sample"], report["speed"], report["cost"]
    lines = [
        f"Estimate from {sample['documents']:,} documents (seed {sample['seed']}) in {sample['places']:,} places of "
        f"{sample['files']:,} of {report['input']['files']:,} files",
        "",
        _table(report).markdown(),
        "",
        _intervals(sample),
        "",
        *_arithmetic(report),
        "",
        *_speed_lines(speed),
        *_cost_lines(cost),
    ]
    return "\n".join(lines)


def _table(report: Mapping[str, Any]) -> Table:
    total = report["documents"]["value"]
    rows = []
    for name, found in report["scores"].items():
        share = Cell(_percent(found["value"]), found, interval=(_percent(found["low"]), _percent(found["high"])))
        rows.append([words(name), count(found["count"]), share, count(round(total * found["value"]))])
    return Table("", ["harm score", "in the sample", "% [95%]", "documents of the corpus"], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _intervals(sample: Mapping[str, Any]) -> str:
    if sample["is_all"]:
        return "These are all documents there are: nothing is drawn, nothing uncertain but the speed."
    return (
        f"Intervals count {sample['clusters']:,} places, not documents, as drawn: those of one place (a row group, a "
        "megabyte of lines, a compressed file; where only some files were looked into, a file) are alike."
    )


def _arithmetic(report: Mapping[str, Any]) -> list[str]:
    lines = ["Documents of the corpus:"]
    for total in report["totals"]:
        lines.append(f"- {total['kind']}: {_range(total['documents'])} = {total['how']}")
    length = report["characters_per_document"]
    return [*lines, f"- together {_range(report['documents'])}, of {_range(length)} characters each"]


def _speed_lines(speed: Mapping[str, Any]) -> list[str]:
    if not speed["documents_per_second"]:
        return ["Speed: no document of the sample has content, nothing was measured."]
    tokens = ""
    if speed["tokens_per_second"]:
        tokens = f", {speed['tokens_per_second']:,.0f} tokens/s with {_percent(speed['padding'])}% padding"
    lines = [
        f"Scorers alone, one process here: {number(speed['documents_per_second'])} documents/s, "
        f"{speed['characters_per_second']:,.0f} characters/s{tokens} "
        f"({speed['documents']:,} documents in {speed['seconds']:.1f} s)"
    ]
    if speed["programs"]:
        lines.append(f"beside {speed['programs']} programs compiled first in {speed['compiling_seconds']:.1f} s")
    return lines


def _cost_lines(cost: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Hours of one = documents * characters each / characters per second / 3,600 = {_range(cost['chip_hours'])}",
        f"Hours of {cost['chips']} side by side: {_range(cost['hours'])}",
    ]
    if cost["price"] is not None:
        lines.append(f"Price at {cost['price_per_hour']:g} an hour each: {_range(cost['price'])}")
    return [
        *lines,
        "Reading, writing and loading come on top, and a text that is repeated in a file is scored once "
        "(--output_rows=annotations): so much less. Speed elsewhere is not known from here.",
    ]


def _range(found: Mapping[str, float]) -> str:
    value, low, high = (number(found[end]) for end in ("value", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"
