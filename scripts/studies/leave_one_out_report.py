"""The figures of `leave_one_out.py`: from the finished folds' logits and labels, with 95% intervals."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safelm.safety.classifier import calibration, metrics
from safelm.safety.classifier.examples import Example
from safelm.safety.classifier.harm_kinds import KINDS
from safelm.stats.bootstrap import grouped_interval
from safelm.stats.intervals import rate

PAGES = ("c4", "wikitext")
LEAST_OF_AN_IDENTITY = 20
RECALLS = (0.7, 0.8)


def labels_of(name: str, part: Sequence[Example]) -> dict[str, np.ndarray]:
    """What the figures need of a set's texts, under the names `test_folder` keeps them by."""
    return {
        f"{name}/score": np.asarray([e.score for e in part]),
        f"{name}/mean": np.asarray([np.dot(e.distribution, np.arange(metrics.CLASSES)) for e in part]),
        f"{name}/groups": np.asarray([e.group for e in part]),
        f"{name}/kinds": np.asarray([[e.kinds.get(kind, np.nan) for kind in KINDS] for e in part]),
    }


def harm(logits_NL: np.ndarray) -> np.ndarray:
    """The logit of a score of 3 or more."""
    return calibration.level_logit(3, logits_NL[:, : metrics.CLASSES])


def measured(folder: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the finished folds of a folder say."""
    result: dict[str, Any] = {"settings": dict(settings), "methods": {}}
    for path in sorted(folder.glob("*-*.npz")):
        method, _, name = path.stem.rpartition("-")
        with np.load(path) as fold:
            result["methods"].setdefault(method, {})[name] = of_fold(dict(fold))
    result["summary"] = {method: summary(folds) for method, folds in result["methods"].items()}
    if (path := folder / "classifier.npz").exists():
        config = json.loads(path.with_suffix(".json").read_text())
        with np.load(path) as arrays:
            fitted = calibration.Calibration.from_json(config["calibration"])
            result["classifier"] = of_folder(dict(arrays), fitted, config["kinds"])
    for path in sorted(folder.glob("*curve.json")):
        result[path.stem] = of_curve(json.loads(path.read_text()))
    return result


def of_fold(fold: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One left-out set's figures by one method."""
    value, harmful = harm(fold["test"]), fold["harmful"]
    dev, dev_harmful = harm(fold["dev"]), fold["dev_score"] >= 3
    result: dict[str, Any] = {"texts": len(value), "harmful": int(harmful.sum()), "trained": int(fold["trained"])}
    result["auroc"] = vars(metrics.area(harmful, value))
    for recall in RECALLS:
        own = calibration.threshold_for(recall, value[harmful])
        elsewhere = calibration.threshold_for(recall, dev[dev_harmful])
        result[f"at_recall_{recall}"] = {"harmless_flagged": _share(value[~harmful] >= own)} | {
            f"{page}_flagged": _share(harm(fold[page]) >= own) for page in PAGES
        }
        result[f"at_others_recall_{recall}"] = {
            "recall": _share(value[harmful] >= elsewhere),
            "harmless_flagged": _share(value[~harmful] >= elsewhere),
            **{f"{page}_flagged": _share(harm(fold[page]) >= elsewhere) for page in PAGES},
        }
    pages = np.concatenate([harm(fold[page]) for page in PAGES])
    for flagged in (0.01, 0.05):
        threshold = np.quantile(pages, 1 - flagged, method="higher")
        result[f"recall_at_{flagged}_of_pages"] = _share(value[harmful] > threshold)
    if len(np.unique(fold["score"])) > 2:
        interval = grouped_interval(metrics.spearman, value, fold["mean"], groups=fold["groups"])
        result["spearman"] = dict(
            zip(("value", "low", "high"), (metrics.spearman(value, fold["mean"]), *interval), strict=True)
        )
    if len(fold["identities"]):
        result["identities"] = by_identity(value, harmful, fold["identities"])
    return result


def by_identity(value: np.ndarray, harmful: np.ndarray, identities: np.ndarray) -> dict[str, Any]:
    """Harmless texts flagged by whom they speak of, at a recall of .7 on the harmful ones, and the widest gap."""
    threshold = calibration.threshold_for(0.7, value[harmful])
    rows = {}
    for name in sorted(set(identities.tolist())):
        here = (identities == name) & ~harmful
        if here.sum() >= LEAST_OF_AN_IDENTITY:
            rows[name] = _share(value[here] >= threshold)
    shares = [row["value"] for row in rows.values()]
    return {"groups": rows, "gap": max(shares) - min(shares) if shares else None}


def summary(folds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the left-out sets, each counting the same, and the worst AUROC."""
    areas = [fold["auroc"]["value"] for fold in folds.values()]
    flagged = [fold["at_recall_0.7"]["harmless_flagged"]["value"] for fold in folds.values()]
    return {
        "sets": len(areas),
        "mean_auroc": float(np.mean(areas)),
        "least_auroc": float(np.min(areas)),
        "harmless_flagged_at_recall_0.7": float(np.mean(flagged)),
    }


def of_folder(
    arrays: Mapping[str, np.ndarray], fitted: calibration.Calibration, kinds: Sequence[str]
) -> dict[str, Any]:
    """A trained classifier on the fixed test parts: the paper's columns, calibration, kinds, identities, pages."""
    names = [key.partition("/")[0] for key in arrays if key.endswith("/logits")]
    result: dict[str, Any] = {"sets": {}, "pages": {}}
    pages = np.concatenate([harm(arrays[f"{page}/logits"]) for page in PAGES])
    labelled = [name for name in names if len(arrays.get(f"{name}/score", ()))]
    for name in labelled:
        logits_NK, score = arrays[f"{name}/logits"][:, : metrics.CLASSES], arrays[f"{name}/score"]
        result["sets"][name] = _table(score, logits_NK, fitted) | _recalls(harm(logits_NK), score >= 3, pages)
    ours = [name for name in labelled if name != "real_toxicity"]
    scores = np.concatenate([arrays[f"{name}/score"] for name in ours])
    logits = np.concatenate([arrays[f"{name}/logits"] for name in ours])
    result["all"] = _table(scores, logits[:, : metrics.CLASSES], fitted)
    for page in PAGES:
        given = fitted.scores(arrays[f"{page}/logits"][:, : metrics.CLASSES])
        result["pages"][page] = {
            "by_score": np.bincount(given, minlength=metrics.CLASSES).tolist(),
            **{f"flagged_{level}": _share(given >= level) for level in metrics.LEVELS},
        }
    graded = arrays["pyrit/mean"]
    threshold = calibration.threshold_for(0.8, harm(arrays["pyrit/logits"])[arrays["pyrit/score"] >= 4])
    result["pages_at_recall_0.8_on_graded_harm"] = {
        page: _share(harm(arrays[f"{page}/logits"]) >= threshold) for page in PAGES
    }
    result["pyrit_spearman"] = metrics.spearman(harm(arrays["pyrit/logits"]), graded)
    toxigen = harm(arrays["toxigen/logits"]), arrays["toxigen/score"] >= 3
    result["identities"] = by_identity(*toxigen, arrays["toxigen/identities"])
    known = np.concatenate([arrays[f"{name}/kinds"] for name in ours])
    result["kinds"] = {}
    for i, kind in enumerate(kinds):
        column = known[:, KINDS.index(kind)]
        here = ~np.isnan(column)
        area = metrics.area(column[here] >= 0.5, logits[here, metrics.CLASSES + i])
        result["kinds"][kind] = vars(area) if area else None
    return result


def _table(score: np.ndarray, logits_NK: np.ndarray, fitted: calibration.Calibration) -> dict[str, Any]:
    result = metrics.summary(score, fitted.scores(logits_NK))
    area = metrics.area(score >= 3, harm(logits_NK))
    result["auroc_3"] = vars(area) if area else None
    for level in metrics.LEVELS:
        probability = fitted.probability(level, logits_NK)
        result[f"calibration_error_{level}"] = metrics.expected_calibration_error(score >= level, probability)
    return result


def _recalls(value: np.ndarray, harmful: np.ndarray, pages: np.ndarray) -> dict[str, Any]:
    return {
        f"recall_at_{flagged}_of_pages": _share(value[harmful] > np.quantile(pages, 1 - flagged, method="higher"))
        for flagged in (0.01, 0.05)
        if harmful.any()
    }


def of_curve(done: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Mean AUROC over left-out sets by how much is trained on."""
    points: dict[tuple[str, int], list[Mapping[str, float]]] = {}
    for key, entry in done.items():
        kind, count, _, _ = key.split("/")
        points.setdefault((kind, int(count)), []).append(entry)
    return {
        f"{kind}={count}": {
            "mean_auroc": float(np.mean([e["auroc"] for e in entries])),
            "texts": float(np.mean([e["texts"] for e in entries])),
            "trainings": len(entries),
        }
        for (kind, count), entries in sorted(points.items())
    }


def _share(flags: np.ndarray) -> dict[str, Any]:
    return vars(rate(int(flags.sum()), len(flags)))


NAMES = {
    "tuned": "last layers trained",
    "whole": "all layers trained",
    "frozen": "head only",
    "smollm2-tuned": "SmolLM2, last layers",
    "smollm2-frozen": "SmolLM2, head only",
    "tfidf": "TF-IDF",
    "profanity": "profanity checker",
}
DRAWN = ("tuned", "whole", "smollm2-frozen", "tfidf")


def figure(result: Mapping[str, Any], machine: str) -> dict[str, Any]:
    """The file of docs/results/data: the table and picture of `draw_results.py`, and everything measured beside it."""
    methods = [method for method in NAMES if method in result["methods"]]
    columns = [{"head": NAMES[m], "digits": 3, **({"drawn": True} if m in DRAWN else {})} for m in methods]
    rows = []
    for name in dict.fromkeys(name for folds in result["methods"].values() for name in folds):
        folds = [result["methods"][method].get(name) for method in methods]
        rows.append({"name": name, "values": [_cell(f and f["auroc"]) for f in folds]})
    return {
        "title": "Harm in sets that were left out of training",
        "command": result["settings"]["command"],
        "machine": machine,
        "axis": "AUROC on the left-out set, 95% interval",
        "scale": "linear",
        "head": "left out",
        "columns": columns,
        "rows": rows,
        "measured": result,
    }


def _cell(entry: Mapping[str, float] | None) -> list[float] | None:
    return [round(entry[part], 4) for part in ("value", "low", "high")] if entry else None
