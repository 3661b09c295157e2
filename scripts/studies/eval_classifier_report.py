"""The tables of `eval_classifier.py`: measures of predictions, and the same as a page of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from eval_classifier_data import LabelledSet

from safelm.safety.classifier import metrics
from safelm.stats.bootstrap import grouped_interval


def table(score: np.ndarray, given: np.ndarray, probability: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """The paper's columns, confusion and calibration."""
    result = metrics.summary(score, given)
    for level in metrics.LEVELS:
        unsafe = score >= level
        result[f"calibration_error_{level}"] = metrics.expected_calibration_error(unsafe, probability[level])
        result[f"reliability_{level}"] = metrics.reliability(unsafe, probability[level])
        result[f"auroc_{level}"] = area(unsafe, probability[level])
    return result


def area(positive: np.ndarray, value: np.ndarray) -> dict[str, float] | None:
    """AUROC and its interval; None without both kinds."""
    estimate = metrics.area(positive, value)
    return vars(estimate) if estimate else None


def graded(labelled: LabelledSet, value: np.ndarray) -> dict[str, Any]:
    """How well a graded value follows the graded label, and tells its upper end (.75 on) from its lower (to .25)."""
    interval = grouped_interval(metrics.spearman, value, labelled.graded, groups=labelled.groups)
    clear = (labelled.graded >= 0.75) | (labelled.graded <= 0.25)
    return {
        "spearman": {
            "value": metrics.spearman(value, labelled.graded),
            "low": interval[0],
            "high": interval[1],
        },
        "auroc_high_vs_low": area(labelled.graded[clear] >= 0.75, value[clear]),
    }


def by_set(sets: Mapping[str, LabelledSet], which: np.ndarray, found: Any) -> dict[str, Any]:
    """One classifier's predictions on several sets: all of them together, each, and each identity spoken of."""
    every = np.concatenate([s.score for s in sets.values()])
    result: dict[str, Any] = {"all": table(every, found.score, found.probability), "sets": {}, "identities": {}}
    for i, (name, labelled) in enumerate(sets.items()):
        here = which == i
        entry = table(labelled.score, found.score[here], {t: p[here] for t, p in found.probability.items()})
        entry["auroc"] = area(labelled.harmful, found.value[here])
        if labelled.graded is not None:
            entry |= graded(labelled, found.value[here])
        result["sets"][name] = entry
        if len(labelled.identities):
            result["identities"] |= _identities(labelled, found.score[here])
    return result


def _identities(labelled: LabelledSet, given: np.ndarray) -> dict[str, Any]:
    """False positives at 3 on harmless texts, by whom they speak of."""
    named = np.asarray(labelled.identities)
    rows = {}
    for name in sorted(set(labelled.identities)):
        found = metrics.false_positive_rate(3, labelled.score[named == name], given[named == name])
        if found:
            rows[name] = vars(found)
    return rows


def page(result: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# The harm classifier on labelled public texts", "", f"`{result['command']}`", ""]
    lines += [f"- skipped {name}: {reason}" for name, reason in result["skipped"].items()]
    lines += ["", "## Each set by itself: AUROC, grouped 5-fold, 95% intervals", ""]
    lines += _own(result["own"])
    titles = {
        "recipe": "The default recipe: its own data in folds, all other sets only tested on",
        "together": "One classifier for all sets",
        "shipped": "A trained classifier as it is",
    }
    for part, title in titles.items():
        if "all" in result.get(part, {}):
            lines += ["", f"## {title}", "", *_table(result[part])]
    return "\n".join(lines)


def _own(own: Mapping[str, Any]) -> list[str]:
    methods = list(dict.fromkeys(method for entry in own.values() for method in entry))
    lines = _row(["set", *methods]) + _row(["---"] * (len(methods) + 1))
    for name, entry in own.items():
        lines += _row([name, *(_interval(entry.get(m, {}).get("auroc")) for m in methods)])
        for extra in ("auroc_high_vs_low", "spearman"):
            if any(extra in entry.get(m, {}) for m in methods):
                lines += _row([f"{name}, {extra}", *(_interval(entry.get(m, {}).get(extra)) for m in methods)])
    return lines


def _table(part: Mapping[str, Any]) -> list[str]:
    names = ["macro-F1", "recall at 1", "recall at 3", "false positives at 1", "at 3", "ECE at 1", "at 3", "AUROC"]
    lines = _row(["set", "texts", *names]) + _row(["---"] * (len(names) + 2))
    for name, e in {"all": part["all"], **part["sets"]}.items():
        keys = ("recall_1", "recall_3", "false_positives_1", "false_positives_3")
        lines += _row(
            [
                name,
                str(e["texts"]),
                f"{e['macro_f1']:.3f}",
                *(_interval(e[key]) for key in keys),
                *(f"{e[f'calibration_error_{t}']:.3f}" for t in metrics.LEVELS),
                _interval(e.get("auroc")),
            ]
        )
    for name, e in part["sets"].items():
        lines += [f"\n{name}: {x} {_interval(e[x])}" for x in ("spearman", "auroc_high_vs_low") if e.get(x)]
    lines += ["", "Confusion (rows true 0 to 5, columns given):", ""]
    lines += [f"    {' '.join(f'{n:5d}' for n in row)}" for row in part["all"]["confusion"]]
    for level in metrics.LEVELS:
        lines += ["", f"Reliability at {level} (probability, share, texts):", ""]
        lines += [
            f"    {r['probability']:.2f} {r['share']:.2f} {r['texts']:5d}" for r in part["all"][f"reliability_{level}"]
        ]
    if part["identities"]:
        lines += ["", "False positives at 3 on harmless texts by identity:", ""]
        lines += _row(["identity", "rate", "texts"]) + _row(["---"] * 3)
        for name, e in part["identities"].items():
            lines += _row([name, _interval(e), str(e["cases"])])
    return lines


def _row(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _interval(entry: Mapping[str, float] | None) -> str:
    if not entry:
        return ""
    if "low" not in entry:
        return f"{entry['value']:.3f}"
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
