"""Measures the judge on our own engine: documents per second, how often free answers break JSON, agreement with people.

The documents are the human-scored ones of the package pyrit (installed with --no-deps), a fixed sample of each level;
only ids and scores are printed. Human scores 0, .25, .5, .75, 1 stand for 0, 1, 3, 4, 5 on the rubric's scale.

example:
  python scripts/bench_judge.py --source=smollm2 --documents=60 --output=judge.json
"""

import argparse
import csv
import importlib.util
import json
import logging
import platform
import random
import time
from pathlib import Path

import numpy as np

from safelm.safety.ensemble import Agreement
from safelm.safety.judge import load_judge
from safelm.safety.scorer import Verdict

log = logging.getLogger("bench_judge")
LEVELS = {0.0: 0, 0.25: 1, 0.5: 3, 0.75: 4, 1.0: 5}  # a human level and its place among the rubric's


def human_scored(count: int) -> list[tuple[str, str, int]]:
    """(id, text, level) of a fixed sample, as many of each level as there are; FileNotFoundError without pyrit."""
    spec = importlib.util.find_spec("pyrit")
    if spec is None:
        raise FileNotFoundError("needs the package pyrit (pip install --no-deps pyrit==1.1.0)")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "scorer_evals" / "harm"
    by_level: dict[int, list[tuple[str, str, int]]] = {}
    for path in sorted(folder.glob("*.csv")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, row in enumerate(csv.DictReader(lines[1:] if lines[0].startswith("#") else lines)):
            ratings = [float(value) for name, value in row.items() if name and name.startswith("human_score") and value]
            if ratings and (level := LEVELS.get(round(float(np.median(ratings)) * 4) / 4)) is not None:
                by_level.setdefault(level, []).append((f"{path.stem}:{number}", row["assistant_response"], level))
    rng = random.Random(0)
    share = -(-count // len(by_level))
    return [row for level in sorted(by_level) for row in rng.sample(sorted(by_level[level]), share)][:count]


def timed(source: str, texts: list[str], **options) -> tuple[dict, list[Verdict]]:
    """Loads, warms up on the same documents (so that every bucket is compiled), and scores them once more."""
    started = time.perf_counter()
    judge = load_judge(source, **options)
    loaded = time.perf_counter()
    judge.score(texts)
    warm = time.perf_counter()
    unusable = judge.num_unusable
    verdicts = judge.score(texts)
    took = time.perf_counter() - warm
    figures = {"load_s": loaded - started, "first_run_s": warm - loaded, "seconds": took}
    figures |= {"documents_per_s": len(texts) / took, "kB_per_s": sum(map(len, texts)) / took / 1000}
    figures |= {"chunks": sum(int(v.details["chunks"]) for v in verdicts), "unusable": unusable}
    return {name: round(value, 3) for name, value in figures.items()}, verdicts


def against_people(levels: list[int], verdicts: list[Verdict]) -> dict:
    """Agreement of the judge with the human levels, and how the expected score ranks the documents."""
    counts = Agreement(["people", "judge"])
    for level, verdict in zip(levels, verdicts, strict=True):
        counts.add([Verdict(level), verdict])
    (pair,) = counts.report()["pairs"]
    expected = [verdict.details.get("expected_score") for verdict in verdicts]
    if None not in expected:
        pair["spearman_of_expected_score"] = round(spearman(levels, expected), 3)
    return pair


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation, ties at their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2", help="what safelm.safety.judge.load_judge takes")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--reason_tokens", type=int, default=40)
    parser.add_argument("--output", help="write the figures as JSON here too")
    flags = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = human_scored(flags.documents)
    texts, levels = [text for _, text, _ in rows], [level for *_, level in rows]
    result: dict = {"machine": platform.platform(), "source": flags.source, "documents": len(rows)}
    result["mean_characters"] = round(float(np.mean([len(text) for text in texts])))
    runs = {
        "score only": {"reason_tokens": 0},
        "score and reason": {"reason_tokens": flags.reason_tokens},
        "free answer": {"constrained": False},
    }
    for name, options in runs.items():
        figures, verdicts = timed(flags.source, texts, **options)
        result[name] = figures | {"against_people": against_people(levels, verdicts)}
        log.info("%s: %s", name, json.dumps(figures))
    result["scores"] = {identity: verdict.score for (identity, *_), verdict in zip(rows, verdicts, strict=True)}
    if flags.output:
        Path(flags.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    log.info("%s", json.dumps(result))


if __name__ == "__main__":
    main()
