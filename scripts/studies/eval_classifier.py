"""How good the harm classifier is on labelled public texts, beside simpler ones, with 95% intervals.

    python scripts/studies/eval_classifier.py --shared_data=DATA --cache=embeddings --output=report.json

Four parts, each text tested by a head that was fitted without its group (5 folds; what a recipe chooses, l2,
calibration and thresholds, it chooses inside the training folds):

- each set by itself: AUROC by backbone, beside TF-IDF with logistic regression and alt-profanity-check;
- the default config's recipe, on its own data and, untrained on them, on all other sets;
- one classifier for all sets together: the paper's table, confusion, calibration, false positives on safe pages and by
  identity. WikiText is in no training fold;
- --classifier=DIR: a trained classifier as it is, on the sets it was not trained on.

Sets, packages or backbones that are absent are skipped, with the reason in the report. No text is printed or written.
"""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import eval_classifier_report as report
import numpy as np
from eval_classifier_data import SAFE_SETS, SETS, AbsentError, LabelledSet

from safelm import cli
from safelm.safety import classifier
from safelm.safety.classifier import calibration, checkpoint, examples, head, metrics, recipe_config, training
from safelm.safety.classifier.embedding_cache import CachedEmbedder
from safelm.safety.embedding import Embedder, load_backbone
from safelm.train_classifier import read_config

_logger = logging.getLogger("eval_classifier")
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DEFAULT = str(_ROOT / "configs" / "classifier_default.py")
_OUTER_FOLDS = 5
TEST_ONLY = ("wikitext",)
RIDGE_L2 = (1.0, 2.0, 4.0, 8.0)
CURVE_SHARES = (0.125, 0.25, 0.5)
Features = tuple[np.ndarray, np.ndarray]  # x_CD, text_C


def arguments() -> argparse.ArgumentParser:
    parser = cli.parser(
        "scripts.studies.eval_classifier",
        __doc__,
        "python scripts/studies/eval_classifier.py --shared_data=DATA --output=report.json",
    )
    parser.add_argument("--shared_data", type=pathlib.Path, help="folder with classifier/ and text/")
    parser.add_argument("--only", help=f"sets to test on, of {','.join(SETS)}")
    parser.add_argument(
        "--backbones", default="default,smollm2,minilm", help="default: configs/classifier_default.py's"
    )
    parser.add_argument("--limit", type=int, default=840, help="texts of a set at most (pyrit: all)")
    parser.add_argument("--safe_limit", type=int, default=200, help="pages of a safe set at most")
    parser.add_argument("--classifier", help="a folder made by safelm.train_classifier")
    parser.add_argument("--cache", help="folder for embeddings: safe to interrupt and to use again")
    parser.add_argument("--curve", action="store_true", help="each set by itself also from fewer of its texts")
    parser.add_argument("--embed_only", action="store_true", help="fill the cache and stop")
    parser.add_argument("--output", default="classifier_report.json", help=".json; a .md of the same name beside it")
    return parser


def main(args: argparse.Namespace) -> None:
    sets, skipped = read_sets(args)
    result: dict[str, Any] = {"command": " ".join(sys.argv), "skipped": skipped, "sets": {}, "own": {}}
    result["sets"] = {name: {"texts": len(s.texts), "harmful": int(s.harmful.sum())} for name, s in sets.items()}
    features: dict[str, dict[str, Features]] = {}
    for name in args.backbones.split(","):
        try:
            features[name] = sliced(name, features) or embed_sets(name, sets, args.cache)
        except FileNotFoundError as error:
            skipped[name] = str(error)
    if args.embed_only:
        return
    methods = baselines(skipped) | {name: _backbone_method(name) for name in features}
    if "default" in features:  # for graded labels of one kind: the score by least squares along one direction
        for share in (*(CURVE_SHARES if args.curve else ()), 1.0):
            name = "default, ridge" + (f", {share:g} of the groups" if share < 1.0 else "")
            methods[name] = _backbone_method("default", solver="ridge", l2=RIDGE_L2, share=share)
    for name, labelled in sets.items():
        if name not in SAFE_SETS:
            result["own"][name] = test_alone(labelled, methods, {b: f[name] for b, f in features.items()})
            _write(args.output, result)
    if "default" in features:
        try:
            result["recipe"] = test_recipe(sets, features["default"], args.cache)
        except FileNotFoundError as error:
            skipped["recipe"] = str(error)
        result["together"] = test_together(sets, features["default"])
    if args.classifier:
        result["shipped"] = test_shipped(args.classifier, sets, args.cache)
    _write(args.output, result)


def read_sets(args: argparse.Namespace) -> tuple[dict[str, LabelledSet], dict[str, str]]:
    """The sets that are there, and why others are not."""
    names = args.only.split(",") if args.only else list(SETS)
    if unknown := set(names) - set(SETS):
        raise cli.UserError(f"--only={args.only}: {min(unknown)!r} is none of {', '.join(SETS)}")
    sets, skipped = {}, {}
    for name in names:
        limit = args.safe_limit if name in SAFE_SETS else args.limit
        try:
            sets[name] = SETS[name](args.shared_data, limit)
        except AbsentError as error:
            skipped[name] = str(error)
    if not sets:
        raise cli.UserError(f"no set is there: {skipped}")
    return sets, skipped


def recipe_of(backbone: str) -> training.Recipe:
    """The default recipe with another backbone: "smollm2" and "minilm" with their defaults."""
    config = read_config(_DEFAULT, ())
    if backbone != "default":
        fresh = recipe_config.default_config().backbone
        fresh.source = backbone
        with config.unlocked():
            config.backbone = fresh
    return recipe_config.recipe(config)


def embed_sets(backbone: str, sets: Mapping[str, LabelledSet], cache: str | None) -> dict[str, Features]:
    embedder = CachedEmbedder(Embedder(load_backbone(**recipe_of(backbone).backbone)), cache)
    return {name: embedder.embed(s.texts, f"{backbone} {name}") for name, s in sets.items()}


def sliced(backbone: str, features: Mapping[str, Mapping[str, Features]]) -> dict[str, Features] | None:
    """The embeddings of one layer and pooling, where they are a part of the default's several layers; else None."""
    one, several = (load_backbone(**recipe_of(name).backbone) for name in (backbone, "default"))
    anything = {"layer": None, "pooling": None}
    same = one.spec | anything == several.spec | anything and several.pooling in (one.pooling, f"{one.pooling}_last")
    inside = same and len(one.layers) == 1 and one.layers[0] in several.layers
    if "default" not in features or backbone == "default" or not inside:
        return None
    start = several.layers.index(one.layers[0]) * (several.dim // len(several.layers))
    return {name: (x_CD[:, start : start + one.dim], text_C) for name, (x_CD, text_C) in features["default"].items()}


@dataclasses.dataclass
class Predicted:
    """What was said of each text by a model that has not seen its group."""

    value: np.ndarray  # graded: larger is more harmful
    score: np.ndarray
    probability: dict[int, np.ndarray]

    @classmethod
    def empty(cls, count: int) -> "Predicted":
        """To be filled in fold by fold."""
        return cls(np.zeros(count), np.zeros(count, np.int64), {t: np.zeros(count) for t in metrics.LEVELS})


Method = Callable[[LabelledSet, Any, np.ndarray], Predicted]


def cross_validate(
    labelled: LabelledSet, features: Features, fold_n: np.ndarray, recipe: training.Recipe, share: float = 1.0
) -> Predicted:
    """Nested: everything the recipe chooses, it chooses inside the training folds. Fold -1 is never trained on.

    Args:
      share: of the groups in the training folds, how many are trained on.
    """
    names, group_n = np.unique(labelled.groups, return_inverse=True)
    kept_n = (np.random.default_rng(0).random(len(names)) < share)[group_n]
    x_CD, text_C = features
    count = len(labelled.texts)
    found = Predicted.empty(count)
    for fold in range(_OUTER_FOLDS):
        inside_n = (fold_n != fold) & (fold_n >= 0) & kept_n
        rows_C = inside_n[text_C]
        _, local_C = np.unique(text_C[rows_C], return_inverse=True)
        groups = list(labelled.groups[inside_n])
        params, fitted, _, _ = training.fit_head(
            x_CD[rows_C], local_C.astype(np.int32), labelled.score[inside_n], groups, recipe
        )
        tested_n = (fold_n == fold) | ((fold_n < 0) & (fold == 0))
        _predict(found, params, fitted, x_CD, text_C, tested_n)
    return found


def _predict(found: Predicted, params: Any, fitted: calibration.Calibration, x_CD: Any, text_C: Any, tested_n: Any):
    rows_C = tested_n[text_C]
    _, local_C = np.unique(text_C[rows_C], return_inverse=True)
    logits_CK = np.asarray(head.apply(params, x_CD[rows_C]))
    columns = classifier.highest(fitted, logits_CK, local_C.astype(np.int32), int(tested_n.sum()))
    found.value[tested_n] = columns["expected_score"]
    found.score[tested_n] = columns["score"]
    for level, name in ((1, "unsafe_probability"), (3, "unsafe_probability_3")):
        found.probability[level][tested_n] = columns[name]


def _backbone_method(name: str, solver: str | None = None, l2: tuple[float, ...] = (), share: float = 1.0) -> Method:
    recipe = dataclasses.replace(recipe_of(name), folds=3)
    if solver:
        recipe = dataclasses.replace(recipe, head=dataclasses.replace(recipe.head, solver=solver, l2=l2[0]), l2=l2)
    return lambda labelled, features, fold_n: cross_validate(labelled, features, fold_n, recipe, share)


def baselines(skipped: dict[str, str]) -> dict[str, Method]:
    """TF-IDF with logistic regression (trained in the same folds) and a profanity checker (not trained here)."""
    found: dict[str, Method] = {}
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegressionCV
    except ImportError:
        skipped["tfidf"] = "scikit-learn is not installed (extra eval)"
        return found

    def tfidf(labelled: LabelledSet, features: Any, fold_n: np.ndarray) -> Predicted:
        value, texts = np.zeros(len(labelled.texts)), np.asarray(labelled.texts, dtype=object)
        target = labelled.score >= 3
        for fold in range(_OUTER_FOLDS):
            inside = fold_n != fold
            vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
            model = LogisticRegressionCV(
                Cs=(1.0, 10.0, 100.0),
                cv=3,
                l1_ratios=(0.0,),
                scoring="neg_log_loss",
                use_legacy_attributes=False,
                max_iter=1000,
            )
            model.fit(vectors.fit_transform(texts[inside]), target[inside])
            value[~inside] = model.predict_proba(vectors.transform(texts[~inside]))[:, 1]
        return Predicted(value, np.where(value >= 0.5, 4, 0), {t: value for t in metrics.LEVELS})

    found["tfidf"] = tfidf
    try:
        from profanity_check import predict_prob
    except ImportError:
        skipped["profanity"] = "alt-profanity-check is not installed (pip install --no-deps alt-profanity-check)"
        return found

    def profanity(labelled: LabelledSet, features: Any, fold_n: np.ndarray) -> Predicted:
        value = np.asarray(predict_prob(list(labelled.texts)), np.float64)
        return Predicted(value, np.where(value >= 0.5, 4, 0), {t: value for t in metrics.LEVELS})

    found["profanity"] = profanity
    return found


def test_alone(
    labelled: LabelledSet, methods: Mapping[str, Method], features: Mapping[str, Features]
) -> dict[str, Any]:
    """One set by itself: every method in the same grouped folds."""
    fold_n = examples.folds_of(list(labelled.groups), _OUTER_FOLDS, 0)
    result = {}
    for name, method in methods.items():
        backbone = name.partition(",")[0]
        found = method(labelled, features.get(backbone), fold_n)
        entry: dict[str, Any] = {"auroc": report.area(labelled.harmful, found.value)}
        if labelled.graded is not None:
            entry |= report.graded(labelled, found.value)
        if backbone in features:
            entry |= report.table(labelled.score, found.score, found.probability)
        result[name] = entry
        _logger.info("%s, %s: AUROC %.3f %s", labelled.name, name, entry["auroc"]["value"], entry.get("spearman", ""))
    return result


def test_together(sets: Mapping[str, LabelledSet], features: Mapping[str, Features]) -> dict[str, Any]:
    """One classifier for all sets: trained on every set but TEST_ONLY's, in grouped folds."""
    return _test_jointly(sets, features, [name for name in sets if name not in TEST_ONLY])


def test_recipe(sets: Mapping[str, LabelledSet], features: Mapping[str, Features], cache: str | None) -> dict[str, Any]:
    """The default config's own data in grouped folds, as its command trains on it; other sets are only tested on."""
    sources = [str(source) for source in read_config(_DEFAULT, ()).data]
    found = {source: labelled_source(source) for source in sources if source not in sets}
    embedded = embed_sets("default", found, cache)
    names = [*sources, *(name for name in sets if name not in sources)]
    return _test_jointly({n: {**sets, **found}[n] for n in names}, {**features, **embedded}, sources)


def labelled_source(source: str) -> LabelledSet:
    """What the training command reads for a source."""
    found = examples.read_all([source])
    score = np.asarray([e.score for e in found])
    return LabelledSet(source, [e.text for e in found], score, score >= 1, np.asarray([e.group for e in found]))


def _test_jointly(
    sets: Mapping[str, LabelledSet], features: Mapping[str, Features], trained_on: Sequence[str]
) -> dict[str, Any]:
    names = list(sets)
    which = np.concatenate([np.full(len(sets[name].texts), i) for i, name in enumerate(names)])
    counts = np.cumsum([0, *(len(sets[name].texts) for name in names)])
    union = LabelledSet(
        "together",
        [text for name in names for text in sets[name].texts],
        np.concatenate([sets[name].score for name in names]),
        np.concatenate([sets[name].harmful for name in names]),
        np.concatenate([sets[name].groups for name in names]),
    )
    text_C = np.concatenate([features[name][1] + counts[i] for i, name in enumerate(names)])
    x_CD = np.concatenate([features[name][0] for name in names])
    trained = np.isin(which, [i for i, name in enumerate(names) if name in trained_on])
    fold_n = np.full(len(which), -1)
    fold_n[trained] = examples.folds_of(list(union.groups[trained]), _OUTER_FOLDS, 0)
    recipe = dataclasses.replace(recipe_of("default"), folds=3)
    found = cross_validate(union, (x_CD, text_C), fold_n, recipe)
    return report.by_set(sets, which, found)


def test_shipped(folder: str, sets: Mapping[str, LabelledSet], cache: str | None) -> dict[str, Any]:
    """A trained classifier as it is, on sets that it was not trained on."""
    backbone, params, head_params, fitted, config = checkpoint.read(folder)
    trained_on = config["training"]["data"]["sources"]
    seen = {name for name in sets if any(source.partition(":")[0] == name for source in trained_on)}
    unseen = {name: s for name, s in sets.items() if name not in seen}
    result = {"folder": folder, "trained_on": trained_on, "skipped": sorted(seen)}
    if not unseen:
        return result
    tuned = checkpoint.BACKBONE_FILE in config["files"]
    embedder = CachedEmbedder(Embedder(backbone, params), None if tuned else cache)
    texts = [text for s in unseen.values() for text in s.texts]
    found = Predicted.empty(len(texts))
    _predict(found, head_params, fitted, *embedder.embed(texts), np.ones(len(texts), bool))
    which = np.concatenate([np.full(len(s.texts), i) for i, s in enumerate(unseen.values())])
    return result | report.by_set(unseen, which, found)


def _write(path: str, result: Mapping[str, Any]) -> None:
    for place, text in (
        (path, json.dumps(result, indent=1)),
        (f"{path.removesuffix('.json')}.md", report.page(result)),
    ):
        pathlib.Path(f"{place}.partial").write_text(text + "\n", encoding="utf-8")
        os.replace(f"{place}.partial", place)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _argv: Sequence[str] = sys.argv[1:]
    cli.run(main, arguments(), _argv)
