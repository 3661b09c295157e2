"""Power against simulated studies with known variances."""

import numpy as np
import pytest
import scipy.stats

from safelm.stats.crossed import Components, components, standard_error
from safelm.stats.power import detectable, power_of


def studies(parts, seeds, prompts, count, difference=0.0, seed=0):
    rng = np.random.default_rng(seed)
    of_seeds = rng.normal(0, parts.seeds**0.5, (count, seeds, 1))
    of_prompts = rng.normal(0, parts.prompts**0.5, (count, 1, prompts))
    return difference + of_seeds + of_prompts + rng.normal(0, parts.rest**0.5, (count, seeds, prompts))


PARTS = Components(0.02, 0.05, 0.3, square=1.5, num_seeds=4, num_prompts=60)


@pytest.mark.parametrize(("seeds", "prompts"), [(4, 50), (8, 200)])
def test_the_detectable_difference_is_found_in_four_of_five_studies(seeds, prompts):
    alpha = 0.05
    difference = detectable(PARTS, seeds, prompts, alpha)
    assert power_of(difference, PARTS, seeds, prompts, alpha) == pytest.approx(0.8, abs=1e-6)
    found = 0
    drawn = studies(PARTS, seeds, prompts, 400, difference)
    for study in drawn:
        error, degrees = standard_error(components(study), seeds, prompts)
        found += abs(study.mean()) / error > scipy.stats.t.ppf(1 - alpha / 2, degrees)
    assert 0.7 < found / len(drawn) < 0.9


def test_more_seeds_prompts_or_a_weaker_correction_tell_smaller_differences():
    least = [detectable(PARTS, seeds, 100, 0.01) for seeds in (3, 5, 8, 20)]
    assert least == sorted(least, reverse=True)
    assert detectable(PARTS, 5, 400, 0.01) < detectable(PARTS, 5, 100, 0.01)
    assert detectable(PARTS, 5, 100, 0.05) < detectable(PARTS, 5, 100, 0.05 / 15)
    assert detectable(PARTS.upper(), 5, 100, 0.05) > detectable(PARTS, 5, 100, 0.05)


def test_a_pilot_without_spread_and_a_design_of_one_seed():
    still = components(np.zeros((3, 10)))
    assert detectable(still, 3, 10, 0.05) == 0 and power_of(0.1, still, 3, 10, 0.05) == 1
    with pytest.raises(ValueError, match="two seeds at least, got 1"):
        detectable(PARTS, 1, 10, 0.05)
