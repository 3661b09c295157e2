"""From the rate that an imperfect judge observes to the true one (Rogan and Gladen 1978), with what is known of it."""

import dataclasses

import numpy as np

from safelm.stats.bootstrap import percentile_interval
from safelm.stats.intervals import Estimate

DRAWS = 20_000


@dataclasses.dataclass(frozen=True)
class Counts:
    """So many of so many: sensitivity's hits among positives, specificity's among negatives, or observed cases."""

    count: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.count <= self.total:
            raise ValueError(f"{self.count} of {self.total} is no share")

    @property
    def share(self) -> float:
        return self.count / self.total


def corrected_rate(observed: Counts, sensitivity: Counts, specificity: Counts, *, seed: int = 0) -> Estimate | None:
    """The true rate: (observed + specificity - 1) / (sensitivity + specificity - 1), held to [0, 1].

    The 95% interval takes in the uncertainty of all three: quantiles over draws from their Jeffreys posteriors. It
    assumes that the judge errs on these answers as it did on the labelled ones. None for a judge that did no better
    than chance there: nothing can be told from it.
    """
    youden = sensitivity.share + specificity.share - 1
    if youden <= 0:
        return None
    value = float(np.clip((observed.share + specificity.share - 1) / youden, 0, 1))
    rng = np.random.default_rng([seed, observed.count, observed.total])
    observed_d, sensitivity_d, specificity_d = (
        rng.beta(counts.count + 0.5, counts.total - counts.count + 0.5, DRAWS)
        for counts in (observed, sensitivity, specificity)
    )
    youden_d = sensitivity_d + specificity_d - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_d = np.clip((observed_d + specificity_d - 1) / youden_d, 0, 1)
    chance_d = youden_d <= 0  # anything may be true there: as often 0 as 1
    rate_d[chance_d] = np.arange(chance_d.sum()) % 2
    low, high = percentile_interval(rate_d)
    return Estimate(value, min(value, low), max(value, high), observed.total)
