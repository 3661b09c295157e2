"""What the labels say so far: how far scorers and annotators agree, and the scorers' error on the random share.

Documents that were chosen for being uncertain are harder than the pool: agreement on them says nothing of it. The
random share does: it was drawn from the whole pool alike, and is shown in an order that has nothing to do with it. Its
error is that of the documents that got a label; those skipped are counted beside it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safelm.safety.classifier.harm_kinds import KINDS
from safelm.safety.classifier.metrics import LEVELS
from safelm.safety.labelling.folder import Document
from safelm.safety.labelling.journal import Label
from safelm.stats.agreement import krippendorff_alpha
from safelm.stats.intervals import Estimate, rate
from safelm.tags import MAX_SCORE, MIN_SCORE

Labels = Mapping[int, Mapping[str, Label]]


def consensus(labels: Mapping[str, Label]) -> int:
    """The score that several annotators gave together: their mean, a half rounded up."""
    return int(np.floor(np.mean([label.score for label in labels.values()]) + 0.5))


def votes(labels: Mapping[str, Label]) -> list[int]:
    """How many annotators gave each score: a soft label where they disagree."""
    return np.bincount([label.score for label in labels.values()], minlength=MAX_SCORE + 1).tolist()


def kinds(labels: Mapping[str, Label]) -> dict[str, float]:
    """The share of annotators that named each kind; none where nobody says: harm that no kind was named of."""
    telling = [label for label in labels.values() if label.kinds or label.score == MIN_SCORE]
    return {kind: sum(kind in label.kinds for label in telling) / len(telling) for kind in KINDS} if telling else {}


def measure(documents: Sequence[Document], labels: Labels) -> dict[str, Any]:
    """The figures, JSON-able; an estimate without cases is None.

    Returns:
      "labelled": documents with a label. "labels": by annotator. "agreement": on all labelled documents, and "error":
      on those of the random share, for "harm_score" and each scorer; of the error "exact" is another score, "1" and "3"
      a document on the wrong side of that level. "alpha": Krippendorff's, between annotators.
    """
    random = [number for number in labels if documents[number].random]
    names = sorted({name for each in documents for name in each.scores})
    by_annotator: dict[str, int] = {}
    for given in labels.values():
        for name in given:
            by_annotator[name] = by_annotator.get(name, 0) + 1
    return {
        "labelled": len(labels),
        "labels": by_annotator,
        "random": {"documents": sum(each.random for each in documents), "labelled": len(random)},
        "agreement": {name: _shares(documents, labels, list(labels), name, wrong=False) for name in ("", *names)},
        "error": {name: _shares(documents, labels, random, name, wrong=True) for name in ("", *names)},
        "alpha": _known(_alpha(labels)),
    }


def _shares(
    documents: Sequence[Document], labels: Labels, numbers: Sequence[int], scorer: str, *, wrong: bool
) -> dict[str, Any]:
    """Shares of documents on which a scorer ("": all together) and the annotators say the same, or don't if `wrong`."""
    pairs = []
    for number in numbers:
        score = documents[number].scores.get(scorer) if scorer else documents[number].harm_score
        if score is not None:
            pairs.append((score, consensus(labels[number])))
    same = {"exact": sum(given == true for given, true in pairs)}
    same |= {str(level): sum((given >= level) == (true >= level) for given, true in pairs) for level in LEVELS}
    return {
        name: _known(rate(len(pairs) - count if wrong else count, len(pairs)) if pairs else None)
        for name, count in same.items()
    }


def _alpha(labels: Labels) -> Estimate | None:
    return krippendorff_alpha(
        np.array([votes(given) for given in labels.values()], np.int64).reshape(-1, MAX_SCORE + 1)
    )


def _known(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else dataclasses.asdict(estimate)
