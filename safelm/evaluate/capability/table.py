"""The paper's table 1: a row per model, a column per task, and the average, in percent with 95% intervals."""

from collections.abc import Mapping
from typing import Any

from safelm.evaluate.capability.suite import TASKS
from safelm.report.table import Cell, Table, count, share, words


def capability_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The table of models by name with their results of `run_capability`.

    Raises ValueError if their protocols differ.
    """
    protocols = {name: result["protocol"] for name, result in results.items()}
    first = next(iter(protocols))
    for name, protocol in protocols.items():
        if different := sorted(key for key in protocol if protocol[key] != protocols[first].get(key)):
            raise ValueError(f"{first} and {name} were measured under different protocols: {different[0]} differs")
    tasks = [name for name in TASKS if name in results[first]["tasks"]]
    rows = [
        [words(name), *(share(result["tasks"][task]) for task in tasks), share(result["average"])]
        for name, result in results.items()
    ]
    rows.append([words("items"), *(count(results[first]["tasks"][task]["cases"]) for task in tasks), Cell("")])
    return Table("Percent [95% interval]", ["model", *(TASKS[task][2] for task in tasks), "average"], rows)
