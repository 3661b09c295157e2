"""The funnel's counts add up, whatever happened to the documents and however the shards were cut."""

import json
import random

import pytest

from safelm.safety.synthesis.gate import Finding
from safelm.safety.synthesis.kinds import Source
from safelm.safety.synthesis.report import Attempt, Funnel
from safelm.safety.synthesis.report.funnel import HISTOGRAMS

PASS = (
    Finding("length", True, values={"words": 120, "length_ratio": 1.1}),
    Finding("score", True, values={"score_before": 3, "score_after": 0}),
    Finding("copying", True, values={"copied_share": 0.2, "longest_copied_words": 7}),
)
HARMFUL = (PASS[0], Finding("score", False, "score_above_1", {"score_before": 3, "score_after": 4}))
SHORT = (Finding("length", False, "too_short", {"words": 3, "length_ratio": 0.01}),)


def random_documents(seed: int, count: int) -> list[tuple[Source, list[Attempt], str]]:
    draw, found = random.Random(seed), []
    for number in range(count):
        attempts = []
        for _ in range(3):
            outcome = draw.choice([PASS, HARMFUL, SHORT, "writer_error", "writer_declined"])
            style = draw.choice("abc")
            attempts.append(Attempt(style, (), outcome) if isinstance(outcome, str) else Attempt(style, outcome))
            if attempts[-1].passed:
                break
        metadata = {"metadata": {"category": "privacy"}} if draw.random() < 0.5 else {}
        found.append((Source(f"d{number}", "text", draw.choice((1, 2, 3)), metadata), attempts, draw.choice(["", "x"])))
    return found


def funnel_of(documents) -> Funnel:
    funnel = Funnel("safeweb")
    for source, attempts, category in documents:
        funnel.add(source, attempts, category)
    return funnel


def check_adds_up(funnel: Funnel) -> None:
    assert funnel.outcomes.total() == funnel.documents == funnel.attempts_needed.total()
    assert sum(int(n) * count for n, count in funnel.attempts_needed.items()) == funnel.attempts
    assert funnel.written + funnel.no_draft.total() == funnel.attempts
    passed = funnel.outcomes["passed"] + funnel.outcomes["near_duplicate"]
    assert funnel.drafts_passed == passed
    checked = funnel.written
    for name in ("length", "score", "copying"):  # each gate checks what the one before it let through
        counts = funnel.gates[name]
        reasons = sum(count for key, count in counts.items() if key.startswith("reason:"))
        assert counts["checked"] == checked == counts["passed"] + reasons
        checked = counts["passed"]
    assert checked == funnel.drafts_passed
    for groups in (funnel.styles, funnel.categories, funnel.scores):
        for field in ("documents", "passed", "near_duplicates", "attempts", "written", "drafts_passed"):
            totals = {"passed": passed, "near_duplicates": funnel.near_duplicates}
            total = totals[field] if field in totals else getattr(funnel, field)
            assert sum(getattr(group, field) for group in groups.values()) == total, field
    assert sum(funnel.matrix.values()) == funnel.gates["score"]["checked"]
    assert sum(funnel.matrix_passed.values()) == funnel.drafts_passed
    assert sum(funnel.histograms["words"]) == funnel.written
    for name, counts in funnel.histograms_passed.items():
        assert sum(counts) == funnel.drafts_passed and len(counts) == len(HISTOGRAMS[name]) + 1


@pytest.mark.parametrize("seed", range(4))
def test_counts_add_up_and_shards_merge_to_the_whole(seed):
    documents = random_documents(seed, 60)
    whole = funnel_of(documents)
    check_adds_up(whole)
    assert set(whole.categories) == {"x", "privacy", "(none)"}
    parts = Funnel("safeweb")
    for start in range(0, 60, 13):
        part = funnel_of(documents[start : start + 13])
        parts.merge(Funnel.from_json(json.loads(json.dumps(part.to_json()))))  # as records hold it
    assert parts == whole and parts.to_json() == whole.to_json()


def test_near_duplicates_are_taken_out_of_what_passed():
    documents = random_documents(5, 60)
    funnel = funnel_of(documents)
    outcomes = dict(funnel.outcomes)
    source, attempts, category = next(one for one in documents if one[1][-1].passed)
    funnel.drop_near_duplicate(attempts[-1].style, source.harm_score, category or source.named("category"))
    check_adds_up(funnel)
    assert funnel.outcomes["passed"] == outcomes["passed"] - 1 and funnel.outcomes["near_duplicate"] == 1
    with pytest.raises(ValueError, match="no passed document of style 'z', score 1 is left"):
        funnel.drop_near_duplicate("z", 1)


def test_what_is_no_funnel_is_refused():
    with pytest.raises(ValueError, match="can't be added"):
        Funnel("safeweb").merge(Funnel("refuseweb"))
    with pytest.raises(ValueError, match="no attempt to count"):
        Funnel("safeweb").add(Source("a", "text", 1), [])
    good = Funnel("safeweb").to_json()
    for wrong in ({}, good | {"kind": "novel"}, good | {"schema": "another"}):
        with pytest.raises(ValueError, match="no funnel of schema"):
            Funnel.from_json(wrong)
    with pytest.raises(ValueError, match="damaged funnel"):
        Funnel.from_json(good | {"styles": {"a": {"unknown": 1}}})


def test_a_funnel_holds_no_text_and_no_ids():
    funnel = funnel_of(random_documents(6, 20))
    assert not {"d1", "text"} & set(json.dumps(funnel.to_json()).replace('"', " ").split())
