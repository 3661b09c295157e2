"""Rejects drafts that copy harmful text of the source word for word."""

from collections.abc import Sequence

from safelm.safety.scorer import Scorer
from safelm.safety.synthesis.gate import Bounds, Finding
from safelm.safety.synthesis.gates.harmful_phrases import HarmfulPhrases
from safelm.safety.synthesis.gates.settings import GateSettings, fingerprint
from safelm.safety.synthesis.gates.words import WordRun, Words, covered, longest_run, merged, shared_runs, words
from safelm.safety.synthesis.kinds import Draft, Kind


class Copying:
    """Rejects drafts with harmful runs of words from the source, and drafts that are mostly copied.

    A run is harmful if it contains one of the report card's n-grams (runs of `copied_query_words` or more) or if the
    scorer scores it above `max_copied_score` (runs of `copied_words` or more). Overlapping runs count as one. Harmless
    facts may be copied.
    """

    name, worth_another = "copying", True

    def __init__(self, settings: GateSettings, scorer: Scorer, phrases: HarmfulPhrases):
        self._settings, self._scorer, self._phrases = settings, scorer, phrases
        fields = "copied_words copied_query_words max_copied_score max_copied_share"
        parts = {"scorer": scorer.fingerprint, "queries": phrases.fingerprint}
        self.fingerprint = fingerprint(self.name, 2, settings, fields, **parts)

    def limits(self, _: Kind) -> dict[str, Bounds]:
        """(least, most) that passes, by the value's name."""
        return {"copied_share": (None, self._settings.max_copied_share)}

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "harmful_phrase_copied", "harmful_text_copied", "mostly_copied"."""
        limits = self._settings
        found = [words(draft.text) for draft in drafts]
        shared = [
            shared_runs(words(draft.source.text).words, own.words, 2) for draft, own in zip(drafts, found, strict=True)
        ]
        long = [merged([run for run in runs if len(run) >= limits.copied_query_words]) for runs in shared]
        texts = [[_text(draft, own, run) for run in runs] for draft, own, runs in zip(drafts, found, long, strict=True)]
        hits = iter(self._phrases.hits([text for some in texts for text in some]))
        to_score = [
            text
            for runs, some in zip(long, texts, strict=True)
            for run, text in zip(runs, some, strict=True)
            if len(run) >= limits.copied_words
        ]
        scores = iter(self._scorer.score(to_score) if to_score else [])
        findings = []
        for own, runs, some in zip(found, shared, long, strict=True):
            phrases = sum(next(hits) for _ in some)
            of_runs = [next(scores).score for run in some if len(run) >= limits.copied_words]
            findings.append(self._finding(own, runs, phrases, of_runs))
        return findings

    def _finding(self, own: Words, runs: Sequence[WordRun], phrases: int, scores: Sequence[int | None]) -> Finding:
        limits = self._settings
        share = covered([run for run in runs if len(run) >= limits.copied_words]) / max(len(own), 1)
        wrong = {
            "harmful_phrase_copied": phrases > 0,
            "harmful_text_copied": any(score is None or score > limits.max_copied_score for score in scores),
            "mostly_copied": share > limits.max_copied_share,
        }
        reason = next((name for name, applies in wrong.items() if applies), "")
        values = {"longest_copied_words": longest_run(runs), "copied_share": share, "copied_phrases": phrases}
        return Finding(self.name, not reason, reason, values)


def _text(draft: Draft, own: Words, run: WordRun) -> str:
    return draft.text[own.places[run.start][0] : own.places[run.stop - 1][1]]
