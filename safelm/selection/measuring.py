"""The first pass: what of every row decides whether it stays, as arrays in one file a shard.

row, tokens     number in the file (from 1), tokens of its text
kind            place in the shard's list of (score, strata)
licence         place in the shard's list of licences, if any column of them is read
is_empty        whether its text has no characters but white space
is_contaminated whether it holds a prompt of an evaluation set
text_hash       two halves of a hash of the text, if exact duplicates are looked for
sketch, bands   of near-duplicates (`safelm.selection.copies`)
hit_row, hit_prompt  which prompt each contaminated row holds
"""

import collections
import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safelm import documents
from safelm.documents import Malformed, MalformedError, RowTally, annotations, harm
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring.shard import batches
from safelm.safety.synthesis.gates.form import MAX_LANGUAGE_CHARS, language_identifier
from safelm.selection import copies, reading
from safelm.selection.contamination import Decontaminator, PromptIndex
from safelm.selection.licences import ShardLicences
from safelm.selection.settings import LANGUAGE, NONE, SCORE, SOURCE, SelectSettings
from safelm.tags import MAX_SCORE
from safelm.text.tokenizer import Tokenizer

FOLDER, PROMPTS = "_measured", "_prompts.json"
MAX_KINDS = 10_000
_MAX_VALUE_CHARACTERS = 100

Kind = tuple[int | None, tuple[str, ...]]  # harm score of the text itself, values of the strata


@dataclasses.dataclass(frozen=True)
class MeasureWork:
    """What workers need to measure shards (see `safelm.jobs.beam_jobs.Work`).

    Attributes:
      sources: path of an input file -> the name of its input, for those that have one.
      has_prompts: whether the output folder holds an index of prompts to look for.
    """

    output: str
    settings: SelectSettings
    sources: Mapping[str, str]
    has_prompts: bool

    def load(self) -> "Loaded":
        """Tokenizer and index of prompts."""
        decontaminator = None
        if self.has_prompts:
            (values,) = OutputFolder(self.output).read_json([PROMPTS])
            decontaminator = Decontaminator(PromptIndex.from_json(values))
        name = self.settings.tokenizer
        return Loaded(Tokenizer.from_pretrained(name) if name else None, decontaminator)

    def run(self, job: ShardJob, loaded: "Loaded") -> None:
        """Measures a shard; its record is written last."""
        out = OutputFolder(self.output)
        with out.at_work():
            out.write_json(job.record, measure_shard(job, self, loaded, out))

    def failed(self, job: ShardJob, message: str) -> None:
        """Leaves the message, which names the file, where the calling process finds it."""
        named = message if job.path in message else f"{job.path}: {message}"
        OutputFolder(self.output).record_failure(job.name, named)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What measuring takes beside the settings."""

    tokenizer: Any
    decontaminator: Decontaminator | None


def file_name(job: ShardJob) -> str:
    """The file of a shard's measures, relative to the output."""
    return f"{FOLDER}/{job.name}.npz"


def needs_text(settings: SelectSettings, has_prompts: bool) -> bool:
    """Whether the first pass has to read the texts."""
    looks = settings.exact_duplicates or settings.near_duplicates or settings.detect_language
    return bool(settings.tokenizer or looks or has_prompts)


def measure_shard(job: ShardJob, work: MeasureWork, loaded: Loaded, out: OutputFolder) -> dict[str, Any]:
    """Measures one shard and publishes the arrays; its record. Raises as reading does, naming the file."""
    started, settings, source = time.monotonic(), work.settings, work.sources.get(job.path, "")
    tally, measures = RowTally(job.path, settings.limit), Measures(job.path, source, settings, loaded)
    text_column = settings.text_column if needs_text(settings, work.has_prompts) else None
    columns, required = settings.columns(source), settings.required(job.path, source)
    rows = reading.values(job, text_column, columns, required, tally.add, settings.annotations)
    texts = ((row[text_column] if text_column else "", (number, row)) for number, row in rows)
    for batch in batches(texts):
        kept = []
        for text, (number, row) in batch:
            try:
                measures.add(number, row, text if text_column else None)
                kept.append(text)
            except MalformedError as error:
                tally.add(Malformed(number, str(error), ""))
        tally.rows += len(kept)
        measures.add_texts(kept)
    tally.finish()
    with out.staging() as staging:
        path = os.path.join(staging, "measures.npz")
        np.savez(path, **measures.arrays())
        files = {file_name(job): out.publish(path, file_name(job))}
    return {
        "files": files,
        "rows": tally.rows,
        "malformed": tally.malformed,
        "documents": len(measures.rows),
        "tokens": int(sum(measures.tokens)),
        "kinds": [[score, list(strata)] for score, strata in measures.kinds],
        "licences": measures.licences.named(),
        "score_columns": dict(measures.score_columns),
        "unscored_rewrites": measures.unscored_rewrites,
        "seconds": round(time.monotonic() - started, 3),
    }


class Measures:
    """The measures of a shard's rows so far."""

    def __init__(self, path: str, source: str, settings: SelectSettings, loaded: Loaded):
        self._path, self._source, self._settings, self._loaded = path, source, settings, loaded
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.kinds: dict[Kind, int] = {}
        self.score_columns: collections.Counter[str] = collections.Counter()
        self.unscored_rewrites = 0
        self.licences = ShardLicences(settings.licence_columns)
        self._annotated = annotations.column_names(path, settings.annotations)
        self._kind: list[int] = []
        self._is_empty: list[bool] = []
        self._text_hash: list[bytes] = []
        self._sketches: list[np.ndarray] = []
        self._hits: list[tuple[int, int]] = []

    def add(self, number: int, row: Mapping[str, Any], text: str | None) -> None:
        """Takes a row's values. Raises MalformedError for one that can't be used."""
        settings = self._settings
        found = harm.text_harm_score(row, self._path, settings.score_column, self._annotated)
        score = found.value
        if score and settings.class_thresholds:
            probabilities = documents.field(row, settings.probabilities_column)
            if probabilities is None:
                probabilities = [documents.field(row, name) for name in settings.probability_columns]
            score = lowered(score, probabilities, settings.class_thresholds, settings.probabilities_column)
        tokens = _tokens(row, settings.token_column) if settings.token_column else 0
        strata = tuple(self._stratum(name, score, row, text) for name in settings.strata)
        kind = (score, strata)
        index = self.kinds.setdefault(kind, len(self.kinds))
        if index >= MAX_KINDS:
            raise ValueError(
                f"{self._path}: --strata={','.join(settings.strata)}: more than {MAX_KINDS} different values"
            )
        self.licences.add(row)
        self.score_columns.update([found.column] if found.value is not None else [])
        is_unnamed = settings.score_column is None and not found.column
        self.unscored_rewrites += is_unnamed and harm.is_rewritten(row, self._path)
        self.rows.append(number)
        self.tokens.append(tokens)
        self._kind.append(index)
        self._is_empty.append(text is not None and not text.strip())

    def add_texts(self, texts: Sequence[str]) -> None:
        """Takes the texts of the rows that were added last."""
        settings, first = self._settings, len(self.rows) - len(texts)
        if self._loaded.tokenizer is not None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # every core has a process already
            self.tokens[first:] = [len(ids) for ids in self._loaded.tokenizer.encode_batch(texts)]
        if settings.exact_duplicates:
            encoded = (text.encode("utf-8", "surrogatepass") for text in texts)
            self._text_hash += [hashlib.blake2b(each, digest_size=16).digest() for each in encoded]
        if settings.near_duplicates:
            self._sketches += [copies.signature(text) for text in texts]
        if self._loaded.decontaminator is not None:
            for number, prompts in zip(self.rows[first:], self._loaded.decontaminator.find(texts), strict=True):
                self._hits += [(number, prompt) for prompt in prompts]

    def arrays(self) -> dict[str, np.ndarray]:
        """All measures by name."""
        row = np.array(self.rows, np.int64)
        hits = np.array(self._hits, np.int64).reshape(-1, 2)
        found = {
            "row": row,
            "tokens": np.array(self.tokens, np.int64),
            "kind": np.array(self._kind, np.uint32),
            "is_empty": np.array(self._is_empty, np.bool_),
            "is_contaminated": np.isin(row, hits[:, 0]),
            "hit_row": hits[:, 0],
            "hit_prompt": hits[:, 1],
            **self.licences.arrays(),
        }
        if self._settings.exact_duplicates:
            found["text_hash"] = np.frombuffer(b"".join(self._text_hash), np.uint64).reshape(-1, 2)
        if self._settings.near_duplicates:
            signatures = np.array(self._sketches, np.uint32).reshape(-1, copies.PERMUTATIONS)
            found["sketch"] = signatures.astype(np.uint8)
            found["bands"] = copies.bands(signatures, self._settings.near_duplicates)
        return found

    def _stratum(self, name: str, score: int | None, row: Mapping[str, Any], text: str | None) -> str:
        if name == SCORE:
            return NONE if score is None else str(score)
        if name == SOURCE and self._source:
            return self._source
        if name == LANGUAGE and self._settings.detect_language:
            return language_identifier().classify((text or "")[:MAX_LANGUAGE_CHARS])[0]
        return _value(documents.field(row, name), name)


def lowered(score: int, probabilities: Any, thresholds: Mapping[int, float], column: str) -> int:
    """The highest score up to `score` that a row keeps: P(at least that score) reaches the score's threshold.

    Raises MalformedError unless there is a probability for each score.
    """
    is_list = isinstance(probabilities, list | tuple) and len(probabilities) == MAX_SCORE + 1
    if not is_list or not all(isinstance(p, int | float) and not isinstance(p, bool) for p in probabilities):
        raise MalformedError(f"field {column!r} is not a list of {MAX_SCORE + 1} probabilities")
    while score > 0 and sum(probabilities[score:]) < thresholds.get(score, 0.0):
        score -= 1
    return score


def _tokens(row: Mapping[str, Any], column: str) -> int:
    found = documents.field(row, column)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise MalformedError(f"field {column!r} is no number of tokens")
    return found


@functools.lru_cache(1 << 14)
def _named(value: str, column: str) -> str:
    if len(value) > _MAX_VALUE_CHARACTERS:
        raise MalformedError(f"field {column!r} has {len(value)} characters, more than a stratum can have")
    documents.check_text(value, column)
    return value


def _value(found: Any, column: str) -> str:
    """A value of a stratum as text. Raises MalformedError for one that is none."""
    if found is None:
        return NONE
    if not isinstance(found, str | int | float):
        raise MalformedError(f"field {column!r} is {type(found).__name__}, neither text nor number")
    return _named(str(found), column)
