"""Gates of notes: their form and length, and that they are about the text before them."""

import dataclasses
import re
from collections.abc import Sequence

from safelm.documents.notes import NO_CATEGORY, VERDICTS, Note
from safelm.safety.synthesis.gate import Finding
from safelm.safety.synthesis.gates.faithfulness import details
from safelm.safety.synthesis.gates.form import MAX_LANGUAGE_CHARS, language_identifier
from safelm.safety.synthesis.gates.settings import GateSettings, fingerprint
from safelm.safety.synthesis.gates.words import words
from safelm.safety.synthesis.kinds import Draft, Voices
from safelm.safety.synthesis.notes.constitution import cited, without_citations
from safelm.safety.synthesis.notes.places import NoteSettings
from safelm.safety.synthesis.notes.room import note_tokens
from safelm.safety.synthesis.requests import CATEGORIES
from safelm.text.tokenizer import Tokenizer

_I = re.compile(r"\b(?:I|me|my|mine|myself)\b")
_MEANINGFUL = 5  # letters of a word that tells what a text is about


@dataclasses.dataclass(frozen=True)
class NoteRules:
    """The vocabulary in which notes are counted, and what decides their lengths and sections."""

    tokenizer: Tokenizer
    settings: NoteSettings

    @property
    def fingerprint(self) -> str:
        """What findings depend on."""
        sections = " ".join(self.settings.constitution.sections)
        return f"{self.tokenizer.hash} {self.settings.note_tokens} {sections}"


class NoteForm:
    """Requires verdict and category, both voices, sections that exist, and a length within the reserve."""

    name, worth_another = "note_form", True

    def __init__(self, settings: GateSettings, rules: NoteRules):
        self._settings, self._rules = settings, rules
        self._sections = frozenset(rules.settings.constitution.sections)
        self.fingerprint = fingerprint(self.name, 1, settings, "note_words", rules=rules.fingerprint)

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons: "no_note", "cut", "unknown_verdict", "unknown_category", "verdict_without_category",
        "no_section_cited", "unknown_section", "no_first_person", "first_person_in_third", "too_short", "too_long".
        """
        return [self._check(draft, draft.voices) for draft in drafts]

    def _check(self, draft: Draft, voices: Voices | None) -> Finding:
        if voices is None:
            return Finding(self.name, False, "no_note")
        both = (voices.first_person, voices.third_person)
        sections = [cited(text) for text in both]
        is_known = draft.category in (NO_CATEGORY, *CATEGORIES)
        is_english = language_identifier().classify(draft.text[:MAX_LANGUAGE_CHARS])[0] == "en"
        tokens = self._tokens(draft, voices)
        wrong = {
            "cut": draft.is_cut,
            "unknown_verdict": voices.verdict not in VERDICTS,
            "unknown_category": not is_known,
            "verdict_without_category": (voices.verdict == VERDICTS[0]) != (draft.category == NO_CATEGORY),
            "no_section_cited": not all(sections),
            "unknown_section": not self._sections.issuperset(section for some in sections for section in some),
            "no_first_person": is_english and not _I.search(voices.first_person),
            "first_person_in_third": is_english and _I.search(voices.third_person) is not None,
            "too_short": min(len(words(text)) for text in both) < self._settings.note_words,
            "too_long": tokens > self._rules.settings.note_tokens,
        }
        reason = next((name for name, applies in wrong.items() if applies), "")
        return Finding(self.name, not reason, reason, {"note_tokens": tokens})

    def _tokens(self, draft: Draft, voices: Voices) -> int:
        """Tokens of the note by itself in a document, with what else the reserve is for."""
        note = Note(0, draft.kind, verdict=voices.verdict, category=draft.category, **_texts(voices))
        return note_tokens([[note]], self._rules.tokenizer)


class Grounded:
    """Requires a note to share words with the text before it and to add no name or number that it lacks.

    The text is what the writer saw. That a note follows from it is more than this rule of thumb can tell.
    """

    name, worth_another = "grounded", True

    def __init__(self, settings: GateSettings):
        self._settings = settings
        self.fingerprint = fingerprint(self.name, 1, settings, "note_shared_words max_note_new_details")

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "details_invented", "not_grounded"."""
        return [self._check(draft) for draft in drafts]

    def _check(self, draft: Draft) -> Finding:
        limits, text = self._settings, without_citations(draft.text)
        before = draft.source.text.casefold()
        new = sum(detail not in before for detail in details(text) - details(draft.source.text))
        voices = draft.voices or Voices(text, text)
        there = _meaningful(draft.source.text)
        shared = min(len(_meaningful(voice) & there) for voice in (voices.first_person, voices.third_person))
        wrong = {
            "details_invented": new > limits.max_note_new_details,
            "not_grounded": shared < limits.note_shared_words,
        }
        reason = next((name for name, applies in wrong.items() if applies), "")
        return Finding(self.name, not reason, reason, {"shared_words": shared, "new_details": new})


def _meaningful(text: str) -> set[str]:
    return {word for word in words(text).words if len(word) >= _MEANINGFUL}


def _texts(voices: Voices) -> dict[str, str]:
    return {"first_person": voices.first_person, "third_person": voices.third_person}
