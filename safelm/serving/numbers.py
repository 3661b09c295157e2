"""Formats the numbers in replies."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

_DIGITS = 6


def rounded(value: float | None) -> float | None:
    """Rounds to six significant digits, the precision of float32; None for None and for values JSON can't hold."""
    return float(f"{value:.{_DIGITS}g}") if value is not None and math.isfinite(value) else None


def summarize(tag_probs: Sequence[float]) -> dict[str, Any] | None:
    """Four statistics of P(tag) along a text; None for a text without tokens.

    `max` is the highest value and `argmax` its token; `mean` is over tokens; `area` is the area under the curve of the
    tokens' values over a text of length 1 (trapezoids: the first and the last token count half).
    """
    if not tag_probs:
        return None
    between = [(left + right) / 2 for left, right in itertools.pairwise(tag_probs)] or tag_probs
    return {
        "max": rounded(max(tag_probs)),
        "argmax": max(range(len(tag_probs)), key=tag_probs.__getitem__),
        "mean": rounded(sum(tag_probs) / len(tag_probs)),
        "area": rounded(sum(between) / len(between)),
    }
