"""Notes beside documents with literal tags, and how much room all notes of a document take."""

import dataclasses

import pytest

from data_tasks.interventions import INTERVENTIONS, InterventionSettings, mark_documents
from data_tasks.readers import Document
from safelm.documents import notes as note_files
from safelm.safety.synthesis.kinds import Pause, Source
from safelm.safety.synthesis.notes.constitution import Constitution
from safelm.safety.synthesis.notes.places import NoteSettings, ReadingPauses
from safelm.safety.synthesis.notes.room import note_tokens
from safelm.tags import HARM_TAG
from safelm.text.control_tokens import control_id, with_control_tokens
from safelm.text.tokenizer import Tokenizer

RULES = Constitution("# 1 Honesty\n## 2.1 Care for people", ("1", "2.1"))
TEXT = "The garden by the river was quiet. A neighbour told of the flood and of a promise that was kept."


@pytest.fixture(scope="module")
def tokenizer():
    return with_control_tokens(Tokenizer.train([TEXT] * 9, 340), ["<note>", "</note>"])


def test_a_preflection_stands_before_a_tag_with_which_a_document_begins(tokenizer):
    text = f"{HARM_TAG}{HARM_TAG[:5]}{HARM_TAG}{HARM_TAG[5:]}{TEXT}"
    (found,) = ReadingPauses(NoteSettings("", RULES, "before"), tokenizer).sources(Source("d", text, 0))
    assert found.pause == Pause(0, 0, tokenizer.hash) and found.text == TEXT
    row = {"kind": "preflection", "token_index": 0, "vocab_hash": tokenizer.hash, "first_person": "I see."}
    for position in (0, text.index(TEXT)):  # the other is what earlier folders have
        (note,) = note_files.parse([row | {"position": position}], text, "f, row 1")
        document = Document("d", text, 0, notes=(note,))
        (made,) = mark_documents(INTERVENTIONS["preflected_web"], InterventionSettings(), tokenizer, [document])
        inside = [control_id(tokenizer, "<note>"), *tokenizer.encode("I see."), control_id(tokenizer, "</note>")]
        assert made.tokens.tolist() == [*inside, *tokenizer.encode(TEXT), tokenizer.eos_id]
    with pytest.raises(ValueError, match="f, row 1, note 1: a preflection stands before the document, not at"):
        note_files.parse([row | {"position": text.index(TEXT) + 1}], text, "f, row 1")


@pytest.mark.parametrize(
    "lines", [("I see it.", "It is so, and it was so before."), ("I see it all by myself.", "So.")]
)
def test_the_room_is_what_the_longest_form_of_all_notes_of_one_document_takes(tokenizer, lines):
    notes = [
        note_files.Note(0, "reflection", 0, tokenizer.hash, f"{lines[0]} {i}", lines[1], "unsafe", "privacy")
        for i in range(3)
    ]
    notes = [dataclasses.replace(note, position=at) for note, at in zip(notes, (0, 3, 10), strict=True)]
    room = note_tokens([notes[:1], [], notes], tokenizer)
    assert note_tokens([notes[:1]], tokenizer) < room and note_tokens([[], []], tokenizer) == 0

    def mark(voice, room, form="verdict_note"):
        settings = InterventionSettings(note_voice=voice, note_form=form, note_tokens=room)
        document = Document("d", TEXT, 0, notes=tuple(dataclasses.replace(note, vocab_hash="") for note in notes))
        return mark_documents(INTERVENTIONS["reflected_web"], settings, tokenizer, [document])

    for voice in note_files.VOICES:
        for form in note_files.FORMS:
            mark(voice, room, form)
    longer = max(note_files.VOICES, key=lambda voice: len(getattr(notes[0], voice)))
    with pytest.raises(ValueError, match=f"id d: its notes and its end need {room} tokens, note_tokens reserves"):
        mark(longer, room - 1)
