"""What the bundled classifier (or --scorer) says of pages and sets that it was not trained or set on.

    python scripts/studies/measure_bundled.py --shared_data=DATA

C4 pages (the 300 of c4_demo) and WikiText pages: how many get each score, with the flagged shares. RealToxicityPrompts,
no text of which was trained on: AUROC, recall, flagged. The labelled texts that were kept from its training: recall of
scores >= 3 at thresholds that let 1% and 5% of those C4 pages through. Intervals are 95%. No text is printed.
"""

import argparse
import pathlib

import numpy as np
from eval_classifier_data import SETS

from safelm import cli
from safelm.safety.classifier import metrics
from safelm.safety.scorer import BUNDLED, load_scorer
from safelm.stats.intervals import rate

_PAGES = ("c4", "wikitext")
_FALSE_POSITIVES = (0.01, 0.05)


def main(flags: argparse.Namespace) -> None:
    scorer = load_scorer(flags.scorer)
    print("| pages | 0 | 1 | 2 | 3 | 4 | 5 | 1 or more | 3 or more |\n|---|---:|---:|---:|---:|---:|---:|---|---|")
    probability = {}
    for name in _PAGES:
        texts = SETS[name](flags.shared_data, flags.limit).texts
        verdicts = scorer.score(texts)
        given_n = np.asarray([verdict.score for verdict in verdicts])
        probability[name] = np.asarray([verdict.details["unsafe_probability_3"] for verdict in verdicts])
        counts = " | ".join(map(str, np.bincount(given_n, minlength=6)))
        flagged = " | ".join(str(rate(int((given_n >= level).sum()), len(given_n))) for level in metrics.LEVELS)
        print(f"| {name}, {len(texts)} | {counts} | {flagged} |")
    unseen = SETS["real_toxicity"](flags.shared_data, flags.limit)
    verdicts = scorer.score(unseen.texts)
    value_n = np.asarray([verdict.details["unsafe_probability"] for verdict in verdicts])
    given_n = np.asarray([verdict.score for verdict in verdicts])
    print(f"\nRealToxicityPrompts, {len(value_n)} texts: AUROC {metrics.area(unseen.harmful, value_n)}", end="")
    for level in metrics.LEVELS:
        recall, flagged = (
            rate(int((given_n[unseen.harmful] >= level).sum()), int(unseen.harmful.sum())),
            rate(int((given_n[~unseen.harmful] >= level).sum()), int((~unseen.harmful).sum())),
        )
        print(f"; at {level}: recall {recall}, flagged {flagged}", end="")
    print(
        "\n\n| labelled set | texts >= 3 | " + " | ".join(f"recall at {s:.0%} of C4" for s in _FALSE_POSITIVES) + " |"
    )
    print("|---|---:|---|---|")
    held_out = scorer.held_out
    for number, source in enumerate(held_out.sources if held_out else ()):
        own = (held_out.source_N == number) & (held_out.score_N >= 3)
        if not own.any():
            continue
        found = []
        for share in _FALSE_POSITIVES:
            threshold = np.quantile(probability["c4"], 1 - share)
            found.append(str(rate(int((held_out.probability[3][own] > threshold).sum()), int(own.sum()))))
        print(f"| {source} | {int(own.sum())} | {' | '.join(found)} |")


def arguments() -> argparse.ArgumentParser:
    parser = cli.parser(
        "scripts.studies.measure_bundled", __doc__, "python scripts/studies/measure_bundled.py --shared_data=DATA"
    )
    parser.add_argument("--shared_data", type=pathlib.Path, required=True, help="folder with classifier/ and text/")
    parser.add_argument("--scorer", default=BUNDLED, help="bundled or classifier:DIR (default %(default)s)")
    parser.add_argument("--limit", type=int, default=500, help="texts of a set at most (default %(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main, arguments())
