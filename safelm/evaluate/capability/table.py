"""The paper's table 1: a row a model, a column a task, and their average; percent with 95% intervals."""

from collections.abc import Mapping
from typing import Any

from safelm.evaluate.capability.suite import TASKS


def capability_table(results: Mapping[str, Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Models by name with what `run_capability` gave them. Raises ValueError if they ran under different protocols."""
    protocols = {name: result["protocol"] for name, result in results.items()}
    first = next(iter(protocols))
    for name, protocol in protocols.items():
        if different := sorted(key for key in protocol if protocol[key] != protocols[first].get(key)):
            raise ValueError(f"{first} and {name} were measured under different protocols: {different[0]} differs")
    tasks = [name for name in TASKS if name in results[first]["tasks"]]
    rows = [["model", *(TASKS[task][2] for task in tasks), "average"]]
    for name, result in results.items():
        cells = [result["tasks"][task] for task in tasks] + [result["average"]]
        rows.append([name, *(_percent(cell) for cell in cells)])
    rows.append(["items", *(str(results[first]["tasks"][task]["cases"]) for task in tasks), ""])
    if markdown:
        rows.insert(1, ["---", *("---:" for _ in rows[0][1:])])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _percent(estimate: Mapping[str, Any]) -> str:
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
