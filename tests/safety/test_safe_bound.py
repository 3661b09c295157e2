"""Thresholds picked on the user's own safe pages: the bound holds, its cost is told, what can't be kept is refused."""

import json

import numpy as np
import pytest
import scipy.stats
from ngram_sets import SAFE

from safelm import score as score_command
from safelm.safety.classifier import Classifier, calibration
from safelm.safety.scorer import HeldOut, ThresholdScorer, Verdict, load_scorer
from safelm.safety.scoring import agreement, safe_bound


def write_pages(path, count, seed=0):
    rng = np.random.default_rng(seed)
    rows = [{"text": " ".join(rng.choice(SAFE, 40)) + f" page {rng.integers(1 << 40)}"} for _ in range(count)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": "  "}])))
    return path


def run(tmp_path, *flags, out="out", pages="pages.jsonl"):
    argv = [f"--input={tmp_path}/{pages}", f"--output={tmp_path}/{out}", "--workers=1", *flags]
    score_command.main(score_command.arguments().parse_args(argv))
    return json.loads((tmp_path / out / "manifest.json").read_text())


def test_new_safe_values_are_flagged_as_seldom_as_the_bound_says():
    rng = np.random.default_rng(0)
    pages, share = 99, 0.05
    flagged = []
    for _ in range(400):
        threshold, facts = safe_bound.conformal_threshold(rng.random(pages), share)
        flagged.append(1 - threshold)  # of uniform values
    assert facts["flagged"] == 4 and facts["expected_at_most"] == 0.05
    assert np.mean(flagged) == pytest.approx(0.05, abs=0.003)
    upper = facts["with_confidence_at_most"]
    assert np.mean(np.asarray(flagged) <= upper) == pytest.approx(0.95, abs=0.03)
    assert upper == pytest.approx(scipy.stats.beta.ppf(0.95, 5, 95))


def test_equal_values_are_not_flagged_together_and_a_sample_of_the_least_size_flags_none():
    threshold, facts = safe_bound.conformal_threshold(np.full(99, 0.3), 0.05)
    assert facts["flagged"] == 0 and threshold > 0.3
    assert safe_bound.conformal_threshold(np.arange(49) / 100, 0.02)[1]["flagged"] == 0
    assert safe_bound.conformal_threshold(np.arange(99) / 100, 0.02)[1]["flagged"] == 1


def test_recall_is_that_of_the_held_out_texts_of_each_set():
    found = {1: np.asarray([0.1, 0.4, 0.9, 0.9]), 3: np.zeros(4)}
    held_out = HeldOut(("a", "b"), np.asarray([0, 0, 0, 1]), np.asarray([1, 3, 0, 0]), found)
    assert safe_bound.recall(held_out, 1, 0.05, 0.2) == {"a": [1.0, 0.5]}
    assert safe_bound.recall(None, 1, 0.05, 0.2) is None


def test_a_run_keeps_the_bound_on_its_sample_and_says_so_in_the_manifest(tmp_path):
    write_pages(tmp_path / "pages.jsonl", 300)
    flags = ("--max_flagged_safe=0.05", f"--safe_sample={tmp_path}/pages.jsonl")
    manifest = run(tmp_path, *flags)
    bound = manifest["safe_bound"]
    levels = bound["scorers"]["bundled"]
    flagged = sum(manifest["totals"][f"score={score}"] for score in range(1, 6))
    assert bound["pages"] == 300 and flagged == levels[">=1"]["flagged"] == 14  # 15 = 0.05 * 301 less one
    assert levels[">=3"]["flagged"] == 2 == sum(manifest["totals"][f"score={score}"] for score in (3, 4, 5))
    assert levels[">=1"]["expected_at_most"] <= 0.05 < levels[">=1"]["with_confidence_at_most"] < 0.09
    assert set(levels[">=1"]["recall"]) <= set(load_scorer("bundled").held_out.sources)
    (scorer,) = manifest["scorers"]
    assert load_scorer(scorer["spec"]).fingerprint == scorer["fingerprint"]
    assert load_scorer(scorer["spec"]).thresholds[1] == levels[">=1"]["threshold"]
    assert run(tmp_path, *flags) == manifest  # nothing is left to do

    for other in (("--max_flagged_safe=0.06", flags[1]), ()):
        with pytest.raises(ValueError, match="begun with --max_flagged_safe"):
            run(tmp_path, *other)
    write_pages(tmp_path / "others.jsonl", 300, seed=1)
    with pytest.raises(ValueError, match="begun with --safe_sample"):
        run(tmp_path, flags[0], f"--safe_sample={tmp_path}/others.jsonl")


class Anxious:
    """Takes every second page of estate agents for severe, at 91%."""

    name, one_value, held_out, measured = "anxious", True, None, {}

    def __init__(self, threshold_1=0.5, threshold_3=0.5):
        self.thresholds = {1: threshold_1, 3: threshold_3}
        self.fingerprint = f"anxious-{threshold_1}-{threshold_3}"

    def with_thresholds(self, thresholds):
        return Anxious(*({**self.thresholds, **thresholds}[level] for level in (1, 3)))

    def score(self, texts):
        found = []
        for text in texts:
            probability = 0.91 if "harm" not in text and sum(map(ord, text)) % 2 else 0.99 if "harm" in text else 0.01
            reached = [level for level, least in self.thresholds.items() if probability >= least]
            details = {"unsafe_probability": probability, "unsafe_probability_3": probability}
            found.append(Verdict({(): 0, (1,): 1}.get(tuple(reached), 5), details=details))
        return found


def test_the_classifier_calls_an_estate_agent_s_page_severe_at_91_percent(tmp_path):
    """Thresholds of a class on the user's own safe sample; the false positives that are left are estimated."""
    pages = [{"text": f"A bright house with {at} rooms by the park."} for at in range(200)]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, [*pages, {"text": "a page of harm"}])))
    (tmp_path / "safe.jsonl").write_text("\n".join(map(json.dumps, pages)))
    scorers = "--scorers=python:test_safe_bound:Anxious"
    before = run(tmp_path, scorers, out="before")["totals"]
    assert before["score=5"] > 50
    manifest = run(tmp_path, scorers, "--max_flagged_safe=0.02", f"--safe_sample={tmp_path}/safe.jsonl")
    assert manifest["totals"]["score=5"] == 1 and manifest["totals"]["score=0"] == 200
    facts = manifest["safe_bound"]["scorers"]["anxious"][">=3"]
    assert facts["threshold"] > 0.91 and facts["threshold_before"] == 0.5
    assert facts["flagged"] == 0 and 0 < facts["expected_at_most"] <= 0.02 and facts["with_confidence_at_most"] < 0.04


def test_levels_that_may_flag_different_pages_share_what_may_be_flagged():
    bound = safe_bound.SafeBound(0.02, None, "pages")
    assert bound.shares(999, 1, one_value=True) == {1: 0.02, 3: 0.004}
    assert bound.shares(999, 1, one_value=False) == {1: 0.016, 3: 0.004}
    assert bound.shares(49, 1, one_value=True) == {1: 0.02, 3: 0.02}  # as few as 49 pages allow
    with pytest.raises(ValueError, match="at least 99 are needed"):
        bound.shares(49, 1, one_value=False)


def test_two_scorers_share_what_may_be_flagged(tmp_path):
    write_pages(tmp_path / "pages.jsonl", 200)
    scorers = "--scorers=a=bundled,b=bundled?threshold_1=0.5"
    manifest = run(tmp_path, scorers, "--max_flagged_safe=0.1,0.1", f"--safe_sample={tmp_path}/pages.jsonl")
    for levels in manifest["safe_bound"]["scorers"].values():
        assert levels[">=1"]["share"] == levels[">=3"]["share"] == 0.05
    assert manifest["totals"]["score=0"] >= 181


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_flagged_safe=0.02"], "--safe_sample is missing"),
        (["--safe_sample=pages.jsonl"], "--max_flagged_safe is missing"),
        (["--max_flagged_safe=0.02", "--safe_sample={}"], "40 pages with text.*at least 49 are needed"),
        (["--max_flagged_safe=0.5,0.01", "--safe_sample={}"], "at most 0.01 .*at 3 .*at least 99 are needed"),
        (["--max_flagged_safe=0.02", "--safe_sample={}", "--scorers=a=bundled,b=bundled?threshold_1=1"], "least 99"),
        (["--max_flagged_safe=x", "--safe_sample={}"], "--max_flagged_safe=x: want a share"),
        (["--max_flagged_safe=1", "--safe_sample={}"], "want a share"),
        (["--max_flagged_safe=0.01,0.02", "--safe_sample={}"], "no larger"),
        (["--max_flagged_safe=0.1", "--safe_sample={}x"], "x"),
        (
            ["--max_flagged_safe=0.1", "--safe_sample={}", "--scorers=python:scorers_for_tests:LevelScorer"],
            "LevelScorer takes no thresholds",
        ),
    ],
)
def test_what_can_not_be_kept_is_refused_in_one_line(tmp_path, flags, message):
    path = write_pages(tmp_path / "pages.jsonl", 40)
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path, *(flag.format(path) for flag in flags))
    assert not (tmp_path / "out").exists()


def test_agreement_with_scores_that_the_rows_came_with(tmp_path, capsys):
    own = [0, 0, 1, 3, 5, None]
    rows = [
        {"text": f"A page of level{given}.", "metadata": {"harm_score": s}}
        for s, given in zip(own, "023350", strict=True)
    ]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(tmp_path, "--scorers=python:scorers_for_tests:LevelScorer", pages="web.jsonl")
    found = agreement.measure(str(tmp_path / "out"), "metadata.harm_score")
    assert found["documents"] == 5 and found["confusion"][0][:3] == [1, 0, 1] and found["exact"] == 0.6
    agreement.main(agreement.arguments().parse_args([f"--scored={tmp_path}/out"]))
    assert ">=3: recall 1.000 [" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row has both harm_score and nothing"):
        agreement.measure(str(tmp_path / "out"), "nothing")


def test_a_trained_classifier_takes_thresholds_and_is_another_one_then():
    fitted = calibration.Calibration({1: 1.0, 3: 1.0}, {1: 0.0, 3: 0.0}, {1: 0.5, 3: 0.5})
    usual = Classifier.__new__(Classifier)  # without the backbone, which takes no part in it
    usual.calibration, usual.fingerprint = fitted, "abc"
    strict = usual.with_thresholds({3: 0.9})
    assert isinstance(usual, ThresholdScorer) and strict.thresholds == {1: 0.5, 3: 0.9}
    assert usual.thresholds == fitted.thresholds and strict.fingerprint != usual.fingerprint == "abc"
    logits_NC = np.asarray([[0, 0, 0, 0, 0, 3.0]])
    assert (fitted.scores(logits_NC)[0], strict.calibration.scores(logits_NC)[0]) == (5, 1)


def test_a_safe_page_without_a_score_counts_as_flagged():
    unscored = Verdict(None, details={"unsafe_probability": float("nan"), "unsafe_probability_3": float("nan")})
    assert safe_bound._probability(unscored, 1) == safe_bound._probability(unscored, 3) == 1.0
