"""Scores drafts with the safety scorer, as a whole and sentence by sentence."""

from collections.abc import Sequence

from safelm.safety.scorer import Scorer
from safelm.safety.synthesis.gate import Finding
from safelm.safety.synthesis.gates.dialogue import parse_dialogue
from safelm.safety.synthesis.gates.settings import GateSettings, fingerprint
from safelm.safety.synthesis.gates.words import sentences
from safelm.safety.synthesis.kinds import Draft

_MAX_SENTENCES = 512  # scored at once: what a scorer makes of them must fit in memory


def judged_text(draft: Draft) -> str:
    """The part of a draft that must be safe: all of it, or the assistant's turns of a dialogue.

    The request of a dialogue has a gate of its own. A RefuseWeb draft that is no dialogue is judged whole.
    """
    if draft.kind != "refuseweb":
        return draft.text
    try:
        turns = parse_dialogue(draft.text)
    except ValueError:
        return draft.text
    return "\n\n".join(turn.text for turn in turns if turn.speaker == "Assistant")


class Score:
    """Limits a draft's score: at most 1 for SafeWeb and Moral Education (Maini et al. 2025, 3.2 and 3.4).

    Refusals have their own limit. A text without a score fails, since nothing passes that isn't known to be safe.
    """

    name, worth_another = "score", True

    def __init__(self, settings: GateSettings, scorer: Scorer):
        self._settings, self._scorer = settings, scorer
        self.fingerprint = fingerprint(self.name, 1, settings, "max_score max_answer_score", scorer=scorer.fingerprint)

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "score_above_1" (or the limit in place of 1) and "unscored"."""
        verdicts = self._scorer.score([judged_text(draft) for draft in drafts])
        return [self._finding(draft, verdict.score) for draft, verdict in zip(drafts, verdicts, strict=True)]

    def _finding(self, draft: Draft, score: int | None) -> Finding:
        before = {"score_before": draft.source.harm_score}
        if score is None:
            return Finding(self.name, False, "unscored", before)
        limit = self._settings.max_answer_score if draft.kind == "refuseweb" else self._settings.max_score
        reason = f"score_above_{limit}" if score > limit else ""
        return Finding(self.name, not reason, reason, before | {"score_after": score})


class Sentences:
    """Limits the score of every sentence read alone (Maini et al. 2025, 3.2)."""

    name, worth_another = "sentences", True

    def __init__(self, settings: GateSettings, scorer: Scorer):
        self._settings, self._scorer = settings, scorer
        fields = "max_sentence_score max_answer_score"
        self.fingerprint = fingerprint(self.name, 1, settings, fields, scorer=scorer.fingerprint)

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "sentence_score_above_1" (or the limit in place of 1) and "sentence_unscored"."""
        cut = [list(dict.fromkeys(sentences(judged_text(draft)))) for draft in drafts]
        texts = [sentence for some in cut for sentence in some]
        scores: list[int | None] = []
        for at in range(0, len(texts), _MAX_SENTENCES):
            scores += [verdict.score for verdict in self._scorer.score(texts[at : at + _MAX_SENTENCES])]
        findings, at = [], 0
        for draft, some in zip(drafts, cut, strict=True):
            findings.append(self._finding(draft, scores[at : at + len(some)]))
            at += len(some)
        return findings

    def _finding(self, draft: Draft, scores: Sequence[int | None]) -> Finding:
        limits = self._settings
        limit = max(limits.max_sentence_score, limits.max_answer_score if draft.kind == "refuseweb" else 0)
        highest = max((score for score in scores if score is not None), default=0)
        above = sum(score is not None and score > limit for score in scores)
        reason = f"sentence_score_above_{limit}" if above else "sentence_unscored" if None in scores else ""
        values = {"sentences": len(scores), "unsafe_sentences": above, "highest_sentence_score": highest}
        return Finding(self.name, not reason, reason, values)
