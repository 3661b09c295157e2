"""The folder of a round of labelling: what was chosen, every annotator's journal, the training file.

    OUTPUT/_documents.jsonl        the chosen documents in the order they are shown in, with their texts
    OUTPUT/_journals/ANNOTATOR.jsonl
    OUTPUT/labels.jsonl          what `export` wrote
    OUTPUT/manifest.json           settings, what the labels say of the scorers

Documents and manifest are written once, before the first label: a folder goes on with what it was begun with.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm.documents import MANIFEST_NAME, WRITTEN_BY
from safelm.io import files, records
from safelm.safety.labelling import journal as journals
from safelm.safety.labelling.choice import Candidate
from safelm.safety.labelling.journal import Journal, Label

COMMAND, FORMAT = "safelm.label", 1
DOCUMENTS, JOURNALS = "_documents.jsonl", "_journals"
_REMEDY = "choose another --output"


@dataclasses.dataclass(frozen=True)
class Document:
    """A chosen document.

    Attributes:
      harm_score: the scorers' together; `scores` each one's.
      random: of the random share, drawn from the whole pool alike.
    """

    id: str
    file: str
    row: int
    text: str = dataclasses.field(repr=False)
    harm_score: int
    scores: Mapping[str, int]
    random: bool


class LabelFolder:
    """A folder that was begun.

    Attributes:
      documents: in the order they are shown in; a label's number is the place here.
      settings: what they were chosen by.
    """

    def __init__(self, root: pathlib.Path):
        """Reads a folder; ValueError where it is none or damaged."""
        self.root = root
        if not (root / MANIFEST_NAME).exists():
            raise ValueError(f"--output={root}: nothing was chosen there yet: give --input")
        self._manifest = records.read(root / MANIFEST_NAME, _REMEDY)
        if self._manifest.get(WRITTEN_BY) != COMMAND or self._manifest.get("format") != FORMAT:
            raise ValueError(f"--output={root}: no folder of {COMMAND}, or an earlier form's: {_REMEDY}")
        self.settings: dict[str, Any] = self._manifest["settings"]
        path = root / DOCUMENTS
        self.sha256 = files.file_sha256(str(path))
        if self.sha256 != self._manifest["documents_sha256"]:
            raise ValueError(f"{path}: not what was chosen, its checksum is another one; {_REMEDY}")
        lines = path.read_text(encoding="utf-8").splitlines()
        self.documents = [Document(**json.loads(line)) for line in lines]

    @contextlib.contextmanager
    def journal(self, annotator: str) -> Iterator[Journal]:
        """The journal of an annotator, to add to. Raises as `open_journal`."""
        path = self.root / JOURNALS / f"{annotator}{journals.SUFFIX}"
        with journals.open_journal(path, annotator, self.sha256, len(self.documents)) as found:
            yield found

    def labels(self, own: Journal | None = None) -> dict[int, dict[str, Label]]:
        """All labels by document number and annotator. `own`: a journal that is open, and so isn't read again.

        Raises ValueError for a journal of other documents or a damaged one, and for two of one annotator.
        """
        found = {} if own is None else {own.annotator: own.labels}
        for path in sorted((self.root / JOURNALS).glob(f"*{journals.SUFFIX}")):
            if own is not None and path.stem == own.annotator:
                continue
            other = journals.read_journal(path, self.sha256, len(self.documents))
            if other.annotator in found:
                raise ValueError(f"{path}: a second journal of {other.annotator}")
            found[other.annotator] = other.labels
        numbers = sorted({number for labels in found.values() for number in labels})
        return {
            number: {name: labels[number] for name, labels in found.items() if number in labels} for number in numbers
        }

    def publish(self, files_written: Mapping[str, Mapping[str, Any]], measured: Mapping[str, Any]) -> None:
        """Writes the manifest anew: the files that hold documents, and what the labels say."""
        self._manifest = self._manifest | {"files": dict(files_written), "measured": dict(measured)}
        records.write(self.root / MANIFEST_NAME, self._manifest)


@contextlib.contextmanager
def only_process(root: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock, which is made where it isn't; ValueError where another process does."""
    with files.naming(root):
        root.mkdir(parents=True, exist_ok=True)
    with files.locked(root / ".lock", f"--output={root}: another process is labelling there"):
        yield


def begin(root: pathlib.Path, settings: Mapping[str, Any], chosen: Sequence[tuple[Candidate, bool]]) -> None:
    """Keeps what was chosen; the manifest comes last."""
    rows = [
        {
            "id": each.id,
            "file": each.file,
            "row": each.row,
            "text": each.text,
            "harm_score": each.harm_score,
            "scores": {name: opinion.score for name, opinion in each.opinions.items()},
            "random": is_random,
        }
        for each, is_random in chosen
    ]
    files.write_whole(root / DOCUMENTS, "".join(json.dumps(row) + "\n" for row in rows))
    manifest = {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "settings": dict(settings),
        "documents_sha256": files.file_sha256(str(root / DOCUMENTS)),
        "files": {},
    }
    records.write(root / MANIFEST_NAME, manifest)
