"""How fast the bundled classifier scores web pages on one core, beside simple classifiers of scikit-learn.

    python scripts/bench/bundled.py --pages='web/*.jsonl.gz' [--rounds=5]

Every round scores the same pages in this process, pinned to one core, in changing order; seconds are the processor's.
Sides: the bundled scorer's verdicts; TF-IDF (words and pairs) with logistic regression; TF-IDF of character 3- to
5-grams inside words with the same; alt-profanity-check, where it is installed. scikit-learn's models are fitted on
these pages with labels drawn at random, before the clock: what counts here is their cost. The first batch of the
bundled scorer pays for every word it has not met, as it does in use; nothing is warmed up for it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from safelm import cli, documents
from safelm.safety import ngrams


def main() -> None:
    """Prints a table of rates and of ratios to the bundled scorer."""
    parser = cli.parser("scripts.bench.bundled", __doc__, "python scripts/bench/bundled.py --pages='web/*.jsonl.gz'")
    parser.add_argument("--pages", required=True, help="files of pages with a column text")
    parser.add_argument("--limit", type=int, default=1000, help="pages at most (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    flags = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    texts = read(flags)
    sides = {"bundled": bundled, **rivals(texts)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(flags.rounds):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.process_time()
            sides[name](texts)
            seconds[name].append(time.process_time() - started)
    print(f"{len(texts):,} pages, {sum(map(len, texts)) / len(texts):,.0f} characters each, one core\n")
    print("| scorer | pages/s a core | bundled is so many times as fast |\n|---|---:|---:|")
    for name, taken in seconds.items():
        ratios = [own / base for own, base in zip(taken, seconds["bundled"], strict=True)]
        rate = len(texts) / statistics.median(taken)
        print(f"| {name} | {rate:,.0f} | {statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}] |")


def read(flags: argparse.Namespace) -> list[str]:
    """The pages' texts."""
    rows = (row["text"] for path in documents.list_files(flags.pages) for _, row in documents.read_rows(path))
    return [text for text, _ in zip(rows, range(flags.limit), strict=False)]


def bundled(texts: Sequence[str]) -> object:
    """Verdicts of a scorer that was just loaded."""
    return ngrams.load_bundled().score(texts)


def rivals(texts: Sequence[str]) -> dict[str, Callable[[Sequence[str]], object]]:
    """The other sides; those that are not installed are left out with a line."""
    found: dict[str, Callable[[Sequence[str]], object]] = {}
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        print("scikit-learn is not installed")
        return found
    label = np.random.default_rng(0).integers(0, 2, len(texts))
    vectors = {
        "TF-IDF, words and pairs, logistic regression": TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, min_df=2
        ),
        "TF-IDF, character 3- to 5-grams, logistic regression": TfidfVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=2
        ),
    }
    for name, vector in vectors.items():
        found[name] = make_pipeline(vector, LogisticRegression()).fit(texts, label).predict_proba
    try:
        from profanity_check import predict_prob
    except ImportError:
        print("alt-profanity-check is not installed (pip install --no-deps alt-profanity-check)")
        return found
    return found | {"alt-profanity-check": lambda texts: predict_prob(list(texts))}


if __name__ == "__main__":
    main()
