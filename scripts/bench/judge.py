"""Measures the judge on our own engine: documents per second, how often free answers break JSON, agreement with people.

The documents are the human-scored ones of the package pyrit (installed with --no-deps), a fixed sample of each level;
only ids and scores are printed. Human scores 0, .25, .5, .75, 1 stand for 0, 1, 3, 4, 5 on the rubric's scale.

example:
  python scripts/bench/judge.py --source=smollm2 --documents=60 --output=judge.json
"""

import csv
import importlib.util
import json
import logging
import os
import platform
import random
import time
from pathlib import Path

import numpy as np

from safelm import cli
from safelm.formats.sources import read_model
from safelm.safety.classifier.metrics import spearman
from safelm.safety.embedding import installed_path
from safelm.safety.ensemble import Agreement
from safelm.safety.judge.local import Judge, JudgeSettings
from safelm.safety.scorer import Verdict

log = logging.getLogger("judge")
LEVELS = {0.0: 0, 0.25: 1, 0.5: 3, 0.75: 4, 1.0: 5}  # a human level and its place among the rubric's


def human_scored(count: int, max_characters: int) -> list[tuple[str, str, int]]:
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
            if not ratings or len(row["assistant_response"]) > max_characters:
                continue
            if (level := LEVELS.get(round(float(np.median(ratings)) * 4) / 4)) is not None:
                by_level.setdefault(level, []).append((f"{path.stem}:{number}", row["assistant_response"], level))
    rng = random.Random(0)
    share = -(-count // len(by_level))
    sample = [row for level in sorted(by_level) for row in rng.sample(sorted(by_level[level]), share)]
    rng.shuffle(sample)  # so that any first few are of all levels
    return sample[:count]


def measured(judge: Judge, texts: list[str], timed: int) -> tuple[dict, list[Verdict]]:
    """The verdicts on all texts, and the speed on the first `timed` of them, whose programs are compiled by then."""
    verdicts = judge.score(texts)
    figures: dict = {"documents": len(texts), "unusable": judge.num_unusable}
    if timed:
        started = time.perf_counter()
        judge.score(texts[:timed])
        took = time.perf_counter() - started
        size = sum(map(len, texts[:timed])) / 1000
        figures |= {"timed_documents": timed, "documents_per_s": timed / took, "kB_per_s": size / took}
    return {name: round(value, 3) for name, value in figures.items()}, verdicts


def against_people(levels: list[int], verdicts: list[Verdict]) -> dict:
    """Agreement of the judge with the human levels, and how the expected score ranks the documents."""
    counts = Agreement(["people", "judge"])
    for level, verdict in zip(levels, verdicts, strict=True):
        counts.add([Verdict(level), verdict])
    (pair,) = counts.report()["pairs"]
    expected = [verdict.details.get("expected_score") for verdict in verdicts]
    if None not in expected:
        pair["spearman_of_expected_score"] = round(spearman(np.array(levels, float), np.array(expected)), 3)
    return pair


def main() -> None:
    parser = cli.parser("scripts.bench.judge", __doc__)
    parser.add_argument("--source", default="smollm2", help="what safelm.safety.judge.load_judge takes")
    parser.add_argument("--documents", type=int, default=60, help="scored without a reason, against people")
    parser.add_argument("--timed", type=int, default=20, help="of these, scored again for the speed")
    parser.add_argument("--with_reason", type=int, default=10, help="scored with a reason")
    parser.add_argument("--free", type=int, default=30, help="answered freely")
    parser.add_argument("--max_characters", type=int, default=1500, help="documents longer than this are left out")
    parser.add_argument("--output", help="write the figures as JSON here too")
    flags = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = human_scored(flags.documents, flags.max_characters)
    texts, levels = [text for _, text, _ in rows], [level for *_, level in rows]
    result: dict = {"machine": platform.platform(), "load_average": os.getloadavg(), "source": flags.source}
    result["mean_characters"] = round(float(np.mean([len(text) for text in texts])))
    runs = {
        "score only": (flags.documents, flags.timed, JudgeSettings(reason_tokens=0)),
        "score and reason": (flags.with_reason, flags.with_reason, JudgeSettings()),
        "free answer": (flags.free, 0, JudgeSettings(constrained=False)),
    }
    place = str(installed_path("smollm2")) if flags.source == "smollm2" else flags.source
    loaded = read_model(place)
    for name, (count, timed, settings) in runs.items():
        figures, verdicts = measured(Judge(*loaded, settings, source=place), texts[:count], timed)
        if not timed or not settings.reason_tokens:
            figures["against_people"] = against_people(levels[:count], verdicts)
        if not settings.reason_tokens:
            result["scores"] = {identity: verdict.score for (identity, *_), verdict in zip(rows, verdicts, strict=True)}
        result[name] = figures
        log.info("%s: %s", name, json.dumps(figures))
    if flags.output:
        Path(flags.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    log.info("%s", json.dumps(result))


if __name__ == "__main__":
    main()
