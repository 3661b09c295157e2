"""The gates that a draft must pass to be published."""

import dataclasses
from collections.abc import Sequence

from safelm.safety.scorer import Scorer
from safelm.safety.synthesis.gate import Finding, Gate
from safelm.safety.synthesis.gates.copying import Copying
from safelm.safety.synthesis.gates.dialogue import AbstractRequest, Dialogue
from safelm.safety.synthesis.gates.faithfulness import Faithfulness, Similarity, WordSimilarity, load_similarity
from safelm.safety.synthesis.gates.form import Language, Length, Repetition
from safelm.safety.synthesis.gates.harmful_phrases import HarmfulPhrases
from safelm.safety.synthesis.gates.notes import Grounded, NoteForm, NoteRules
from safelm.safety.synthesis.gates.obedience import Obedience
from safelm.safety.synthesis.gates.rescoring import Score, Sentences
from safelm.safety.synthesis.gates.settings import GateSettings
from safelm.safety.synthesis.kinds import KINDS, NOTE_KINDS, Draft, Kind

__all__ = ["GateSettings", "limits_of", "load_similarity", "make_gates", "run_gates"]


def make_gates(
    kind: Kind,
    *,
    scorer: Scorer,
    settings: GateSettings | None = None,
    similarity: Similarity | None = None,
    prompt_texts: Sequence[str] = (),
    queries: str | None = None,
    notes: NoteRules | None = None,
) -> list[Gate]:
    """The gates of a kind, cheap ones first; near-duplicates are found later, in one pass over all shards.

    Args:
      scorer: scores drafts, sentences, copied runs and requests.
      settings: the limits; None for the default ones.
      similarity: `load_similarity("minilm")`; None compares words.
      prompt_texts: the prompts, to detect leaks of them.
      queries: a JSON file with harmful n-grams; None for the report card's.
      notes: what kinds of notes need beside the limits.

    Raises OSError if a library is not installed, ValueError for an unknown kind.
    """
    if kind not in (*KINDS, *NOTE_KINDS):
        raise ValueError(f"kind={kind!r}: one of {', '.join((*KINDS, *NOTE_KINDS))}")
    settings = settings or GateSettings()
    phrases = HarmfulPhrases(queries)
    if kind in NOTE_KINDS:
        if notes is None:
            raise ValueError(f"kind={kind!r}: its gates need a vocabulary and the sections of a constitution")
        return _note_gates(settings, scorer, similarity or WordSimilarity(), prompt_texts, phrases, notes)
    form: list[Gate] = [Length(settings), Obedience(settings, prompt_texts), Repetition(settings), Language(settings)]
    dialogue: list[Gate] = (
        [Dialogue(settings), AbstractRequest(settings, scorer, phrases)] if kind == "refuseweb" else []
    )
    return [
        *form,
        *dialogue,
        Score(settings, scorer),
        Copying(settings, scorer, phrases),
        Faithfulness(settings, similarity or WordSimilarity()),
        Sentences(settings, scorer),
    ]


def _note_gates(
    settings: GateSettings,
    scorer: Scorer,
    similarity: Similarity,
    prompt_texts: Sequence[str],
    phrases: HarmfulPhrases,
    notes: NoteRules,
) -> list[Gate]:
    """No quotation of harm is the copying gate with shorter runs."""
    quoting = dataclasses.replace(
        settings,
        copied_words=settings.note_copied_words,
        copied_query_words=min(settings.copied_query_words, settings.note_copied_words),
        max_copied_share=settings.max_note_copied_share,
    )
    return [
        NoteForm(settings, notes),
        Obedience(settings, prompt_texts),
        Language(settings),
        Grounded(settings),
        Score(settings, scorer),
        Copying(quoting, scorer, phrases),
        Faithfulness(settings, similarity),
        Sentences(settings, scorer),
    ]


def limits_of(gates: Sequence[Gate], kind: Kind) -> dict[str, list[float | int | None]]:
    """[least, most] of each value that has limits for this kind; None for no limit on that side."""
    found: dict[str, list[float | int | None]] = {}
    for gate in gates:
        if isinstance(gate, Length | Copying | Faithfulness):
            found |= {name: list(bounds) for name, bounds in gate.limits(kind).items()}
    return found


def run_gates(gates: Sequence[Gate], drafts: Sequence[Draft]) -> list[list[Finding]]:
    """Each draft's findings in the gates' order; a draft that fails a gate isn't checked by later ones."""
    findings: list[list[Finding]] = [[] for _ in drafts]
    waiting = list(range(len(drafts)))
    for gate in gates:
        if not waiting:
            break
        found = gate.check([drafts[i] for i in waiting])
        for i, finding in zip(waiting, found, strict=True):
            findings[i].append(finding)
        waiting = [i for i, finding in zip(waiting, found, strict=True) if finding.passed]
    return findings
