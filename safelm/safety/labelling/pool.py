"""The documents to choose from: rows that carry scores, or a sample of plain documents, scored on the spot."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from safelm import documents
from safelm.documents import Malformed, MalformedError, MalformedLimit, RowTally, harm
from safelm.io.progress import Bar
from safelm.safety.labelling.choice import Candidate, Smallest, draw
from safelm.safety.labelling.uncertainty import DETAILS, opinion, opinions_of, scorers_of
from safelm.safety.scorer import Scorer
from safelm.safety.scoring.shard import LoadedScorers, batches

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """Where the documents are and which columns hold what.

    Attributes:
      score_column: the harm score of rows that have it under another name than `documents.harm` knows.
      sample: at most so many documents are scored on the spot, drawn by `seed`.
    """

    input: tuple[str, ...]
    text_column: str = "text"
    id_column: str = documents.ID_COLUMN
    score_column: str | None = None
    sample: int = 1000
    seed: int = 0
    limit: MalformedLimit = dataclasses.field(default_factory=MalformedLimit)

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ValueError(f"--sample={self.sample}: must be at least 1")


def read(settings: PoolSettings, scorers: Sequence[Scorer] = ()) -> Iterator[Candidate]:
    """The pool: with scorers a sample that they score now, else the scored rows of the input.

    Raises ValueError that names the file which holds no texts, no scores or too many malformed rows, and what reading
    and scoring raise. Rows without content or without a score are left out and counted in the log.
    """
    files = documents.list_files(settings.input)
    if scorers:
        yield from _scored_now(files, settings, scorers)
        return
    first = documents.check_names(files[0], settings.text_column, settings.id_column)
    if first and not any(harm.text_harm_score(row.values, files[0], settings.score_column).column for row in first):
        advice = harm.advice(first[0].values)
        raise ValueError(f"{files[0]}: no row has a harm score: {advice}, or score a sample now by --scorers=bundled")
    unscored = 0
    for path in Bar(files, unit="file", disable=None):
        for row, identity, text in _rows(path, settings, _columns(path, settings)):
            found = harm.text_harm_score(row.values, path, settings.score_column)
            if found.value is None:
                unscored += 1
                continue
            yield Candidate(path, row.number, identity, text, found.value, opinions_of(row.values, found))
    if unscored:
        _logger.warning("%d documents have no score and can't be chosen", unscored)


def _columns(path: str, settings: PoolSettings) -> list[str] | None:
    """What is read of a Parquet file: id, harm score, what scorers say."""
    if not path.endswith(documents.PARQUET):
        return None
    with documents.open_parquet(path) as table:
        names = documents.field_names(table.schema_arrow)
    scorers = scorers_of(names)
    wanted = {f"score_{name}" for name in scorers} | {f"{name}_{detail}" for name in scorers for detail in DETAILS}
    wanted |= {settings.id_column, *harm.text_score_columns(names, settings.score_column)}
    return [name for name in names if name in wanted]


def _rows(path: str, settings: PoolSettings, columns: Sequence[str] | None) -> Iterator[tuple[Any, str, str]]:
    """(row, id, text) of every document with content; malformed rows are counted against the limit."""
    tally = RowTally(path, settings.limit)
    rows = documents.iter_rows(
        path,
        tally.add,
        text_column=settings.text_column,
        columns=columns,
        required=documents.required_id(settings.id_column),
    )
    for row in rows:
        text = documents.field(row.values, settings.text_column)
        try:
            identity = documents.row_id(row.values, text, settings.id_column)
            opinions_of(row.values, documents.HarmScore())  # so that a column out of range makes a malformed row
        except MalformedError as error:
            tally.add(Malformed(row.number, str(error), ""))
            continue
        tally.add()
        if text.strip():
            yield row, identity, text
    tally.finish()


def _scored_now(files: Sequence[str], settings: PoolSettings, scorers: Sequence[Scorer]) -> Iterator[Candidate]:
    sample = Smallest(settings.sample)
    for path in files:
        for row, identity, text in _rows(path, settings, [settings.id_column]):
            candidate = Candidate(path, row.number, identity, text)
            sample.add(draw(settings.seed, candidate), candidate)
    loaded, unscored = LoadedScorers(scorers), 0
    found = sample.values()
    with Bar(total=len(found), unit="document", disable=None) as bar:
        for batch in batches((each.text, each) for each in found):
            for (_, each), verdicts in zip(batch, loaded.ask([text for text, _ in batch]), strict=True):
                score = loaded.ensemble.combine(list(verdicts.values())).score
                opinions = {
                    name: opinion(given.score, given.details)
                    for name, given in verdicts.items()
                    if given.score is not None
                }
                unscored += score is None
                if score is not None:
                    yield dataclasses.replace(each, harm_score=score, opinions=opinions)
            bar.update(len(batch))
    if unscored:
        _logger.warning("%d documents got no score and can't be chosen", unscored)
