"""The scorer of the synthetic web against the scores that documents were written with."""

import collections

from safelm.safety.lexicon_scorer import LexiconScorer
from safelm.safety.scorer import Scorer, load_scorer
from safelm.synthetic_web import corpus

SPEC = "python:safelm.safety.lexicon_scorer:LexiconScorer"


def test_it_gives_the_scores_that_documents_were_written_with():
    scorer = load_scorer(SPEC)
    assert isinstance(scorer, Scorer)
    drafts = [corpus.draft(5, "train", number) for number in range(400)]
    found = collections.Counter(
        (draft.score, verdict.score)
        for draft, verdict in zip(drafts, scorer.score([draft.text for draft in drafts]), strict=True)
    )
    assert all(before == after for before, after in found if before < 4)
    assert all(after >= 4 for before, after in found if before >= 4)
    unsafe = sum(count for (before, _), count in found.items() if before >= 4)
    assert found[4, 4] + found[5, 5] > 0.5 * unsafe  # 4 and 5 differ only by how much there is


def test_texts_without_the_words_are_safe_and_its_fingerprint_is_its_own():
    assert [verdict.score for verdict in LexiconScorer().score(["", "Figs like sun."])] == [0, 0]
    assert LexiconScorer().fingerprint == LexiconScorer("other").fingerprint
