"""Calibration, thresholds, measures and splits: what a classifier's numbers rest on."""

import numpy as np
import pytest
import sklearn.metrics
from scipy.stats import spearmanr

from safelm.safety.classifier import calibration, examples, metrics, training


def noisy_logits(seed: int, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and logits that are overconfident by a factor of four."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, size=count)
    logits = -((np.arange(6) - scores[:, None] - rng.normal(scale=2, size=count)[:, None]) ** 2)
    return logits.astype(np.float32), scores


def test_calibration_is_monotone_and_makes_probabilities_mean_what_they_say():
    fitted = calibration.fit(*noisy_logits(0), {1: 0.9, 3: 0.9})
    logits, scores = noisy_logits(1)
    for level in metrics.LEVELS:
        raw = calibration.level_logit(level, logits)
        probability = fitted.probability(level, logits)
        order = np.argsort(raw)
        if level == 1:
            assert (np.diff(probability[order]) >= 0).all()
        uncalibrated = metrics.expected_calibration_error(scores >= level, 1 / (1 + np.exp(-raw)))
        calibrated = metrics.expected_calibration_error(scores >= level, probability)
        assert calibrated < min(0.05, uncalibrated / 2)
    assert (fitted.probability(3, logits) <= fitted.probability(1, logits)).all()


@pytest.mark.parametrize("target", [0.5, 0.9, 0.97])
def test_a_threshold_attains_its_recall_on_new_texts(target: float):
    fitted = calibration.fit(*noisy_logits(0), {1: target, 3: target})
    logits, scores = noisy_logits(1)
    for level in metrics.LEVELS:
        recall = metrics.recall_at(level, scores, fitted.scores(logits))
        assert abs(recall.value - target) < 0.03


def test_the_threshold_is_the_highest_that_attains_the_recall():
    probability = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert calibration.threshold_for(0.9, probability) == 0.2
    assert calibration.threshold_for(1.0, probability) == 0.1
    with pytest.raises(ValueError, match=r"target recall 0\.0"):
        calibration.threshold_for(0.0, probability)


def test_measures_equal_scikit_learn():
    rng = np.random.default_rng(0)
    true, given = rng.integers(0, 6, 300), rng.integers(0, 5, 300)
    assert metrics.macro_f1(true, given) == pytest.approx(sklearn.metrics.f1_score(true, given, average="macro"))
    expected = sklearn.metrics.confusion_matrix(true, given, labels=range(6))
    np.testing.assert_array_equal(metrics.confusion(true, given), expected)
    value = rng.integers(0, 9, 300) + 0.5 * true
    assert metrics.spearman(value, true.astype(float)) == pytest.approx(spearmanr(value, true).statistic)


# --- splits


def test_folds_keep_groups_whole_and_are_even():
    groups = [f"g{i % 37}" for i in range(500)]
    folds = examples.folds_of(groups, 5, 0)
    assert all(len(set(folds[np.asarray(groups) == g])) == 1 for g in set(groups))
    assert np.bincount(folds).max() - np.bincount(folds).min() < 20
    assert (examples.folds_of(groups, 5, 1) != folds).any()


@pytest.mark.parametrize("split, expected", [("balanced", {1, 2, 4}), ("fixed", {1, 6})])
def test_parts_keep_groups_whole(split: str, expected: set[int]):
    groups = [f"g{i % 37}" for i in range(500)]
    recipe = training.Recipe(backbone={}, held_out=0.2, split=split)
    parts = training._parts(groups, recipe)
    assert set(parts.tolist()) == expected
    assert len(set(zip(groups, parts.tolist(), strict=True))) == 37


def test_texts_that_occur_twice_join_their_groups():
    rows = [("A b c d", 1, "x"), ("c", 0, "x"), ("a  B c D", 4, "y"), ("d", 2, "y"), ("e", 0, "z")]
    found = examples.without_duplicates([examples.Example(t, s, g, "") for t, s, g in rows])
    assert [(e.text, e.score) for e in found] == [("A b c d", 4), ("c", 0), ("d", 2), ("e", 0)]
    assert found[0].group == found[1].group == found[2].group != found[3].group
