"""Computes the card's figures from tallies: frequencies and shares of documents with 95% intervals."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import documents
from safelm.jobs import beam_runner
from safelm.safety.report_card import corpus, normal_form
from safelm.safety.report_card import queries as query_sets
from safelm.safety.report_card.corpus import Counted, SliceInput
from safelm.safety.report_card.counting import SCORE_SLICES, UNSCORED_SLICE, CountSettings, token_definition
from safelm.safety.report_card.queries import QuerySet
from safelm.safety.report_card.tally import ALL, SCORES, Hits, Tally
from safelm.stats.intervals import rate

SCHEMA = "safelm.report_card/1"
WHOLE = "all"
AUTOMATIC = (WHOLE, *SCORE_SLICES, UNSCORED_SLICE)
INTERVALS = (
    "95%. Frequencies: the gamma interval of Fay and Feuer (1997) over documents, whose hits count as one event of "
    "their size (hits cluster within documents, so an interval that took hits for independent would be too narrow); "
    "exact Poisson where no document has more than one hit. Shares of documents: Wilson."
)


def gamma_interval(hits: Hits, exposure: float) -> tuple[float, float]:
    """95% interval of hits / exposure, by Fay and Feuer (1997) for a weighted sum of Poisson counts of documents.

    With y hits, v the sum of squared hits of documents and w the largest of them: from v / 2y times the 2.5% quantile
    of chi squared with 2y^2 / v degrees of freedom, to (v + w^2) / 2(y + w) times the 97.5% quantile with 2(y + w)^2 /
    (v + w^2). No hits: w = 1, an upper limit of 3.69 hits.
    """
    from scipy.special import gammaincinv

    y, v, w = float(hits.hits), float(hits.squares), float(max(hits.largest, 1))
    low = float(v / y * gammaincinv(y * y / v, 0.025)) if y else 0.0
    y, v = y + w, v + w * w
    return low / exposure, float(v / y * gammaincinv(y * y / v, 0.975)) / exposure


def count_and_build(
    inputs: Sequence[SliceInput],
    settings: CountSettings,
    folder: str,
    runner: beam_runner.Runner | None = None,
    limit: documents.MalformedLimit | None = None,
) -> dict[str, Any]:
    """Counts files and returns the card as JSON; arguments and errors as in `corpus.count_corpus`."""
    counted = corpus.count_corpus(inputs, settings, folder, runner, limit)
    for one, result in zip(inputs, counted, strict=True):
        corpus.tell_scores(one, result.count)
    return build(inputs, counted, query_sets.load_queries(settings.queries), settings)


def build(
    inputs: Sequence[SliceInput], counted: Sequence[Counted], queries: QuerySet, settings: CountSettings
) -> dict[str, Any]:
    """The card as JSON. Automatic slices follow the whole of their input; named ones keep the given order."""
    slices: list[dict[str, Any]] = []
    for one, result in zip(inputs, counted, strict=True):
        slices += [_slice(name, tally, queries) for name, tally in _tallies(one, result, settings.top)]
    return {
        "schema": SCHEMA,
        "definitions": definitions(queries, settings),
        "queries": {"name": queries.name, "source": queries.source, "by_category": _by_category(queries)},
        "inputs": [_input(one, result) for one, result in zip(inputs, counted, strict=True)],
        "slices": slices,
    }


def definitions(queries: QuerySet, settings: CountSettings) -> dict[str, Any]:
    """The definitions in which two cards must agree to be compared."""
    return {
        "token": token_definition(settings),
        "queries_sha256": queries.sha256,
        "matching_version": normal_form.RULES_VERSION,
        "matching": list(normal_form.RULES),
        "intervals": INTERVALS,
    }


def _by_category(queries: QuerySet) -> dict[str, list[str]]:
    return {
        name: [query for query, of in zip(queries.queries, queries.categories_of, strict=True) if index in of]
        for index, name in enumerate(queries.categories)
    }


def _tallies(one: SliceInput, result: Counted, top: int) -> list[tuple[str, Tally]]:
    tallies = result.count.tallies
    if one.name is not None:
        return [(one.name, tallies[one.name])]
    whole = Tally()
    for tally in tallies.values():
        whole.merge(tally, top)
    if set(tallies) == {UNSCORED_SLICE}:
        return [(WHOLE, whole)]
    return [(WHOLE, whole), *((name, tallies[name]) for name in (*SCORE_SLICES, UNSCORED_SLICE) if name in tallies)]


def _input(one: SliceInput, result: Counted) -> dict[str, Any]:
    count = result.count
    return {
        "slice": one.name or "by score",
        "patterns": list(one.patterns),
        "files": result.files,
        "file_bytes": result.bytes,
        "rows": count.rows,
        "malformed_rows": count.malformed.total(),
        "malformed_reasons": dict(count.malformed.most_common()),
        "score_columns": dict(sorted(count.score_columns.items())),
        "columns_not_taken_for_harm": dict(sorted(count.passed_over.items())),
        "unusable_scores": count.unusable_scores,
    }


def _slice(name: str, tally: Tally, queries: QuerySet) -> dict[str, Any]:
    nothing = Hits()
    found = {
        query: _frequency(tally.found[f"query:{query}"], tally)
        for query in queries.queries
        if f"query:{query}" in tally.found
    }
    return {
        "name": name,
        "documents": tally.documents,
        "empty_documents": tally.empty,
        "tokens": tally.tokens,
        "bytes": tally.bytes,
        "scores": {score: _share(tally, score) for score in SCORES},
        "all": _frequency(tally.found.get(ALL, nothing), tally),
        "categories": {
            category: _frequency(tally.found.get(f"category:{category}", nothing), tally)
            for category in queries.categories
        },
        "queries_found": dict(sorted(found.items(), key=lambda item: (-item[1]["hits"], item[0]))),
        "top_documents": [_top(one) for one in tally.top],
    }


def _share(tally: Tally, score: str) -> dict[str, Any]:
    documents = tally.documents_by_score[score]
    estimate = rate(documents, tally.documents) if tally.documents else None
    return {
        "documents": documents,
        "tokens": tally.tokens_by_score[score],
        "share": estimate and estimate.value,
        "low": estimate and estimate.low,
        "high": estimate and estimate.high,
    }


def _frequency(hits: Hits, tally: Tally) -> dict[str, Any]:
    """A frequency; None if there are no tokens."""
    low, high = gamma_interval(hits, tally.tokens / 1e6) if tally.tokens else (None, None)
    share = rate(hits.documents, tally.documents) if tally.documents else None
    return {
        "hits": hits.hits,
        "documents": hits.documents,
        "per_million": hits.hits / tally.tokens * 1e6 if tally.tokens else None,
        "low": low,
        "high": high,
        "share": share and share.value,
        "share_low": share and share.low,
        "share_high": share and share.high,
        "squares": hits.squares,
    }


def _top(one: Any) -> Mapping[str, Any]:
    facts = dataclasses.asdict(one) | {"queries": dict(one.queries)}
    return facts if one.excerpt else {name: value for name, value in facts.items() if name != "excerpt"}
