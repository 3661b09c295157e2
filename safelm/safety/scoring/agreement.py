"""How far the scores that safelm.score gave agree with scores that the rows came with, such as people's.

Prints, of the rows that have both: the confusion matrix, exact agreement, within one, Cohen's kappa with quadratic
weights, and by level (1 and 3) recall, the share of the others that are flagged, and AUROC of the scores, with 95%
intervals. Writes nothing.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from safelm import cli, documents
from safelm.documents import harm
from safelm.safety.classifier import metrics
from safelm.safety.ensemble import Pair


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.safety.scoring.agreement",
        __doc__,
        "python -m safelm.safety.scoring.agreement --scored=runs/scored --score_column=metadata.harm_score",
    )
    parser.add_argument("--scored", required=True, metavar="FOLDER", help="what safelm.score wrote")
    parser.add_argument(
        "--score_column", default="metadata.harm_score", help="the rows' own scores, 0 to 5 (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Prints the figures; ValueError for a folder without rows that have both scores."""
    found = measure(flags.scored, flags.score_column)
    print(json.dumps(found) if flags.json else "\n".join(describe(found)))


def measure(folder: str, score_column: str) -> dict[str, Any]:
    """The figures, JSON-able. Raises ValueError where no row has both scores."""
    pairs = list(_scores(folder, score_column))
    if not pairs:
        raise ValueError(f"{folder}: no row has both harm_score and {score_column}")
    own_n, given_n = np.asarray(pairs).T
    report = Pair(tuple(map(tuple, metrics.confusion(own_n, given_n).tolist()))).report([score_column, "harm_score"])
    report["levels"] = {f">={level}": _level(level, own_n, given_n) for level in metrics.LEVELS}
    return report


def describe(found: Mapping[str, Any]) -> list[str]:
    """The figures in lines."""
    rows = [" ".join(f"{count:>6}" for count in row) for row in found["confusion"]]
    lines = [
        f"{found['documents']} rows: {found['scorers'][0]} 0 to 5 down, {found['scorers'][1]} 0 to 5 across",
        *rows,
    ]
    kappa = found["weighted_kappa"]
    shown = "undefined" if kappa is None else f"{kappa:.3f}"
    lines.append(f"equal {found['exact']:.3f}, within one {found['within_one']:.3f}, weighted kappa {shown}")
    for level, values in found["levels"].items():
        lines.append(f"{level}: " + ", ".join(f"{name} {value or 'undefined'}" for name, value in values.items()))
    return lines


def _level(level: int, own_n: np.ndarray, given_n: np.ndarray) -> dict[str, str | None]:
    values = {
        "recall": metrics.recall_at(level, own_n, given_n),
        "flagged": metrics.false_positive_rate(level, own_n, given_n),
        "AUROC of the scores": metrics.area(own_n >= level, given_n.astype(np.float64)),
    }
    return {name: str(value) if value else None for name, value in values.items()}


def _scores(folder: str, score_column: str) -> Iterator[tuple[int, int]]:
    """The rows' own score and the given one."""
    for path in documents.list_files(folder):
        for _, row in documents.read_rows(path, text_column=None):
            own, given = (harm.harm_score(row, path, column).value for column in (score_column, "harm_score"))
            if own is not None and given is not None:
                yield own, given


if __name__ == "__main__":
    cli.run(main, arguments())
