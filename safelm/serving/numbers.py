"""Numbers as replies show them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

_DIGITS = 6


def rounded(value: float | None) -> float | None:
    """To six significant digits, which float32 has; None for none, and for what JSON can't hold."""
    return float(f"{value:.{_DIGITS}g}") if value is not None and math.isfinite(value) else None


def summarize(tag_probs: Sequence[float]) -> dict[str, Any] | None:
    """P(tag) along a text in four numbers; None for a text without tokens.

    `max`, and `argmax` the token where it is; `mean` over tokens; `area` under the curve through the tokens' values
    with the text's length as 1 (trapezoids: the first and the last token count half).
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
