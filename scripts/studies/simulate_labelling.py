"""What labels of one's own are worth: an annotator played by held-out labels of public sets.

  python scripts/studies/simulate_labelling.py --shared_data=DATA --output=docs/results/data

Each set in turn is the user's: two scorers (linear on hashed words, on hashed runs of characters) and a classifier (on
both) are trained on all other sets and safe web pages, and know nothing of it. Half of the user's texts are the pool
that `safelm.safety.labelling` chooses from, the other half the test. The classifier is then trained again with the
chosen texts and their labels, each counting `WEIGHTS` times, a factor settled beforehand on the sets of DEVELOPMENT,
which are no user's afterwards.

Strategies: "random"; "disagreement" and "entropy" with the command's random share of a fifth, and without ("only").
Measures on the test half: AUROC, the share of texts on the wrong side of 1/2 ("error"), and the mean of the shares of
harmful and harmless ones that are ("balanced_error"). Intervals of means are clustered by set and seed, differences are
paired. Also: does the interval from the random share hold the classifier's true error on the pool, and how far off is
the share of all chosen documents. No text is printed.
"""

import argparse
import csv
import dataclasses
import functools
import io
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import tqdm
from eval_classifier_data import SETS, LabelledSet
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from safelm import cli
from safelm.io import files
from safelm.safety.classifier.examples import text_key
from safelm.safety.labelling.choice import Candidate, ChoiceSettings, Chooser
from safelm.safety.labelling.uncertainty import Opinion
from safelm.stats.comparison import clustered_mean
from safelm.stats.intervals import auroc, rate

USERS = ("openai_moderation", "toxigen", "dynahate", "davidson", "implicit_hate", "edos")
DEVELOPMENT = ("ken20", "real_toxicity")
LABELS = (25, 50, 100, 200)
STRATEGIES = {  # method and random share
    "random": ("random", 1.0),
    "disagreement": ("disagreement", 0.2),
    "disagreement only": ("disagreement", 0.0),
    "entropy": ("entropy", 0.2),
    "entropy only": ("entropy", 0.0),
}
WEIGHTS = (1.0, 5.0, 20.0, 80.0)
CHARACTERS = 1000  # of a text that the linear models see


@dataclasses.dataclass
class Problem:
    """One user's texts with the models that have not seen them.

    Attributes:
      base_x, base_y: features (n, f) and labels of all other sets; `x`, `y`, `texts` of the user's own.
      words: how many features are words; those behind them are runs of characters.
    """

    base_x: Any
    base_y: np.ndarray
    x: Any
    y: np.ndarray
    texts: Sequence[str]
    words: int

    def __post_init__(self) -> None:
        self.base = _fit(self.base_x, self.base_y)
        self.scorers = [_fit(self.base_x[:, part], self.base_y) for part in self.parts]

    @property
    def parts(self) -> tuple[slice, slice]:
        return slice(0, self.words), slice(self.words, None)

    def opinions(self) -> list[tuple[float, float, float]]:
        """P(harm) of every text by the classifier and the two scorers."""
        found = [self.base.predict_proba(self.x)[:, 1]]
        for scorer, part in zip(self.scorers, self.parts, strict=True):
            found.append(scorer.predict_proba(self.x[:, part])[:, 1])
        return list(zip(*found, strict=True))

    def trained_with(self, rows: Sequence[int], weight: float) -> LogisticRegression:
        """The classifier, trained again with so many of the user's texts."""
        x = scipy.sparse.vstack([self.base_x, self.x[rows]], format="csr")
        y = np.concatenate([self.base_y, self.y[rows]])
        weights = np.concatenate([np.ones(len(self.base_y)), np.full(len(rows), weight)])
        return _fit(x, y, weights, start=self.base)


def _fit(x: Any, y: np.ndarray, weights: np.ndarray | None = None, start: Any = None) -> LogisticRegression:
    model = LogisticRegression(C=4.0, max_iter=200, tol=1e-3, warm_start=True)
    if start is not None:
        model.classes_, model.coef_, model.intercept_ = start.classes_, start.coef_.copy(), start.intercept_.copy()
    return model.fit(x, y, weights)


def problem(name: str, sets: Mapping[str, LabelledSet], vectors: Mapping[str, Any], words: int, most: int) -> Problem:
    """The user's set beside `most` texts of each other one, without those that it shares with them."""
    own = {text_key(text) for text in sets[name].texts}
    others = [other for other in sets if other != name]
    keep = [[i for i, text in enumerate(sets[other].texts[:most]) if text_key(text) not in own] for other in others]
    counts = scipy.sparse.vstack([vectors[other][rows] for other, rows in zip(others, keep, strict=True)], format="csr")
    harmful = [sets[other].harmful[rows] for other, rows in zip(others, keep, strict=True)]
    parts = (slice(0, words), slice(words, None))
    tfidf = [TfidfTransformer(sublinear_tf=True).fit(counts[:, part]) for part in parts]

    def weighed(found: Any) -> Any:
        pieces = [each.transform(found[:, part]) for each, part in zip(tfidf, parts, strict=True)]
        return scipy.sparse.hstack(pieces, format="csr")

    base_y, y = np.concatenate(harmful).astype(int), sets[name].harmful.astype(int)
    return Problem(weighed(counts), base_y, weighed(vectors[name]), y, sets[name].texts, words)


def choose(
    strategy: str, labels: int, seed: int, pool: Sequence[int], setting: Problem, said: Sequence[Any]
) -> list[tuple[int, bool]]:
    """The rows to label, chosen by the command's own code, and which are of the random share."""
    method, share = STRATEGIES[strategy]
    chooser = Chooser(ChoiceSettings(labels, share, method, seed))
    for row in pool:
        own, *scorers = said[row]
        committee = {f"s{i}": _opinion(p) for i, p in enumerate(scorers)}
        opinions = committee if method == "disagreement" else {"classifier": _opinion(own)}
        chooser.add(Candidate("pool", row, str(row), setting.texts[row], round(5 * own), opinions))
    return [(each.row, is_random) for each, is_random in chooser.chosen()]


def _opinion(probability: float) -> Opinion:
    return Opinion(round(5 * probability), 5 * float(probability), (1 - float(probability), float(probability)))


def measures(model: LogisticRegression, x: Any, y: np.ndarray) -> dict[str, float]:
    """AUROC and errors on a test half."""
    given = model.predict_proba(x)[:, 1]
    wrong = (given >= 0.5) != y
    balanced = (wrong[y == 1].mean() + wrong[y == 0].mean()) / 2
    area = auroc(given[y == 1], given[y == 0]).value
    return {"auroc": area, "error": float(wrong.mean()), "balanced_error": float(balanced)}


def halves(name: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pool and of the test."""
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def simulate(name: str, setting: Problem, seeds: Sequence[int], weight: float, bar: Any) -> list[dict[str, Any]]:
    """One user's set: a row a seed, strategy and number of labels."""
    said, found = setting.opinions(), []
    for seed in seeds:
        pool, test = halves(name, seed, len(setting.y))
        x, y = setting.x[test], setting.y[test]
        found.append({"set": name, "seed": seed, "strategy": "none", "labels": 0, **measures(setting.base, x, y)})
        wrong = {row: (said[row][0] >= 0.5) != setting.y[row] for row in pool}
        for strategy in STRATEGIES:
            for labels in LABELS:
                chosen = choose(strategy, labels, seed, pool, setting, said)
                rows = [row for row, _ in chosen]
                row = {"set": name, "seed": seed, "strategy": strategy, "labels": labels, "chosen": len(rows)}
                row |= measures(setting.trained_with(rows, weight), x, y)
                row["harmful_share"] = float(setting.y[rows].mean())
                drawn = [row for row, is_random in chosen if is_random]
                if drawn:
                    estimate = rate(int(sum(wrong[row] for row in drawn)), len(drawn))
                    row |= {"true_error": float(np.mean(list(wrong.values())))}
                    row |= {"estimate": estimate.value, "low": estimate.low, "high": estimate.high}
                    row["error_of_all_chosen"] = float(np.mean([wrong[each] for each in rows]))
                found.append(row)
                bar.update(1)
    return found


def weight_of(settings: Mapping[str, Problem], seeds: Sequence[int]) -> tuple[float, dict[str, float]]:
    """How often a label of one's own counts: the best mean balanced error after 100 random labels, development sets."""
    tried = {}
    for weight in WEIGHTS:
        values = []
        for name, setting in settings.items():
            said = setting.opinions()
            for seed in seeds:
                pool, test = halves(name, seed, len(setting.y))
                rows = [row for row, _ in choose("random", 100, seed, pool, setting, said)]
                model = setting.trained_with(rows, weight)
                values.append(measures(model, setting.x[test], setting.y[test])["balanced_error"])
        tried[str(weight)] = float(np.mean(values))
    return float(min(tried, key=tried.__getitem__)), tried


MEASURES = ("auroc", "error", "balanced_error")


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over sets and seeds, differences from no labels and from random ones, coverage of the random share."""
    at = {(row["set"], row["seed"], row["strategy"], row["labels"]): row for row in rows}
    places = sorted({(row["set"], row["seed"]) for row in rows})

    def mean(value: Any, chosen: Sequence[Any] = places) -> dict[str, Any]:
        factors = [[place[i] for place in chosen] for i in range(2)]
        return vars(clustered_mean([value(*place) for place in chosen], *factors))

    result: dict[str, Any] = {"none": {m: mean(lambda s, n, m=m: at[s, n, "none", 0][m]) for m in MEASURES}}
    for strategy in STRATEGIES:
        for labels in LABELS:
            entry = result.setdefault(strategy, {}).setdefault(str(labels), {})
            for m in MEASURES:
                entry[m] = mean(lambda s, n, m=m, k=(strategy, labels): at[s, n, *k][m])
                entry[f"{m} less none"] = mean(
                    lambda s, n, m=m, k=(strategy, labels): at[s, n, *k][m] - at[s, n, "none", 0][m]
                )
                entry[f"{m} less random"] = mean(
                    lambda s, n, m=m, k=(strategy, labels): at[s, n, *k][m] - at[s, n, "random", k[1]][m]
                )
    result["by_set"] = {
        name: {
            strategy: {
                m: mean(
                    lambda s, n, m=m, k=strategy: at[s, n, k, 0 if k == "none" else 100][m],
                    [place for place in places if place[0] == name],
                )
                for m in MEASURES
            }
            for strategy in ("none", *STRATEGIES)
        }
        for name in dict.fromkeys(place[0] for place in places)
    }
    told = [row for row in rows if "estimate" in row and row["strategy"] in ("disagreement", "entropy")]
    result["random_share"] = {
        str(labels): {
            "holds": vars(rate(sum(_holds(row) for row in of), len(of))),
            "off": float(np.mean([row["estimate"] - row["true_error"] for row in of])),
            "off_of_all_chosen": float(np.mean([row["error_of_all_chosen"] - row["true_error"] for row in of])),
        }
        for labels in LABELS
        if (of := [row for row in told if row["labels"] == labels])
    }
    return result


def _holds(row: Mapping[str, Any]) -> bool:
    return row["low"] <= row["true_error"] <= row["high"]


SHOWN = ("random", "disagreement", "entropy")


def study(found: Mapping[str, Any]) -> dict[str, Any]:
    """The balanced error by strategy and number of labels, in the form that `draw_results.py` takes."""

    def cell(entry: Mapping[str, Any]) -> list[float]:
        return [round(100 * entry["balanced_error"][name], 1) for name in ("value", "low", "high")]

    rows = [{"name": "no label", "values": [cell(found["none"])] * len(SHOWN)}]
    rows += [
        {"name": f"{labels} labels", "values": [cell(found[strategy][str(labels)]) for strategy in SHOWN]}
        for labels in LABELS
    ]
    return {
        "title": "Error on a user's own texts after labels of one's own",
        "command": "python scripts/studies/simulate_labelling.py --shared_data=DATA --output=docs/results/data",
        "machine": "two CPU cores; linear classifier, six public sets as the user's, five draws each",
        "axis": "balanced error, %",
        "scale": "linear",
        "head": "labelled",
        "columns": [{"head": head, "unit": "%", "digits": 1, "drawn": True} for head in SHOWN],
        "rows": rows,
    }


def write(folder: str, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """Writes every row and the table."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    files.write_whole(pathlib.Path(folder) / "labelling.csv", text.getvalue())
    files.write_whole(pathlib.Path(folder) / "labelling.json", json.dumps(study(found), indent=1) + "\n")


def main(flags: argparse.Namespace) -> None:
    """Simulates, writes rows and table, prints the summary."""
    shared = pathlib.Path(flags.shared_data)
    sets = {name: SETS[name](shared, flags.limit) for name in (*USERS, *DEVELOPMENT, "c4", "wikitext")}
    bits = {"n_features": 1 << flags.bits, "alternate_sign": False, "norm": None}
    hashes = [
        HashingVectorizer(ngram_range=(1, 2), **bits),
        HashingVectorizer(analyzer="char_wb", ngram_range=(3, 4), **bits),
    ]
    vectors = {
        name: scipy.sparse.hstack([h.transform([t[:CHARACTERS] for t in each.texts]) for h in hashes], format="csr")
        for name, each in sets.items()
    }
    make = functools.partial(problem, sets=sets, vectors=vectors, words=1 << flags.bits, most=flags.base_limit)
    weight, tried = weight_of({name: make(name) for name in DEVELOPMENT}, range(3))
    rows: list[dict[str, Any]] = []
    total = len(USERS) * flags.seeds * len(STRATEGIES) * len(LABELS)
    with tqdm.tqdm(total=total, unit="training", disable=None) as bar:
        for name in USERS:
            rows += simulate(name, make(name), range(flags.seeds), weight, bar)
            found = summary(rows)
            write(flags.output, rows, found)
    print(json.dumps(found | {"weight": weight, "weights_tried": tried}, indent=1))


if __name__ == "__main__":
    parser = cli.parser(
        "scripts.studies.simulate_labelling",
        __doc__,
        "python scripts/studies/simulate_labelling.py --shared_data=DATA --output=docs/results/data",
    )
    parser.add_argument("--shared_data", required=True, help="folder that holds classifier/, eval_prompts/ and text/")
    parser.add_argument(
        "--output", required=True, help="folder for labelling.jsonl, every row, and labelling.json, the table"
    )
    parser.add_argument("--limit", type=int, default=2000, help="texts of the user's set (default %(default)s)")
    parser.add_argument("--base_limit", type=int, default=700, help="of each other one (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="draws of pool and test (default %(default)s)")
    parser.add_argument("--bits", type=int, default=17, help="of a feature's hash (default %(default)s)")
    cli.run(main, parser)
