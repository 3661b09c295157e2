"""How far several raters agree beyond chance: Krippendorff's alpha, with missing ratings and any number of raters."""

import numpy as np
from jaxtyping import Float, Int

from safelm.stats.bootstrap import percentile_interval
from safelm.stats.intervals import Estimate

DRAWS = 1000


def krippendorff_alpha(counts_UK: Int[np.ndarray, "U K"], *, draws: int = DRAWS, seed: int = 0) -> Estimate | None:
    """Alpha for equidistant levels 0 to K - 1 (interval data; Krippendorff 2011), its 95% interval over units.

    Args:
      counts_UK: how many raters gave each unit each level; a unit with fewer than two ratings says nothing.

    Returns:
      None without two ratings of a unit, or where all ratings are one level.
    """
    counts_UK = counts_UK[counts_UK.sum(1) >= 2]
    if not len(counts_UK):
        return None
    levels = counts_UK.shape[1]
    distance_KK = np.subtract.outer(np.arange(levels), np.arange(levels)) ** 2.0
    pairs_UKK = counts_UK[:, :, None] * (counts_UK[:, None, :] - np.eye(levels, dtype=np.int64))
    observed_UKK = pairs_UKK / (counts_UK.sum(1) - 1)[:, None, None]
    value = _alpha(observed_UKK.sum(0), distance_KK)
    if value is None:
        return None
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(counts_UK), np.full(len(counts_UK), 1 / len(counts_UK)), size=draws)
    drawn = [_alpha(np.tensordot(weight_U, observed_UKK, 1), distance_KK) for weight_U in weights]
    low, high = percentile_interval([each for each in drawn if each is not None] or [value])
    return Estimate(value, min(value, low), max(value, high), len(counts_UK))


def _alpha(coincidence_KK: Float[np.ndarray, "K K"], distance_KK: Float[np.ndarray, "K K"]) -> float | None:
    """1 - observed / expected disagreement; None where chance leaves no disagreement to expect."""
    margin_K = coincidence_KK.sum(0)
    total = margin_K.sum()
    expected = (np.outer(margin_K, margin_K) * distance_KK).sum() / (total - 1) if total > 1 else 0.0
    return None if expected == 0 else float(1 - (coincidence_KK * distance_KK).sum() / expected)
