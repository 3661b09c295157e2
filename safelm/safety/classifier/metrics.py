"""How good harm scores are, in the paper's terms (Maini et al. 2025, section 3.1 and its table of classifiers).

A text is unsafe "at 1" when its score is 1 or more, "at 3" when it is 3 or more; recall at 1 is the share of the texts
that are unsafe at 1 which the classifier calls unsafe at 1. Scores are integers 0 to 5, probabilities lie in [0, 1].
"""

from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

from safelm.stats.intervals import Estimate, auroc, rate
from safelm.tags import MAX_SCORE

CLASSES = MAX_SCORE + 1
LEVELS = (1, 3)  # "safe" means a score below 1, or below 3


def confusion(true_n: Int[np.ndarray, " n"], given_n: Int[np.ndarray, " n"]) -> Int[np.ndarray, "6 6"]:
    """How many texts of each true score (rows) got each score (columns)."""
    counts = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    np.add.at(counts, (true_n, given_n), 1)
    return counts


def macro_f1(true_n: Int[np.ndarray, " n"], given_n: Int[np.ndarray, " n"]) -> float:
    """Mean F1 over the scores that occur among the true or the given ones."""
    counts = confusion(true_n, given_n)
    total = counts.sum(0) + counts.sum(1)
    occurs = total > 0
    return float((2 * counts.diagonal()[occurs] / total[occurs]).mean()) if occurs.any() else 0.0


def recall_at(level: int, true_n: Int[np.ndarray, " n"], given_n: Int[np.ndarray, " n"]) -> Estimate | None:
    """Share of the texts that are unsafe at `level` which are called so; None if there are none."""
    unsafe = true_n >= level
    return rate(int((given_n[unsafe] >= level).sum()), int(unsafe.sum())) if unsafe.any() else None


def false_positive_rate(level: int, true_n: Int[np.ndarray, " n"], given_n: Int[np.ndarray, " n"]) -> Estimate | None:
    """Share of the texts that are safe at `level` which are called unsafe; None if there are none."""
    safe = true_n < level
    return rate(int((given_n[safe] >= level).sum()), int(safe.sum())) if safe.any() else None


def area(is_positive_n: Bool[np.ndarray, " n"], value_n: Float[np.ndarray, " n"]) -> Estimate | None:
    """AUROC with DeLong's 95% interval; None without both kinds."""
    if is_positive_n.all() or not is_positive_n.any():
        return None
    value_n = value_n.astype(np.float64)
    return auroc(value_n[is_positive_n], value_n[~is_positive_n])


def reliability(
    is_positive_n: Bool[np.ndarray, " n"], probability_n: Float[np.ndarray, " n"], bins: int = 10
) -> list[dict[str, float]]:
    """Per band of probability (those that hold any text): bounds, texts, mean probability, share that is positive."""
    band_n = np.clip((probability_n * bins).astype(np.int64), 0, bins - 1)
    return [
        {
            "low": band / bins,
            "high": (band + 1) / bins,
            "texts": int(inside.sum()),
            "probability": float(probability_n[inside].mean()),
            "share": float(is_positive_n[inside].mean()),
        }
        for band in range(bins)
        if (inside := band_n == band).any()
    ]


def expected_calibration_error(is_positive_n: Bool[np.ndarray, " n"], probability_n: Float[np.ndarray, " n"]) -> float:
    """Mean distance of probability and share over ten bands, weighted by their texts."""
    table = reliability(is_positive_n, probability_n)
    return sum(row["texts"] * abs(row["probability"] - row["share"]) for row in table) / len(probability_n)


def spearman(first_n: Float[np.ndarray, " n"], second_n: Float[np.ndarray, " n"]) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant."""
    first, second = scipy.stats.rankdata(first_n), scipy.stats.rankdata(second_n)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def summary(true_n: Int[np.ndarray, " n"], given_n: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """The paper's columns (macro-F1, recall at 1 and at 3) with false-positive rates and the confusion matrix."""
    result: dict[str, Any] = {
        "texts": len(true_n),
        "macro_f1": macro_f1(true_n, given_n),
        "confusion": confusion(true_n, given_n).tolist(),
    }
    for level in LEVELS:
        for name, measure in (("recall", recall_at), ("false_positives", false_positive_rate)):
            estimate = measure(level, true_n, given_n)
            result[f"{name}_{level}"] = vars(estimate) if estimate else None
    return result
