"""One annotator at work: which document is next, what was said of it, how far the round is."""

from collections.abc import Sequence
from typing import Any

from safelm.safety.classifier.harm_kinds import KINDS
from safelm.safety.labelling import measures
from safelm.safety.labelling.export import NAME, export
from safelm.safety.labelling.folder import LabelFolder
from safelm.safety.labelling.journal import Journal, Label

SHOWN_CHARACTERS = 20_000  # of a text at once
LEVELS = (  # the judge's rubric in short
    ("safe", "Fit for all ages; help, news and refusals that hold no harm themselves"),
    ("minimal", "Mild profanity; alcohol, romance or mild adult themes in passing"),
    ("slight", "Insult or sarcasm at one person; unfounded medical, legal or financial advice"),
    ("moderate", "Stereotypes or insults about a group; suggestive; violence, weapons or crime without detail"),
    ("clear", "Slurs at people; advice that does harm; extremism as truth; encourages violence or self-harm"),
    ("high", "Hatred, threats, calls to attack; usable instructions for harm; private data of a person"),
)


class StaleError(ValueError):
    """What was said is of a document that is not the one to label now."""


class Session:
    """The page's state, which is the journal's but for the place where the annotator stands.

    Attributes:
      at: number of the document to label; None where every one is labelled or skipped.
    """

    def __init__(self, folder: LabelFolder, journal: Journal):
        """Raises ValueError for another annotator's journal that can't be used."""
        self._folder, self._journal = folder, journal
        folder.labels(journal)
        self.at = self._next()

    def label(self, number: int, score: int, kinds: Sequence[str], note: str) -> None:
        """Keeps a label and goes on. StaleError for another document, ValueError for a label out of range."""
        self._check(number)
        self._journal.label(number, Label(score, tuple(kind for kind in KINDS if kind in kinds), note))
        self.at = self._next()

    def skip(self, number: int) -> None:
        """Passes the document over. StaleError for another one."""
        self._check(number)
        self._journal.skip(number)
        self.at = self._next()

    def undo(self) -> None:
        """Takes the last label or skip back, and stands where it was given."""
        number = self._journal.undo()
        self.at = self.at if number is None else number

    def export(self) -> dict[str, Any]:
        """Writes the training file; where it is."""
        measured = export(self._folder, self._journal)
        return {"path": str(self._folder.root / NAME), "rows": measured["labelled"]}

    def text(self, number: int, start: int) -> dict[str, Any]:
        """A piece of a document's text, and the number of its characters. IndexError where there is none."""
        text = self._folder.documents[number].text
        return {"text": text[start : start + SHOWN_CHARACTERS], "characters": len(text)}

    def state(self) -> dict[str, Any]:
        """What the page shows. It holds no scorer's score of the document: that would lead the annotator."""
        documents, journal = self._folder.documents, self._journal
        labels = self._folder.labels(journal)
        current = None
        if self.at is not None:
            current = {"number": self.at, "id": documents[self.at].id, **self.text(self.at, 0)}
        return {
            "annotator": journal.annotator,
            "total": len(documents),
            "labelled": len(journal.labels),
            "skipped": len(journal.skipped),
            "document": current,
            "levels": [{"name": name, "criteria": criteria} for name, criteria in LEVELS],
            "kinds": list(KINDS),
            "measured": measures.measure(documents, labels)
            | {"random_skipped": sum(documents[number].random for number in journal.skipped)},
        }

    def _check(self, number: int) -> None:
        if number != self.at:
            raise StaleError(f"document {number} is not the one to label now: reload the page")

    def _next(self) -> int | None:
        """The first document without a label or a skip."""
        seen = self._journal.labels.keys() | self._journal.skipped
        return next((number for number in range(len(self._folder.documents)) if number not in seen), None)
