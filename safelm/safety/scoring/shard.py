"""One shard of the input scored: read, asked of every scorer in batches, written by score, recorded."""

import contextlib
import dataclasses
import glob
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from safelm.documents import Malformed, MalformedLimit, RowTally
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import NOT_BEGUN, STAGING, OutputFolder
from safelm.safety.ensemble import Agreement, Ensemble
from safelm.safety.scorer import Scorer, Verdict
from safelm.safety.scoring import json_rows, parquet_rows
from safelm.safety.scoring.columns import EMPTY, FOLDERS, QUARANTINE, UNSCORED, Columns, folder
from safelm.safety.scoring.scorers import ScorerSpec, load_scorers

MALFORMED_SUFFIX = ".malformed"
COUNT = "rows_scored"  # in a shard's part of the staging folder
MAX_FAILED_IN_A_ROW = 3  # shards of one process, for want of an endpoint
BATCH_CHARACTERS, BATCH_ROWS = 2 << 20, 2048
_SHORT, _QUOTE = 8, 24  # so many characters of a text in a message are a quotation; of a shorter one all it has

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class ScoreWork:
    """What workers need to score shards (see `safelm.jobs.beam_jobs.Work`)."""

    output: str
    scorers: tuple[ScorerSpec, ...]
    columns: Columns
    text_column: str
    id_column: str
    limit: MalformedLimit = dataclasses.field(default_factory=MalformedLimit)
    safe_bound: Mapping[str, Any] | None = None  # what `safe_bound.set_thresholds` reports, for the manifest

    def load(self) -> "LoadedScorers":
        """The scorers; ValueError where one is another here than where the run began."""
        return LoadedScorers(load_scorers(self.scorers, check=True))

    def run(self, job: ShardJob, loaded: "LoadedScorers") -> None:
        """Scores a shard; its done-record is written last."""
        loaded.raise_if_unreachable()
        out = OutputFolder(self.output)
        with out.at_work():
            out.write_json(job.record, score_shard(job, self, loaded, out))

    def failed(self, job: ShardJob, message: str) -> None:
        """Leaves the message, which names the file, where the calling process finds it."""
        named = message if job.path in message else f"{job.path}: {message}"
        OutputFolder(self.output).record_failure(job.name, named)


class LoadedScorers:
    """Scorers of one process, and the lock that lets its threads ask them in turn.

    Attributes:
      batch_scale: how many times the usual batch they want at once.
    """

    def __init__(self, scorers: Sequence[Scorer]):
        self.scorers, self.ensemble = list(scorers), Ensemble(scorers)
        wanted = max((getattr(scorer, "batch_characters", 0) for scorer in scorers), default=0)
        self.batch_scale = max(1, -(-wanted // BATCH_CHARACTERS))
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._failure = ""

    def raise_if_unreachable(self) -> None:
        """Raises OSError once a scorer failed MAX_FAILED_IN_A_ROW times in a row: no further shard starts."""
        if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise OSError(f"{NOT_BEGUN}{self._failed_in_a_row} shards that ended so: {self._failure}")

    def ask(self, texts: Sequence[str]) -> list[dict[str, Verdict]]:
        """For each text the verdict of every scorer by name; none where it has no content, and none is asked."""
        asked = [index for index, text in enumerate(texts) if text.strip()]
        answers: list[dict[str, Verdict]] = [{} for _ in texts]
        if not asked:
            return answers
        for name, verdicts in self.ask_all([texts[index] for index in asked]).items():
            for index, verdict in zip(asked, verdicts, strict=True):
                answers[index][name] = verdict
        return answers

    def ask_all(self, texts: Sequence[str]) -> dict[str, list[Verdict]]:
        """A verdict of every scorer, by name, for every text."""
        found = {}
        for scorer in self.scorers:
            try:
                with self._lock, no_quotations(f"scorer {scorer.name}", texts):
                    verdicts = scorer.score(texts)
            except OSError as error:
                self._failed_in_a_row, self._failure = self._failed_in_a_row + 1, str(error)
                raise
            if len(verdicts) != len(texts):
                raise ValueError(f"scorer {scorer.name}: {len(verdicts)} verdicts for {len(texts)} texts")
            found[scorer.name] = verdicts
        self._failed_in_a_row = 0
        return found


@contextlib.contextmanager
def no_quotations(who: str, texts: Sequence[str]) -> Iterator[None]:
    """Lets errors of a scorer through, but no message with a piece of a text."""
    try:
        yield
    except (ValueError, OSError) as error:
        message, kind = str(error), OSError if isinstance(error, OSError) else ValueError
    except Exception as error:
        message, kind = type(error).__name__, ValueError
    else:
        return
    pieces = {message[at : at + _QUOTE] for at in range(len(message) - _QUOTE + 1)}
    whole = {text for text in texts if _SHORT <= len(text) < _QUOTE and text in message}
    if whole or any(piece in text for piece in pieces for text in texts):
        message = "an error whose message quotes a document"
    raise kind(f"{who}: {message}") from None


def score_shard(job: ShardJob, work: ScoreWork, loaded: LoadedScorers, out: OutputFolder) -> dict[str, Any]:
    """Scores one shard and publishes its files; its record: counts, files, agreement. Raises as reading does."""
    started = time.monotonic()
    with out.staging() as staging, contextlib.ExitStack() as files:
        writer, tally = _ShardWriter(job, work, staging, files), RowTally(job.path, work.limit)

        def quarantine(malformed: Malformed) -> None:
            writer.quarantine(malformed)
            tally.add(malformed)

        agreement, empty, characters = Agreement(loaded.ensemble.names), 0, 0
        rows = writer.format.read(job.path, job.part, work.text_column, work.id_column, work.columns, quarantine)
        for batch in batches(rows, loaded.batch_scale):
            answers = loaded.ask([text for text, _ in batch])
            for verdicts in filter(None, answers):
                agreement.add(list(verdicts.values()))
            decisions = [loaded.ensemble.combine(list(given.values())) if given else EMPTY for given in answers]
            writer.write([payload for _, payload in batch], decisions, answers)
            tally.rows += len(batch)
            _write_count(staging, tally.rows)
            empty += answers.count({})
            characters += sum(len(text) for text, _ in batch)
        tally.finish()
        files.close()
        record = writer.publish(out)
    seconds = round(time.monotonic() - started, 3)
    return record | {
        "rows": tally.rows,
        "empty": empty,
        "characters": characters,
        "agreement": agreement.to_json(),
        "seconds": seconds,
    }


def _write_count(staging: str, rows: int) -> None:
    with open(os.path.join(staging, COUNT), "w") as file:
        file.write(str(rows))


def rows_under_way(out: OutputFolder) -> int:
    """Rows scored so far of shards that are not done: for a progress bar, of a local output only."""
    total = 0
    for path in glob.glob(f"{glob.escape(out.path(STAGING))}/*/{COUNT}"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:  # it comes and goes meanwhile
            total += int(file.read())
    return total


def batches(rows: Iterator[tuple[str, _T]], scale: int = 1) -> Iterator[list[tuple[str, _T]]]:
    """Rows in lists of at most BATCH_ROWS, and of BATCH_CHARACTERS unless one alone is longer; `scale` times both."""
    most_rows, most_characters = BATCH_ROWS * scale, BATCH_CHARACTERS * scale
    batch: list[tuple[str, _T]] = []
    characters = 0
    for row in rows:
        if batch and (len(batch) == most_rows or characters + len(row[0]) > most_characters):
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += len(row[0])
    if batch:
        yield batch


class _ShardWriter:
    """The output files of one shard, each made when its first row comes."""

    def __init__(self, job: ShardJob, work: ScoreWork, staging: str, files: contextlib.ExitStack):
        self._job, self._work, self._staging, self._files = job, work, staging, files
        self.format = parquet_rows if job.path.endswith(parquet_rows.SUFFIX) else json_rows
        self._schema = None
        if self.format is parquet_rows:
            self._schema = parquet_rows.output_schema(job.path, work.text_column, work.id_column, work.columns)
        self._sinks: dict[str, Any] = {}
        self._quarantined = 0
        self._quarantine_file: Any = None

    def write(
        self, payloads: Sequence[Any], decisions: Sequence[Verdict], answers: Sequence[Mapping[str, Verdict]]
    ) -> None:
        """Adds a batch of rows to the files of their scores."""
        by_folder: dict[str, list[tuple[Any, Mapping[str, Any]]]] = {}
        for payload, decision, verdicts in zip(payloads, decisions, answers, strict=True):
            values = self._work.columns.values(decision, verdicts)
            by_folder.setdefault(folder(decision.score), []).append((payload, values))
        for name, pairs in by_folder.items():
            self._sink(name).write([payload for payload, _ in pairs], [values for _, values in pairs])

    def _sink(self, name: str) -> Any:
        if name not in self._sinks:
            path = self._path(name)
            sink = (
                json_rows.Sink(path)
                if self._schema is None
                else parquet_rows.Sink(path, *self._schema, self._work.columns)
            )
            self._files.callback(sink.close)
            self._sinks[name] = sink
        return self._sinks[name]

    def quarantine(self, malformed: Malformed) -> None:
        """Keeps a malformed row with file, row number, reason and, where it can be read, the document's id."""
        if self._quarantine_file is None:
            self._quarantine_file = self._files.enter_context(open(self._path(QUARANTINE), "w", encoding="utf-8"))
        record = malformed.record(self._job.path) | {"id": _id(malformed.raw, self._work.id_column)}
        self._quarantine_file.write(json.dumps(record) + "\n")
        self._quarantined += 1

    def publish(self, out: OutputFolder) -> dict[str, Any]:
        """Gives the closed files their names and removes those of a former try; the record of counts and files."""
        rows = {name: self._sinks[name].rows if name in self._sinks else 0 for name in FOLDERS}
        rows[QUARANTINE] = self._quarantined
        files = {}
        for name, count in rows.items():
            target = output_name(self._job, name)
            if count:
                files[target] = {"rows": count} | out.publish(self._path(name), target)
            elif not out.is_remote:
                out.remove(target)
        return {"folders": rows, "files": files}

    def _path(self, name: str) -> str:
        return os.path.join(self._staging, name)


def output_name(job: ShardJob, name: str) -> str:
    """A shard's file in one of the folders, relative to the output."""
    if name == QUARANTINE:
        return f"{QUARANTINE}/{job.name}{MALFORMED_SUFFIX}"
    suffix = parquet_rows.SUFFIX if job.path.endswith(parquet_rows.SUFFIX) else json_rows.SUFFIX
    if name == UNSCORED:  # under no name that the tasks of `data_tasks` take for theirs
        return f"{name}/{job.name.partition('-')[2]}{suffix}"
    return f"{name}/{job.name}{suffix}"


def _id(raw: str, column: str) -> Any:
    try:
        row = json.loads(raw)
        value = row.get(column)
    except (ValueError, RecursionError, AttributeError):
        return None
    return value if isinstance(value, str | int) else None
