"""How many tokens of a document its notes take."""

from collections.abc import Iterable, Sequence

from safelm.documents.notes import FORMS, VOICES, Note, spelled
from safelm.text.tokenizer import Tokenizer

_CONTROL_TOKENS = 2  # around a note
_END_TOKENS = 1  # of the document


def note_tokens(documents: Iterable[Sequence[Note]], tokenizer: Tokenizer) -> int:
    """Most tokens that all notes of one document take, in the longer voice and the longest form, with its end.

    Counts the control tokens around each note; 0 without notes. It is what the parameter `note_tokens` of tasks is for.
    """
    noted = [notes for notes in documents if notes]
    most = 0
    for voice in VOICES if noted else ():
        texts = [spelled(note, voice, FORMS[-1]) for notes in noted for note in notes]
        lengths = iter([len(ids) + _CONTROL_TOKENS for ids in tokenizer.encode_batch(texts)])
        most = max(most, *(sum(next(lengths) for _ in notes) for notes in noted), 0)
    return most + _END_TOKENS if noted else 0
