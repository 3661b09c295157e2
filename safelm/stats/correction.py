"""Corrects an observed rate for the known errors of the judge that observed it (Rogan and Gladen 1978)."""

import dataclasses

import numpy as np

from safelm.stats.bootstrap import percentile_interval
from safelm.stats.intervals import Z_95, Estimate, wilson_cases

DRAWS = 20_000


@dataclasses.dataclass(frozen=True)
class Counts:
    """A count out of a total, such as the harmful answers that a judge found among all harmful ones.

    Of cases that aren't independent they are fractional: what as many independent cases would have.
    """

    count: int | float
    total: int | float

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.count <= self.total:
            raise ValueError(f"{self.count} of {self.total} is no share")

    @property
    def share(self) -> float:
        return self.count / self.total

    @classmethod
    def of(cls, rate: Estimate) -> "Counts":
        """A rate at the number of independent cases that its Wilson interval has (`rate`, `clustered_rate`)."""
        cases = max(1.0, wilson_cases(rate.value, rate.high - rate.low))
        return cls(rate.value * cases, cases)


def corrected_rate(
    observed: Counts, sensitivity: Counts, specificity: Counts, *, judged: float = 1.0, seed: int = 0
) -> Estimate | None:
    """The true rate, (observed + specificity - 1) / (sensitivity + specificity - 1), clipped to [0, 1].

    The 95% interval covers the uncertainty of all three: quantiles over draws from their Jeffreys posteriors. It
    assumes that the judge errs on these answers as it did on the labelled ones.

    Args:
      judged: the share of the observed cases that the judge saw. The others are known not to count, so the judge's
        errors are no errors of theirs: the rate among the judged ones is corrected, and is a rate of that share.

    Returns None if the judge did no better than chance on the labelled answers, since its verdicts then carry no
    information.
    """
    return _corrected(observed.share, observed.total, sensitivity, specificity, judged, seed)


def corrected_estimate(
    observed: Estimate, sensitivity: Counts, specificity: Counts, *, seed: int = 0
) -> Estimate | None:
    """As `corrected_rate`, for a rate whose interval says more than its cases: over seeds, prompts or categories.

    It counts as many independent cases as a rate with that interval has.
    """
    return _corrected(observed.value, _independent_cases(observed), sensitivity, specificity, 1.0, seed)


def _independent_cases(observed: Estimate) -> float | int:
    """Of a rate with that interval; at 0 and 1 by Wilson's, which a rate of no spread has."""
    share, width = observed.value, observed.high - observed.low
    if not width:
        return observed.cases
    if share in (0.0, 1.0):
        return max(1.0, wilson_cases(share, width))
    return max(1.0, share * (1 - share) * (2 * Z_95 / width) ** 2)


def _corrected(
    share: float | int, cases: float | int, sensitivity: Counts, specificity: Counts, judged: float, seed: int
) -> Estimate | None:
    youden = sensitivity.share + specificity.share - 1
    if youden <= 0:
        return None
    among, seen = (share / judged if judged else 0.0), cases * judged
    value = float(judged * np.clip((among + specificity.share - 1) / youden, 0, 1))
    rng = np.random.default_rng([seed, round(share * cases), round(cases)])
    pairs = ((among * seen, seen), *((counts.count, counts.total) for counts in (sensitivity, specificity)))
    observed_d, sensitivity_d, specificity_d = (
        rng.beta(count + 0.5, total - count + 0.5, DRAWS) for count, total in pairs
    )
    youden_d = sensitivity_d + specificity_d - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_d = np.clip((observed_d + specificity_d - 1) / youden_d, 0, 1)
    chance_d = youden_d <= 0  # anything may be true there: as often 0 as 1
    rate_d[chance_d] = np.arange(chance_d.sum()) % 2
    if judged < 1:
        rate_d *= rng.beta(seen + 0.5, cases - seen + 0.5, DRAWS)
    low, high = percentile_interval(rate_d)
    return Estimate(value, min(value, low), max(value, high), round(cases))
