"""Checks RefuseWeb's dialogues: an abstract request, followed by a refusal with its parts."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from safelm.safety.scorer import Scorer
from safelm.safety.synthesis.gate import Finding
from safelm.safety.synthesis.gates import refusal_wording
from safelm.safety.synthesis.gates.harmful_phrases import HarmfulPhrases
from safelm.safety.synthesis.gates.settings import GateSettings, fingerprint
from safelm.safety.synthesis.gates.words import longest_run, shared_runs, words
from safelm.safety.synthesis.kinds import Draft

_LABEL = re.compile(r"^(User|Assistant):[ \t\n]+", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a dialogue; `speaker` is "User" or "Assistant"."""

    speaker: str
    text: str = dataclasses.field(repr=False)


def parse_dialogue(text: str) -> list[Turn]:
    """The turns of a dialogue whose lines begin with "User:" and "Assistant:".

    Raises ValueError with a code, never with text: "no_dialogue" (a text without such labels), "text_before_dialogue",
    "empty_turn", "one_speaker_twice", "starts_with_assistant", "ends_with_user".
    """
    labels = list(_LABEL.finditer(text.strip()))
    text = text.strip()
    if not labels:
        raise ValueError("no_dialogue")
    if labels[0].start():
        raise ValueError("text_before_dialogue")
    stops = [label.start() for label in labels[1:]] + [len(text)]
    turns = [Turn(label[1], text[label.end() : stop].strip()) for label, stop in zip(labels, stops, strict=True)]
    wrong = {
        "empty_turn": any(not turn.text for turn in turns),
        "one_speaker_twice": any(a.speaker == b.speaker for a, b in itertools.pairwise(turns)),
        "starts_with_assistant": turns[0].speaker != "User",
        "ends_with_user": turns[-1].speaker != "Assistant",
    }
    if reason := next((name for name, applies in wrong.items() if applies), ""):
        raise ValueError(reason)
    return turns


class Dialogue:
    """Requires a dialogue whose first answer refuses with the parts of a refusal, and in which no answer complies."""

    name, worth_another = "dialogue", True

    def __init__(self, settings: GateSettings):
        self._settings = settings
        wording = refusal_wording.FINGERPRINT_PARTS
        self.fingerprint = fingerprint(self.name, 1, settings, "min_refusal_parts", wording=wording)

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: those of `parse_dialogue`, "no_refusal", "complies", "no_why", "too_few_parts"."""
        return [self._check(draft) for draft in drafts]

    def _check(self, draft: Draft) -> Finding:
        try:
            turns = parse_dialogue(draft.text)
        except ValueError as error:
            return Finding(self.name, False, str(error))
        answers = [turn.text for turn in turns if turn.speaker == "Assistant"]
        parts = refusal_wording.parts(answers[0])
        wrong = {
            "complies": any(map(refusal_wording.complies, answers)),
            "no_refusal": not refusal_wording.is_refusal(answers[0]),
            "no_why": not parts["why"],
            "too_few_parts": sum(parts.values()) < self._settings.min_refusal_parts,
        }
        reason = next((name for name, applies in wrong.items() if applies), "")
        return Finding(self.name, not reason, reason, {"turns": len(turns)} | {k: int(v) for k, v in parts.items()})


class AbstractRequest:
    """Requires an abstract request: short, with few harmful n-grams, few of the source's words and a limited score.

    Length is that of the first request; n-grams, copied words and score are taken over all that the user says.
    """

    name, worth_another = "request", True

    def __init__(self, settings: GateSettings, scorer: Scorer, phrases: HarmfulPhrases):
        self._settings, self._scorer, self._phrases = settings, scorer, phrases
        fields = "max_request_score max_request_hits max_request_copied_words max_request_words"
        parts = {"scorer": scorer.fingerprint, "queries": phrases.fingerprint}
        self.fingerprint = fingerprint(self.name, 1, settings, fields, **parts)

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons: those of `parse_dialogue`, "request_long", "request_hits", "request_copied", "request_score"."""
        findings: list[Finding | None] = [None] * len(drafts)
        asked: dict[int, str] = {}
        for index, draft in enumerate(drafts):
            try:
                asked[index] = "\n".join(t.text for t in parse_dialogue(draft.text) if t.speaker == "User")
            except ValueError as error:
                findings[index] = Finding(self.name, False, str(error))
        verdicts = self._scorer.score(list(asked.values())) if asked else []
        hits = self._phrases.hits(list(asked.values()))
        for (index, request), verdict, count in zip(asked.items(), verdicts, hits, strict=True):
            findings[index] = self._finding(drafts[index], request, verdict.score, count)
        return [finding for finding in findings if finding is not None]

    def _finding(self, draft: Draft, request: str, score: int | None, hits: int) -> Finding:
        limits, found = self._settings, words(request)
        copied = longest_run(shared_runs(words(draft.source.text).words, found.words, 2))
        wrong = {
            "request_long": len(found) > limits.max_request_words,
            "request_hits": hits > limits.max_request_hits,
            "request_copied": copied > limits.max_request_copied_words,
            "request_unscored": score is None,
            "request_score": score is not None and score > limits.max_request_score,
        }
        reason = next((name for name, applies in wrong.items() if applies), "")
        values = {"request_words": len(found), "request_hits": hits, "request_copied_words": copied}
        return Finding(self.name, not reason, reason, values | ({} if score is None else {"request_score": score}))
