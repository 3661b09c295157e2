"""One annotator's journal: every label, skip and undo as it was given, in a file that is only appended to.

The first line says whose it is and of which documents; what follows is replayed when the file is opened again. A kill
leaves at most half a line at the end, which is cut off. A journal that a colleague kept of the same documents, put
beside the others, counts as theirs.
"""

import contextlib
import dataclasses
import datetime
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm.io import files, records
from safelm.safety.classifier.harm_kinds import KINDS
from safelm.tags import MAX_SCORE, MIN_SCORE

SUFFIX = ".jsonl"
MAX_NOTE_CHARACTERS = 2000
_REMEDY = "mend or remove that line"
_NAME = re.compile(r"[A-Za-z0-9][\w.@+-]{0,63}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Label:
    """One annotator on one document.

    Attributes:
      score: 0 to 5. kinds: of KINDS, in their order.
      time: UTC, ISO 8601.
    """

    score: int
    kinds: tuple[str, ...] = ()
    note: str = dataclasses.field(default="", repr=False)
    time: str = ""

    def __post_init__(self) -> None:
        if not MIN_SCORE <= self.score <= MAX_SCORE:
            raise ValueError(f"score {self.score} is outside {MIN_SCORE} to {MAX_SCORE}")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kind {unknown[0][:40]!r} is none of {', '.join(KINDS)}")
        if len(self.note) > MAX_NOTE_CHARACTERS:
            raise ValueError(f"note: want at most {MAX_NOTE_CHARACTERS} characters")


class Journal:
    """What an annotator said so far, and how more is added; made by `open_journal` and `read_journal`.

    Attributes:
      annotator: whose it is.
      labels: by document number. skipped: numbers of documents passed over.
    """

    def __init__(self, annotator: str, file: Any = None):
        self.annotator, self._file = annotator, file
        self.labels: dict[int, Label] = {}
        self.skipped: set[int] = set()
        self._before: list[tuple[int, Label | None, bool]] = []  # what each event that still stands replaced

    def label(self, number: int, label: Label) -> None:
        """Keeps a label; whoever kills this process a moment later, it is there. OSError if it can't be written."""
        label = dataclasses.replace(label, time=now())
        self._append({"event": "label", "document": number, **dataclasses.asdict(label)})
        self._set(number, label, is_skipped=False)

    def skip(self, number: int) -> None:
        """Passes a document over."""
        self._append({"event": "skip", "document": number, "time": now()})
        self._set(number, None, is_skipped=True)

    def undo(self) -> int | None:
        """Takes the last label or skip back; the document's number, None where nothing is left to take back."""
        if not self._before:
            return None
        self._append({"event": "undo", "time": now()})
        return self._undone()

    def replay(self, event: Mapping[str, Any], documents: int) -> None:
        """Takes in an event of the file. Raises ValueError or KeyError for what is none."""
        if event["event"] == "undo":
            if self._undone() is None:
                raise ValueError("nothing to undo")
            return
        number = _of_type(event, "document", int)
        if not 0 <= number < documents:
            raise ValueError(f"document {number} is none of {documents}")
        if event["event"] == "skip":
            self._set(number, None, is_skipped=True)
        elif event["event"] == "label":
            kinds = tuple(map(str, _of_type(event, "kinds", list)))
            note, time = (_of_type(event, name, str) for name in ("note", "time"))
            self._set(number, Label(_of_type(event, "score", int), kinds, note, time), is_skipped=False)
        else:
            raise ValueError(f"event {str(event['event'])[:40]!r} is none of label, skip, undo")

    def _set(self, number: int, label: Label | None, *, is_skipped: bool) -> None:
        self._before.append((number, self.labels.get(number), number in self.skipped))
        self._put(number, label, is_skipped)

    def _undone(self) -> int | None:
        if not self._before:
            return None
        number, label, is_skipped = self._before.pop()
        self._put(number, label, is_skipped)
        return number

    def _put(self, number: int, label: Label | None, is_skipped: bool) -> None:
        self.labels.pop(number, None)
        self.skipped.discard(number)
        if label is not None:
            self.labels[number] = label
        if is_skipped:
            self.skipped.add(number)

    def _append(self, event: Mapping[str, Any]) -> None:
        """Adds a line and waits until the disk has it; a line that can't be written whole is taken back."""
        files.append_whole(self._file, json.dumps(event).encode() + b"\n")


def _of_type(event: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field of an event; ValueError for one of another type, KeyError for none."""
    value = event[name]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_name(annotator: str) -> None:
    """Raises ValueError for an annotator's name that can't be a file's."""
    if not _NAME.fullmatch(annotator):
        raise ValueError(f"--annotator={annotator}: want at most 64 letters, digits and . _ @ + -")


@contextlib.contextmanager
def open_journal(path: pathlib.Path, annotator: str, documents_sha256: str, documents: int) -> Iterator[Journal]:
    """An annotator's journal, made where there is none; half a line at its end is cut off. Raises as `read_journal`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        if not files.try_lock(file):
            raise ValueError(f"{path}: another process is writing there")
        file.seek(0)
        found, size = records.read_log(file, str(path), _REMEDY)
        file.truncate(size)
        journal = _replayed(found, str(path), documents_sha256, documents, file, annotator)
        if not found:
            journal._append({"event": "begin", "annotator": annotator, "documents": documents_sha256, "time": now()})
        yield journal


def read_journal(path: pathlib.Path, documents_sha256: str, documents: int) -> Journal:
    """What an annotator said, without adding to it.

    Raises ValueError that names file and line for a journal of other documents, a label out of range or other damage.
    """
    with open(path, "rb") as file:
        found, _ = records.read_log(file, str(path), _REMEDY)
    return _replayed(found, str(path), documents_sha256, documents)


def _replayed(
    found: Sequence[Mapping[str, Any]],
    place: str,
    documents_sha256: str,
    documents: int,
    file: Any = None,
    annotator: str = "",
) -> Journal:
    if not found:
        return Journal(annotator or pathlib.Path(place).stem, file)
    begin = found[0]
    if begin.get("event") != "begin" or not isinstance(begin.get("annotator"), str):
        raise ValueError(f"{place}, line 1: no beginning of a journal of labels")
    if begin.get("documents") != documents_sha256:
        raise ValueError(f"{place}: a journal of other documents than this folder's: move it to its own folder")
    if annotator and begin["annotator"] != annotator:
        raise ValueError(f"{place}: the journal of {begin['annotator']}, not of {annotator}")
    journal = Journal(begin["annotator"], file)
    for line, event in enumerate(found[1:], 2):
        try:
            journal.replay(event, documents)
        except (ValueError, KeyError) as error:
            told = f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{place}, line {line}: {told}; {_REMEDY}") from None
    return journal
