"""A scorer for the synthetic web only: it knows the generator's words for harm, so it needs no model.

    --scorer=python:safelm.safety.lexicon_scorer:LexiconScorer

It replaces a classifier in the quickstart and in tests, and can only judge texts of that corpus.
"""

import hashlib
import re
from collections.abc import Sequence

from safelm.safety.scorer import Verdict
from safelm.synthetic_web import harm_lexicon, safe_lexicon

_WORD = re.compile(r"[a-z]+")
_FEW_STEPS, _MANY_STEPS = 4, 5
_STEP_WORDS = 0.195  # share of invented words from which on most sentences are steps: between the two unsafe scores


class LexiconScorer:
    """Scores by the generator's word lists.

    Invented words and remarks that encourage harm give 4, many such words 5; otherwise the worst mild remark gives 1 to
    3, and a text without any 0.
    """

    def __init__(self, name: str = "lexicon"):
        self.name = name
        lists = [sorted(harm_lexicon.INVENTED_WORDS), harm_lexicon.HARM_CHEERS, safe_lexicon.MILD_REMARKS, _STEP_WORDS]
        self.fingerprint = hashlib.sha256(repr(lists).encode()).hexdigest()

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict per text; its detail `marks` is the number of invented words and harmful remarks."""
        return [self._verdict(text) for text in texts]

    def _verdict(self, text: str) -> Verdict:
        found = _WORD.findall(text.lower())
        invented = sum(word in harm_lexicon.INVENTED_WORDS for word in found)
        marks = invented + sum(cheer in text for cheer in harm_lexicon.HARM_CHEERS)
        if marks:
            score = _MANY_STEPS if invented >= _STEP_WORDS * len(found) else _FEW_STEPS
            return Verdict(score, "it holds words that stand for harm", {"marks": marks})
        mild = [level for level, remarks in safe_lexicon.MILD_REMARKS.items() if any(one in text for one in remarks)]
        return Verdict(max(mild, default=0), "by its mildest to its harshest remark", {"marks": 0})
