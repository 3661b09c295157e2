"""Decides which rows stay, from the measures of all shards: a few passes over them, one shard in memory at a time."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.selection import copies, keys, sampling
from safelm.selection.licences import CorpusLicences
from safelm.selection.measuring import MAX_KINDS, Kind, file_name
from safelm.selection.settings import SCORE, SelectSettings

FOLDER = "_chosen"
OUTCOMES = (  # in the order in which they are decided
    "selected",
    "empty text",
    "no harm score",
    "outside the scores",
    "not in the mix",
    "copy of a row above the scores",
    "exact duplicate",
    "near-duplicate",
    "contaminated",
    "not sampled",
    "not matched",
)
SELECTED, EMPTY, UNSCORED, OUTSIDE, NOT_IN_MIX, COPY_ABOVE = range(6)
EXACT, NEAR, CONTAMINATED, NOT_SAMPLED, NOT_MATCHED = range(COPY_ABOVE + 1, len(OUTCOMES))


@dataclasses.dataclass
class Choice:
    """The result.

    Attributes:
      documents, tokens: by kind and outcome.
      matched: documents and tokens of harmful and of safe marked rows.
      short: tokens of safe rows that matching lacks, by the strata other than the score.
      licences: by name what was read and what stays.
      prompts: place of a prompt in the index -> documents left out because they hold it.
      rows: shard name -> rows that stay.
    """

    documents: dict[Kind, Int[np.ndarray, " outcomes"]]
    tokens: dict[Kind, Int[np.ndarray, " outcomes"]]
    matched: dict[str, dict[str, int]]
    short: dict[tuple[str, ...], int]
    licences: dict[str, dict[str, int]]
    prompts: collections.Counter[int]
    rows: dict[str, int]


class _Shard:
    """The measures of one shard's rows; kinds by their number in the corpus."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], kind_of: np.ndarray, outcome_K: np.ndarray, base: int, first: int
    ):
        self.arrays, self.first = arrays, first
        self.row_N, self.tokens_N = arrays["row"], arrays["tokens"]
        self.kind_N: Int[np.ndarray, " N"] = kind_of[arrays["kind"]]
        self.key_N: UInt64[np.ndarray, " N"] = keys.row_keys(base, self.row_N)
        self.outcome_N = np.where(arrays["is_empty"], np.uint8(EMPTY), outcome_K[self.kind_N])


class Corpus:
    """The measures of all shards."""

    def __init__(
        self,
        out: OutputFolder,
        jobs: Sequence[ShardJob],
        records: Mapping[str, Mapping[str, Any]],
        facts: Mapping[str, Mapping[str, Any]],
        settings: SelectSettings,
    ):
        """`facts`: by path, what identifies a file's content (`documents.without_place`)."""
        self._out, self.jobs, self._settings = out, jobs, settings
        self._bases = {path: keys.file_base(settings.seed, each) for path, each in facts.items()}
        self.documents = sum(records[job.name]["documents"] for job in jobs)
        places: dict[Kind, int] = {}
        self._kinds_of: dict[str, np.ndarray] = {}
        for job in jobs:
            found = [(score, tuple(strata)) for score, strata in records[job.name]["kinds"]]
            self._kinds_of[job.name] = np.array([places.setdefault(kind, len(places)) for kind in found], np.int64)
        if len(places) > MAX_KINDS:
            raise ValueError(f"--strata={','.join(settings.strata)}: {len(places)} different values, over {MAX_KINDS}")
        self.kinds = list(places)
        self.licences = CorpusLicences({job.name: records[job.name]["licences"] for job in jobs})
        self._outcome_K = np.array([_outcome(kind, settings) for kind in self.kinds], np.uint8)
        self._marks: list[tuple[int, copies.Marks]] = []
        self._is_compared = False

    def shards(self) -> Iterator[_Shard]:
        """All shards in order, with the outcomes that are known so far."""
        first = 0
        for job in self.jobs:
            with self._out.open(file_name(job)) as file, np.load(file) as arrays:
                shard = _Shard(arrays, self._kinds_of[job.name], self._outcome_K, self._bases[job.path], first)
                for outcome, marks in self._marks:
                    is_out = marks.get(first, first + len(shard.row_N)) & (shard.outcome_N == SELECTED)
                    shard.outcome_N[is_out] = outcome
                if self._is_compared:
                    shard.outcome_N[arrays["is_contaminated"] & (shard.outcome_N == SELECTED)] = CONTAMINATED
                yield shard
            first += len(shard.row_N)

    def find_copies(self) -> None:
        """Finds the copies that the settings ask for; contaminated rows are out after them.

        Rows above the scores are compared first: what is known to be harmful by one copy is out in every copy. Copies
        of one another are then sought among the rows that are left, so that a row that is out takes no other with it.
        """
        near = self._settings.near_duplicates
        with self._out.staging() as folder:
            if self._settings.exact_duplicates:
                self._mark(EXACT, folder, "text_hash", [None])
            if near:
                self._mark(NEAR, folder, "bands", range(copies.band_shape(near)[0]), near)
        self._is_compared = True

    def _mark(self, outcome: int, folder: str, name: str, bands: Sequence[int | None], similarity: float = 0.0) -> None:
        """Marks the copies of rows above the scores, then those among the rows that are left, with this outcome."""
        most = self._settings.max_score
        if any(score is not None and score > most for score, _ in self.kinds):
            (limit,) = copies.order(np.array([most]), np.array([0], np.uint64)).tolist()
            above = copies.Marks(self.documents)
            for band in bands:
                parts = self._copies(name, band, with_above=True)
                copies.mark(parts, self.documents, folder, above, similarity, limit=limit)
            self._marks.append((COPY_ABOVE, above))
        marks = copies.Marks(self.documents)
        for band in bands:
            copies.mark(self._copies(name, band, with_above=False), self.documents, folder, marks, similarity)
        self._marks.append((outcome, marks))

    def _copies(self, name: str, band: int | None, *, with_above: bool) -> Iterator[copies.Copies]:
        score_K = np.array([-1 if score is None else score for score, _ in self.kinds], np.int64)
        for shard in self.shards():
            is_above_N = (shard.outcome_N == OUTSIDE) & (score_K[shard.kind_N] > self._settings.max_score)
            at = np.flatnonzero((shard.outcome_N == SELECTED) | (is_above_N & with_above))
            hashes = shard.arrays[name][at]
            order = copies.order(score_K[shard.kind_N[at]], shard.key_N[at])
            sketch = None if band is None else shard.arrays["sketch"][at]
            yield copies.Copies(shard.first + at, order, hashes if band is None else hashes[:, band : band + 1], sketch)


def _outcome(kind: Kind, settings: SelectSettings) -> int:
    """Why rows of a kind are out, whatever else they are; SELECTED if they may stay."""
    score, strata = kind
    if score is None and settings.needs_scores:
        return UNSCORED
    if score is not None and not settings.min_score <= score <= settings.max_score:
        return OUTSIDE
    if settings.mix and strata[settings.strata.index(settings.mix.column)] not in settings.mix.shares:
        return NOT_IN_MIX
    return SELECTED


def choose(corpus: Corpus, settings: SelectSettings, out: OutputFolder) -> Choice:
    """Chooses the rows and writes each shard's into the folder FOLDER.

    Raises ValueError for a budget that the corpus can't meet, saying what there is.
    """
    corpus.find_copies()
    cells = sorted({strata for _, strata in corpus.kinds})
    places = {cell: at for at, cell in enumerate(cells)}
    cell_K = np.array([places[strata] for _, strata in corpus.kinds], np.int64)
    limit_C = _limits(corpus, settings, cells, cell_K)
    matching = _matching(corpus, settings, cell_K, limit_C) if settings.matched_safe else None
    zeros = {kind: np.zeros(len(OUTCOMES), np.int64) for kind in corpus.kinds}
    choice = Choice(zeros, {kind: each.copy() for kind, each in zeros.items()}, {}, {}, {}, collections.Counter(), {})
    choice.short = matching.short if matching else {}
    choice.matched = {name: {"documents": 0, "tokens": 0} for name in ("harmful", "safe")} if matching else {}
    with out.staging() as staging:
        for job, shard in zip(corpus.jobs, corpus.shards(), strict=True):
            chosen = _finish(shard, cell_K, limit_C, matching, settings)
            _count(choice, corpus.kinds, shard, chosen)
            corpus.licences.add(job.name, shard.arrays, shard.tokens_N, shard.outcome_N == SELECTED)
            path = os.path.join(staging, "chosen.npz")
            np.savez(path, **chosen)
            out.publish(path, f"{FOLDER}/{job.name}.npz")
            choice.rows[job.name] = len(chosen["row"])
    choice.licences = corpus.licences.counts()
    return choice


def _limits(corpus: Corpus, settings: SelectSettings, cells: Sequence[tuple[str, ...]], cell_K: np.ndarray) -> Any:
    """The cutoff of each cell in the order of keys."""
    if settings.token_budget is None:
        return np.full(len(cells), sampling.ALL, np.uint64)

    def rows() -> Iterator[sampling.Draws]:
        for shard in corpus.shards():
            at = np.flatnonzero(shard.outcome_N == SELECTED)
            yield cell_K[shard.kind_N[at]], shard.key_N[at], shard.tokens_N[at]

    tokens_CK = sampling.tokens_by_bucket(rows(), len(cells))
    available = tokens_CK.sum(axis=1).tolist()
    names, group_C = [""], [0] * len(cells)
    if settings.mix:
        column = settings.strata.index(settings.mix.column)
        names = list(settings.mix.shares)
        group_C = [names.index(cell[column]) if cell[column] in names else len(names) for cell in cells]
    budgets = _budgets(settings, names)
    for group, budget in budgets.items():
        there = sum(tokens for tokens, of in zip(available, group_C, strict=True) if of == group)
        if budget > there:
            share = f" needs {budget:,} tokens of {settings.mix.column}={names[group]}" if settings.mix else ""
            raise ValueError(
                f"--token_budget={settings.token_budget:,}{share}: only {there:,} tokens are there after thresholds, "
                "copies and contamination"
            )
    return sampling.draw(rows, tokens_CK, group_C, budgets).limit_C


def _budgets(settings: SelectSettings, names: Sequence[str]) -> dict[int, int]:
    """Tokens by group; what rounding leaves goes to the first groups."""
    if not settings.mix:
        return {0: settings.token_budget}
    found = {at: int(settings.token_budget * settings.mix.shares[name]) for at, name in enumerate(names)}
    for at in range(settings.token_budget - sum(found.values())):
        found[at % len(names)] += 1
    return found


@dataclasses.dataclass
class _Matching:
    """Which selected safe rows are marked: those with a second key below their group's limit."""

    group_K: Int[np.ndarray, " kinds"]
    is_harmful_K: np.ndarray
    limit_G: UInt64[np.ndarray, " groups"]
    short: dict[tuple[str, ...], int]


def _matching(corpus: Corpus, settings: SelectSettings, cell_K: np.ndarray, limit_C: np.ndarray) -> _Matching:
    """Draws safe rows for the harmful ones of the same strata, the score aside, among the sampled rows."""
    kept = [at for at, name in enumerate(settings.strata) if name != SCORE]
    group_of = [tuple(strata[at] for at in kept) for _, strata in corpus.kinds]
    groups = sorted(set(group_of))
    places = {group: at for at, group in enumerate(groups)}
    group_K = np.array([places[group] for group in group_of], np.int64)
    is_harmful_K = np.array([score is not None and score >= settings.harmful_score for score, _ in corpus.kinds])
    harmful_G = np.zeros(len(groups), np.int64)

    def rows(of_harmful: bool) -> Iterator[sampling.Draws]:
        for shard in corpus.shards():
            is_in_N = (shard.outcome_N == SELECTED) & (shard.key_N < limit_C[cell_K[shard.kind_N]])
            at = np.flatnonzero(is_in_N & (is_harmful_K[shard.kind_N] == of_harmful))
            yield group_K[shard.kind_N[at]], keys.second_keys(shard.key_N[at]), shard.tokens_N[at]

    for group_N, _, tokens_N in rows(True):
        np.add.at(harmful_G, group_N, tokens_N)
    tokens_GK = sampling.tokens_by_bucket(rows(False), len(groups))
    wanted = {at: round(int(tokens) * settings.matched_safe) for at, tokens in enumerate(harmful_G)}
    there = tokens_GK.sum(axis=1).tolist()
    budgets = {at: min(tokens, there[at]) for at, tokens in wanted.items()}
    drawn = sampling.draw(lambda: rows(False), tokens_GK, list(range(len(groups))), budgets)
    short = {groups[at]: wanted[at] - budgets[at] for at in wanted if wanted[at] > budgets[at]}
    return _Matching(group_K, is_harmful_K, drawn.limit_C, short)


def _finish(
    shard: _Shard, cell_K: np.ndarray, limit_C: np.ndarray, matching: _Matching | None, settings: SelectSettings
) -> dict[str, np.ndarray]:
    """Settles the outcomes of a shard; its chosen rows."""
    is_in_N = shard.outcome_N == SELECTED
    shard.outcome_N[is_in_N & (shard.key_N >= limit_C[cell_K[shard.kind_N]])] = NOT_SAMPLED
    is_marked_N = np.zeros(len(shard.row_N), np.bool_)
    is_harmful_N = np.zeros(len(shard.row_N), np.bool_)
    if matching:
        is_in_N = shard.outcome_N == SELECTED
        is_harmful_N = is_in_N & matching.is_harmful_K[shard.kind_N]
        is_drawn_N = keys.second_keys(shard.key_N) < matching.limit_G[matching.group_K[shard.kind_N]]
        is_marked_N = is_harmful_N | (is_in_N & is_drawn_N)
        if settings.only_matched:
            shard.outcome_N[is_in_N & ~is_marked_N] = NOT_MATCHED
    at = np.flatnonzero(shard.outcome_N == SELECTED)
    named = {"row": shard.row_N, "tokens": shard.tokens_N, "is_marked": is_marked_N, "is_harmful": is_harmful_N}
    return {name: values[at] for name, values in named.items()}


def _count(choice: Choice, kinds: Sequence[Kind], shard: _Shard, chosen: Mapping[str, np.ndarray]) -> None:
    size = len(kinds) * len(OUTCOMES)
    flat_N = shard.kind_N * len(OUTCOMES) + shard.outcome_N
    documents = np.bincount(flat_N, minlength=size).reshape(len(kinds), -1)
    tokens = np.zeros(size, np.int64)
    np.add.at(tokens, flat_N, shard.tokens_N)
    for at in np.flatnonzero(documents.any(axis=1)).tolist():
        choice.documents[kinds[at]] += documents[at]
        choice.tokens[kinds[at]] += tokens.reshape(len(kinds), -1)[at]
    if choice.matched:
        for name, is_side in (("harmful", chosen["is_harmful"]), ("safe", ~chosen["is_harmful"])):
            is_side = is_side & chosen["is_marked"]
            choice.matched[name]["documents"] += int(is_side.sum())
            choice.matched[name]["tokens"] += int(chosen["tokens"][is_side].sum())
    left_out = shard.row_N[shard.outcome_N == CONTAMINATED]
    hits = shard.arrays["hit_prompt"][np.isin(shard.arrays["hit_row"], left_out)]
    choice.prompts.update(hits.tolist())
