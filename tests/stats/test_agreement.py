"""Krippendorff's alpha against its author's worked example, and where it isn't defined."""

import numpy as np
import pytest

from safelm.stats.agreement import krippendorff_alpha

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section D: four observers, twelve units, 1 to 5.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)


def counts(rows, levels=6):
    columns = zip(*rows, strict=True)
    return np.array([[column.count(level) for level in range(levels)] for column in columns])


def test_alpha_of_the_published_example():
    found = krippendorff_alpha(counts(OBSERVERS))
    assert found.value == pytest.approx(0.849, abs=5e-4) and found.cases == 11
    assert found.low < found.value <= found.high <= 1
    assert found == krippendorff_alpha(counts(OBSERVERS)), "the same each time"


def test_alpha_is_one_for_full_agreement_near_zero_by_chance_and_else_unknown():
    assert krippendorff_alpha(counts([(0, 5, 3), (0, 5, 3)])).value == 1
    rng = np.random.default_rng(0)
    by_chance = krippendorff_alpha(counts(rng.integers(6, size=(2, 2000)).tolist()))
    assert by_chance.low < 0 < by_chance.high and by_chance.high - by_chance.low < 0.2
    assert krippendorff_alpha(counts([(0, 5, 3)])) is None, "one rater"
    assert krippendorff_alpha(counts([(2, 2), (2, 2)])) is None, "nothing to disagree on"
    assert krippendorff_alpha(np.zeros((0, 6), np.int64)) is None
