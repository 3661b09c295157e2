"""Writes spans of a corpus: a small Parquet file of annotations for each input file, by an annotator.

The annotators: units of the text (sentences, windows of words) judged by any scorers, a token-level classifier, a
lexicon's terms, and the user's own files, which are checked against the text. All write the one layout of
`safelm.documents.spans`.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from safelm import documents
from safelm.documents import DocumentFile, Malformed, MalformedLimit, RowTally, annotations, spans
from safelm.documents.spans import Span
from safelm.jobs.output import OutputFolder
from safelm.safety.monitors import annotator
from safelm.safety.scorer import Verdict
from safelm.safety.scoring import units
from safelm.safety.scoring.joining import JoinJob
from safelm.safety.scoring.plan import scorer_facts
from safelm.safety.scoring.scorers import ScorerSpec, load_scorers
from safelm.safety.scoring.shard import LoadedScorers

_DOCUMENTS_AT_ONCE = 256
_GROUP_ROWS, _GROUP_SPANS = 1 << 16, 200_000  # written at once: whichever is reached first
_PROBABILITY = "unsafe_probability"  # of a scorer's details: what a span's score is, where there is one


@dataclasses.dataclass(frozen=True)
class SpanWork:
    """What workers need to find spans (see `safelm.jobs.beam_jobs.Work`): a unit, a classifier, a lexicon or own files.

    Attributes:
      unit: what the scorers judge one by one.
      min_score: units with a lower harm score get no span.
      token_classifier: what `annotator.load` takes; token_facts: what it is, the same in every worker.
      lexicon: terms with their labels.
      own: the user's file of spans for each input file, by the name of its annotations.
    """

    output: str
    text_column: str = "text"
    unit: units.Unit | None = None
    scorers: tuple[ScorerSpec, ...] = ()
    min_score: int = 0
    token_classifier: str = ""
    token_facts: Mapping[str, Any] | None = None
    lexicon: Mapping[str, str] | None = None
    own: Mapping[str, str] | None = None
    limit: MalformedLimit = dataclasses.field(default_factory=MalformedLimit)

    def load(self) -> LoadedScorers | annotator.TokenClassifier | None:
        """The scorers or the classifier, if any; ValueError where one is another here than where the run began."""
        if self.token_classifier:
            found = annotator.load(self.token_classifier)
            if found.facts != self.token_facts:
                raise ValueError(f"{self.token_classifier}: another classifier here than where the run began")
            return found
        return LoadedScorers(load_scorers(self.scorers, check=True)) if self.scorers else None

    def run(self, job: JoinJob, loaded: LoadedScorers | annotator.TokenClassifier | None) -> None:
        """Finds the spans of one file; its done-record is written last."""
        out = OutputFolder(self.output)
        with out.at_work(), out.staging() as staging:
            path = os.path.join(staging, "spans")
            record = write_file(job, self, loaded, path)
            files = {job.target: {"rows": record["rows"]} | out.publish(path, job.target)}
            out.write_json(job.record, record | {"files": files})

    def failed(self, job: JoinJob, message: str) -> None:
        """Leaves the message, which names the file, where the calling process finds it."""
        named = message if job.path in message else f"{job.path}: {message}"
        OutputFolder(self.output).record_failure(job.name, named)

    def settings(self, files: Sequence[DocumentFile]) -> dict[str, Any]:
        """What a folder that was begun can't change: everything that decides its spans."""
        own = None
        if self.own is not None:
            own = [documents.without_place(documents.describe(documents.file_at(path))) for path in self.own.values()]
        return self.described() | {"text_column": self.text_column, "own": own}

    def target(self, name: str, path: str) -> str:
        """The file of annotations of an input."""
        return name

    def manifest(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the manifest says of the whole, from the records of its files.

        Raises ValueError where every row of the input is malformed.
        """
        totals = {name: sum(record[name] for record in records) for name in ("rows", "spans", "unscored", "malformed")}
        self.limit.check_any_left([self.output], totals["malformed"], totals["rows"])
        labels = sum((Counter(record["labels"]) for record in records), Counter())
        return {
            "output_rows": "annotations",
            "files": {},  # of documents
            "annotations": {"files": len(records), "columns": [spans.COLUMN], "offsets": spans.OFFSETS},
            **self.described(),
            "totals": totals,
            "labels": dict(sorted(labels.items())),
        }

    def described(self) -> dict[str, Any]:
        """The annotator, for settings, metadata and manifest."""
        return {
            "unit": self.unit and self.unit.kind,
            "scorers": [scorer_facts(scorer) for scorer in self.scorers],
            "min_score": self.min_score,
            **({"token_classifier": dict(self.token_facts)} if self.token_facts else {}),
            "lexicon": None if self.lexicon is None else dict(self.lexicon),
        }


def own_files(inputs: Sequence[DocumentFile], given: Sequence[DocumentFile]) -> dict[str, str]:
    """The user's file of spans of every input file, by the name of its annotations: they have the same names.

    Raises ValueError for an input without one and for one without an input.
    """
    if len(inputs) == len(given) == 1:
        return {annotations.names([inputs[0].path])[0]: given[0].path}
    wanted = annotations.names([file.path for file in inputs])
    found = dict(zip(annotations.names([file.path for file in given]), (file.path for file in given), strict=True))
    for name, file in zip(wanted, inputs, strict=True):
        if name not in found:
            raise ValueError(f"--spans: no file there has the name of {file.path}")
    if more := found.keys() - set(wanted):
        raise ValueError(f"--spans: {found[min(more)]} has the name of no input file")
    return {name: found[name] for name in wanted}


def write_file(
    job: JoinJob, work: SpanWork, loaded: LoadedScorers | annotator.TokenClassifier | None, path: str
) -> dict[str, Any]:
    """Writes the spans of one input file to the local file `path`; its record.

    Raises ValueError or OSError naming file and row.
    """
    import pyarrow
    import pyarrow.parquet

    facts = annotations.input_facts(documents.file_at(job.path))
    told = {"input": facts, "offsets": spans.OFFSETS, **work.described()}
    with_tokens = isinstance(loaded, annotator.TokenClassifier)
    if with_tokens:
        told["vocab_hash"] = loaded.vocab_hash
    schema = pyarrow.schema(
        [(annotations.ROW, pyarrow.int64()), (spans.COLUMN, spans.arrow_type(with_tokens=with_tokens))],
        metadata={annotations.METADATA: json.dumps(told, sort_keys=True)},
    )
    tally, labels = RowTally(job.path, work.limit), Counter[str]()
    counts = {"rows": 0, "spans": 0, "unscored": 0, "malformed": 0}
    finder = _finder(job, work, loaded, counts)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        pending: list[dict[str, Any]] = []
        written = 0
        for numbers, texts in _batches(job.path, work.text_column, tally, counts):
            for number, found in zip(numbers, finder.find(numbers, texts), strict=True):
                rows = [span.as_row(with_tokens=with_tokens) for span in found]
                pending.append({annotations.ROW: number, spans.COLUMN: rows})
                labels.update(span.label for span in found)
                counts["spans"] += len(found)
                if len(pending) >= _GROUP_ROWS or counts["spans"] - written >= _GROUP_SPANS:
                    writer.write_table(pyarrow.Table.from_pylist(pending, schema))
                    pending, written = [], counts["spans"]
            counts["rows"] += len(numbers)
            tally.rows = counts["rows"]
        if pending:
            writer.write_table(pyarrow.Table.from_pylist(pending, schema))
    finder.finish()
    tally.finish()
    if annotations.input_facts(documents.file_at(job.path)) != facts:
        raise ValueError(f"{job.path}: it was changed while it was read: run again")
    return counts | {"labels": dict(labels)}


def _batches(
    path: str, text_column: str, tally: RowTally, counts: dict[str, int]
) -> Iterator[tuple[list[int], list[str | None]]]:
    """Numbers and texts of some rows at a time; the text of a malformed row is None."""
    numbers: list[int] = []
    texts: list[str | None] = []

    def malformed(row: Malformed) -> None:
        tally.add(row)
        counts["malformed"] += 1
        numbers.append(row.row)
        texts.append(None)

    for row in documents.iter_rows(path, malformed, text_column=text_column, columns=()):
        numbers.append(row.number)
        texts.append(row.values[text_column])
        if len(numbers) >= _DOCUMENTS_AT_ONCE:
            yield numbers.copy(), texts.copy()
            numbers.clear()
            texts.clear()
    if numbers:
        yield numbers, texts


@runtime_checkable
class _Finder(Protocol):
    """Finds the spans of rows (None is the text of a malformed one); `finish` checks once all rows were seen."""

    def find(self, numbers: Sequence[int], texts: Sequence[str | None]) -> Sequence[Sequence[Span]]: ...

    def finish(self) -> None: ...


def _finder(
    job: JoinJob,
    work: SpanWork,
    loaded: LoadedScorers | annotator.TokenClassifier | None,
    counts: dict[str, int],
) -> _Finder:
    if isinstance(loaded, annotator.TokenClassifier):
        return _HarmfulTokens(loaded)
    if work.own is not None:
        return _OwnSpans(work.own[job.target], job.path)
    if work.lexicon is not None:
        return _Terms(work.lexicon)
    if work.unit is None or loaded is None:
        raise ValueError("neither a unit with scorers nor a classifier nor a lexicon nor files of spans")
    return _ScoredUnits(work.unit, work.min_score, loaded, counts)


@dataclasses.dataclass
class _ScoredUnits:
    """The units of texts with the largest of the scorers' scores."""

    unit: units.Unit
    min_score: int
    loaded: LoadedScorers
    counts: dict[str, int]

    def find(self, numbers: Sequence[int], texts: Sequence[str | None]) -> list[list[Span]]:
        """A unit that is repeated in these texts is asked about once."""
        places = [[] if text is None else list(self.unit.spans(text)) for text in texts]
        asked = dict.fromkeys(
            text[start:end] for text, of in zip(texts, places, strict=True) if text for start, end in of
        )
        answers = dict(zip(asked, self.loaded.ask(list(asked)), strict=True))
        return [
            [span for start, end in of if (span := self._span(start, end, answers[text[start:end]])) is not None]
            for text, of in zip(texts, places, strict=True)
        ]

    def _span(self, start: int, end: int, verdicts: Mapping[str, Verdict]) -> Span | None:
        scores = [verdict.score for verdict in verdicts.values() if verdict.score is not None]
        self.counts["unscored"] += not scores
        if not scores or max(scores) < self.min_score:
            return None
        told = [v.details[_PROBABILITY] for v in verdicts.values() if _PROBABILITY in v.details]
        return Span(start, end, self.unit.kind, str(max(scores)), max(map(float, told), default=None))

    def finish(self) -> None:
        """Nothing to check."""


@dataclasses.dataclass
class _HarmfulTokens:
    """What a token-level classifier finds."""

    classifier: annotator.TokenClassifier

    def find(self, numbers: Sequence[int], texts: Sequence[str | None]) -> list[list[Span]]:
        """The harmful stretches of each text."""
        return self.classifier.find([text or "" for text in texts])

    def finish(self) -> None:
        """Nothing to check."""


class _Terms:
    """The terms of a lexicon."""

    def __init__(self, terms: Mapping[str, str]):
        self._lexicon = units.Lexicon(terms)

    def find(self, numbers: Sequence[int], texts: Sequence[str | None]) -> list[list[Span]]:
        """The terms in each text."""
        return [[] if text is None else self._lexicon.find(text) for text in texts]

    def finish(self) -> None:
        """Nothing to check."""


class _OwnSpans:
    """The user's spans of one input file, from rows with `row` and `spans`; rows that aren't there have none.

    A file whose rows rise is read in step with the input, any other at once.
    """

    def __init__(self, path: str, input_path: str):
        self._path, self._input = path, input_path
        self._by_row: dict[int, Any] = {}  # read, and not asked for so far
        self._rest = self._read((annotations.ROW, spans.COLUMN))
        self._last = 0
        if not self._rises():
            self._read_up_to(None)

    def find(self, numbers: Sequence[int], texts: Sequence[str | None]) -> list[tuple[Span, ...]]:
        """The spans of rows, checked against their texts."""
        self._read_up_to(max(numbers, default=0))
        return [
            spans.parse(self._by_row.pop(number, None), text or "", f"{self._path}, row {number}")
            for number, text in zip(numbers, texts, strict=True)
        ]

    def finish(self) -> None:
        """Raises ValueError if there are spans of a row that the input doesn't have."""
        if not self._by_row:
            self._read_up_to(self._last + 1)  # the rows behind the input's last one: one is enough
        if self._by_row:
            raise ValueError(f"{self._path}: row {min(self._by_row)}: {self._input} has no such row")

    def _rises(self) -> bool:
        last = 0
        for row, _ in self._read((annotations.ROW,)):
            if row <= last:
                return False
            last = row
        return True

    def _read_up_to(self, number: int | None) -> None:
        """Reads on until the row of a number, or one behind it, was read; None for all."""
        while number is None or self._last < number:
            row, values = next(self._rest, (None, None))
            if row is None:
                return
            if row in self._by_row:
                raise ValueError(f"{self._path}: row {row} comes twice")
            self._by_row[row], self._last = values, row

    def _read(self, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """Numbers of rows with their spans. Raises ValueError for one that is no number of a row."""
        for _, values in documents.read_rows(self._path, columns, text_column=None):
            row = values.get(annotations.ROW)
            if isinstance(row, bool) or not isinstance(row, int) or row < 1:
                raise ValueError(f"{self._path}: row {row!r}: must be the number of a row of {self._input}, from 1")
            yield row, values.get(spans.COLUMN)
