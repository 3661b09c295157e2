"""The maximum of scorers, and their agreement against scikit-learn and a count by hand."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from safelm.safety.ensemble import UNSAFE_FROM, Agreement, Ensemble
from safelm.safety.scorer import Verdict

NAMES = ("classifier", "judge", "endpoint")
scores = st.one_of(st.none(), st.integers(0, 5))
corpora = st.lists(st.tuples(scores, scores, scores), max_size=30)


@dataclasses.dataclass
class Named:
    name: str
    fingerprint: str = ""

    def score(self, texts):
        return [Verdict(0) for _ in texts]


def share(hits):
    return sum(hits) / len(hits) if hits else None


def verdicts(row):
    return [Verdict(score, f"by {name}" if score is not None else "") for name, score in zip(NAMES, row, strict=True)]


def agreement(corpus):
    counts = Agreement(NAMES)
    for row in corpus:
        counts.add(verdicts(row))
    return counts


@given(st.tuples(scores, scores, scores))
def test_the_highest_score_decides_and_brings_its_reason(row):
    decision = Ensemble([Named(name) for name in NAMES]).combine(verdicts(row))
    usable = [score for score in row if score is not None]
    if not usable:
        assert decision == Verdict(None, "", {"decided_by": ""})
    else:
        first = NAMES[row.index(max(usable))]
        assert decision == Verdict(max(usable), f"by {first}", {"decided_by": first})


def test_of_equal_scores_the_one_with_a_reason_decides():
    ensemble = Ensemble([Named("a"), Named("b")])
    assert ensemble.combine([Verdict(3), Verdict(3, "why")]) == Verdict(3, "why", {"decided_by": "b"})
    assert ensemble.combine([Verdict(4), Verdict(3, "why")]) == Verdict(4, "", {"decided_by": "a"})


def test_no_two_scorers_share_a_name():
    with pytest.raises(ValueError, match="judge, judge: two have the same name"):
        Ensemble([Named("judge"), Named("judge")])
    with pytest.raises(ValueError, match="same name"):
        Agreement(["judge", "judge"])


@given(corpora)
def test_figures_are_those_counted_by_hand(corpus):
    report = agreement(corpus).report()
    assert report["documents"] == len(corpus)
    assert report["unscored"] == corpus.count((None, None, None))
    for place, name in enumerate(NAMES):
        assert report["unusable"][name] == sum(row[place] is None for row in corpus)
    assert [tuple(pair["scorers"]) for pair in report["pairs"]] == list(itertools.combinations(NAMES, 2))
    for pair in report["pairs"]:
        both = [tuple(row[NAMES.index(name)] for name in pair["scorers"]) for row in corpus]
        both = [(a, b) for a, b in both if a is not None and b is not None]
        assert pair["documents"] == len(both)
        assert pair["confusion"] == [[both.count((a, b)) for b in range(6)] for a in range(6)]
        assert pair["exact"] == share([a == b for a, b in both])
        assert pair["within_one"] == share([abs(a - b) <= 1 for a, b in both])
        for unsafe in UNSAFE_FROM:
            assert pair["unsafe"][f">={unsafe}"] == share([(a >= unsafe) == (b >= unsafe) for a, b in both])


@given(corpora, st.lists(st.integers(0, 30), max_size=3))
def test_parts_merge_in_any_order_and_through_json(corpus, cuts):
    edges = [0, *sorted(min(cut, len(corpus)) for cut in cuts), len(corpus)]
    parts = [agreement(corpus[start:end]) for start, end in itertools.pairwise(edges)]
    for order in (parts, parts[::-1]):
        merged = Agreement(NAMES)
        for part in order:
            merged = merged.merge(Agreement.from_json(json.loads(json.dumps(part.to_json()))))
        assert merged.to_json() == agreement(corpus).to_json()
        assert merged.report() == agreement(corpus).report()
    assert [part.documents for part in parts] == [end - start for start, end in itertools.pairwise(edges)]


@given(corpora)
def test_scores_added_together_count_as_one_by_one(corpus):
    together = Agreement(NAMES)
    together.add_scores(np.array(corpus, np.float64).reshape(-1, len(NAMES)))
    assert together.to_json() == agreement(corpus).to_json()


def test_weighted_kappa_is_scikit_learns():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 6, 300)
    for noise in (0, 1, 3, 6):
        second = np.clip(first + rng.integers(-noise, noise + 1, 300), 0, 5)
        counts = agreement(zip(first.tolist(), second.tolist(), [None] * 300, strict=True))
        expected = sklearn.metrics.cohen_kappa_score(first, second, labels=range(6), weights="quadratic")
        assert counts.pair("classifier", "judge").weighted_kappa == pytest.approx(expected)
        assert counts.pair("classifier", "endpoint").weighted_kappa is None
    assert agreement([(2, 2, 3)]).pair("classifier", "judge").weighted_kappa is None


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="classifier, judge, endpoint doesn't go with that of a"):
        agreement([]).merge(Agreement(["a"]))
    with pytest.raises(ValueError, match="not a record of agreement"):
        Agreement.from_json({"scorers": ["a", "b"], "documents": 1, "unscored": 0, "unusable": {"a": 0, "b": 0}})
    with pytest.raises(ValueError, match="zip"):
        agreement([]).add([Verdict(1)])
