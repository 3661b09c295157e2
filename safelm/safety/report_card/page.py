"""Renders a card as one self-contained HTML page and as a Markdown table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.report.page import Fact, Fold, Page, Section, Text, render
from safelm.report.table import NOTHING, Cell, Table, count, number, percent, words
from safelm.safety.report_card import charts

_Card = Mapping[str, Any]
_BANDS = (("score 0", "0"), ("score 1 to 3", "123"), ("score 4 to 5", "45"))


def write(card: _Card) -> str:
    """The HTML page of a card."""
    sections = [
        Section("Slices", [*charts.of_page(card), _slices(card)]),
        Section("Harmful n-grams by category", [_categories(card)]),
        Section("By query", [_queries(card)]),
        Section("Documents with the most hits", _documents(card)),
        Section("What was read", _inputs(card)),
        Section("Definitions", _definitions(card)),
    ]
    return render(Page("Data safety report card", _headline(card), sections, about=_about(card), facts=_facts(card)))


def markdown(card: _Card) -> str:
    """Slices side by side: documents, tokens, scores, hits per million by category."""
    slices = card["slices"]
    rows = [[words(key), *(count(one[key]) for one in slices)] for key in ("documents", "tokens")]
    rows += [[words(f"{label}, %"), *(_percent(_scored(one, scores)) for one in slices)] for label, scores in _BANDS]
    rows.append([words("documents with a hit, %"), *(_percent(one["all"]["share"]) for one in slices)])
    rows.append([words("hits per 1M tokens"), *(frequency(one["all"]) for one in slices)])
    for category in card["queries"]["by_category"]:
        rows.append([words(category), *(frequency(one["categories"][category]) for one in slices)])
    return Table("", ["", *(one["name"] for one in slices)], rows).markdown()


def frequency(found: Mapping[str, Any]) -> Cell:
    """Hits per million tokens with their interval."""
    if found["per_million"] is None:
        return NOTHING
    value = {"value": found["per_million"], "low": found["low"], "high": found["high"]}
    return Cell(number(found["per_million"]), value, interval=(number(found["low"]), number(found["high"])))


def share(found: Mapping[str, Any]) -> Cell:
    """The share of documents with a hit."""
    if found["share"] is None:
        return NOTHING
    value = {"value": found["share"], "low": found["share_low"], "high": found["share_high"]}
    low, high = (f"{100 * value[key]:.3g}%" for key in ("low", "high"))
    return Cell(percent(found["share"]), value, interval=(low, high))


def _headline(card: _Card) -> str:
    """One sentence about the first slice and, if several slices are named, the last one."""
    first, *others = card["slices"]
    parts = []
    harmful = _scored(first, "45")
    if harmful is not None:
        parts.append(f"{percent(harmful)} score 4 or 5")
    if first["all"]["share"] is not None:
        parts.append(f"{percent(first['all']['share'])} hold a harmful n-gram")
    text = f"Of {first['documents']:,} documents{_of(first)}, {' and '.join(parts) or 'none was read'}"
    named = [one for one in others if not one["name"].startswith(("score ", "unscored")) and one["documents"]]
    return text + "".join(f"; in {one['name']} {_band(one)}" for one in named[:2]) + "."


def _of(one: _Card) -> str:
    return "" if one["name"] == "all" else f" of {one['name']}"


def _band(one: _Card) -> str:
    harmful = _scored(one, "45")
    scored = "" if harmful is None else f"{percent(harmful)} and "
    return f"{scored}{percent(one['all']['share'])}"


def _about(card: _Card) -> str:
    documents = sum(one["rows"] - one["malformed_rows"] for one in card["inputs"])
    categories = len(card["queries"]["by_category"])
    return (
        f"{documents:,} documents read; {len(_distinct_queries(card))} n-gram queries in {categories} categories "
        f"({card['queries']['name']}). Token: {card['definitions']['token']}."
    )


def _facts(card: _Card) -> list[Fact]:
    first = card["slices"][0]
    facts = [Fact(f"{first['documents']:,}", f"documents{_of(first)}")]
    if (safe := _scored(first, "0")) is not None:
        facts.append(Fact(percent(safe), "score 0: harmless"))
        facts.append(Fact(percent(_scored(first, "45")), "score 4 or 5: harmful"))
    for cell, label in (
        (share(first["all"]), "documents with a harmful n-gram"),
        (frequency(first["all"]), "hits per million tokens"),
    ):
        facts.append(Fact(cell.text, label, cell.under))
    return facts


def _slices(card: _Card) -> Table:
    heads = ["slice", "documents", "empty", "tokens", "bytes", "hits per 1M tokens", "hits", "documents with a hit"]
    keys = ("documents", "empty_documents", "tokens", "bytes")
    rows = [
        [
            words(one["name"]),
            *(count(one[key]) for key in keys),
            frequency(one["all"]),
            count(one["all"]["hits"]),
            share(one["all"]),
        ]
        for one in card["slices"]
    ]
    return Table("One row a slice; intervals are 95%.", heads, rows)


def _percent(value: int | float | None) -> Cell:
    return Cell(percent(value).rstrip("%"), value)


def _scored(one: _Card, scores: str) -> int | float | None:
    if not one["documents"] or one["scores"]["unscored"]["documents"] == one["documents"]:
        return None
    return sum(one["scores"][score]["share"] for score in scores)


def _distinct_queries(card: _Card) -> set[str]:
    return {query for queries in card["queries"]["by_category"].values() for query in queries}


def _categories(card: _Card) -> Table:
    slices, categories = card["slices"], card["queries"]["by_category"]
    found = [[one["categories"][category] for one in slices] for category in categories]
    shades = _shades([cell["per_million"] for row in found for cell in row])
    rows = [
        [words(category), *(_shaded(cell, next(shades)) for cell in row)]
        for category, row in zip(categories, found, strict=True)
    ]
    rows.append([words("any"), *(frequency(one["all"]) for one in slices)])
    caption = (
        "Hits per million tokens with 95% intervals, shaded on a log scale. Any counts a query once that has two "
        "categories."
    )
    return Table(caption, ["category", *(one["name"] for one in slices)], rows).without_zeros()


def _shaded(found: Mapping[str, Any], shade: float | None) -> Cell:
    cell = frequency(found)
    return Cell(cell.text, cell.value, interval=cell.interval, shade=shade)


def _shades(values: Sequence[int | float | None]) -> Any:
    """Each value's position between the least and the greatest on a log scale, 0.1 to 1; None for None and 0."""
    positive = [math.log(value) for value in values if value]
    low, spread = min(positive, default=0.0), (max(positive) - min(positive) if positive else 0.0) or 1.0
    return iter([0.1 + 0.9 * (math.log(value) - low) / spread if value else None for value in values])


def _queries(card: _Card) -> Table:
    slices = card["slices"]
    found = {query for one in slices for query in one["queries_found"]}
    rows = [
        [words(query), words(category), *(_query(one, query) for one in slices)]
        for category, queries in card["queries"]["by_category"].items()
        for query in queries
        if query in found
    ]
    total = len(_distinct_queries(card))
    caption = f"Hits per million tokens and hits. {len(found)} of {total} queries occur; the others are not shown."
    return Table(caption, ["query", "category", *(one["name"] for one in slices)], rows, tall=True)


def _query(one: _Card, query: str) -> Cell:
    found = one["queries_found"].get(query)
    if found is None:
        return Cell("0", 0)
    hits = f"{found['hits']:,} {'hit' if found['hits'] == 1 else 'hits'}"
    return Cell(number(found["per_million"]), found["per_million"], note=hits)


def _documents(card: _Card) -> list[Text | Fold]:
    blocks: list[Text | Fold] = []
    for one in card["slices"]:
        top = one["top_documents"]
        if not top:
            blocks.append(Text(f"{one['name']}: no document has a hit."))
            continue
        has_text = any("excerpt" in document for document in top)
        heads = ["id", "hits", "score", "file", "row", "queries"] + ["first hit, in normal form"] * has_text
        rows = [_document(document, has_text=has_text) for document in top]
        blocks.append(Fold(one["name"], [Table(f"{len(top)} documents", heads, rows, tall=True)]))
    return blocks


def _document(document: _Card, *, has_text: bool) -> list[Cell]:
    queries = ", ".join(f"{query} ({hits})" for query, hits in document["queries"].items())
    row = [words(document["id"] or "(none)"), count(document["hits"]), words(document["score"])]
    row += [words(document["file"]), count(document["row"]), words(queries)]
    return [*row, words(document.get("excerpt", ""))] if has_text else row


def _inputs(card: _Card) -> list[Table | Text]:
    heads = ["slice", "files", "bytes of files", "rows", "malformed", "unusable scores", "scores read from", "input"]
    rows = [
        [
            words(one["slice"]),
            *(count(one[key]) for key in ("files", "file_bytes", "rows", "malformed_rows", "unusable_scores")),
            words(", ".join(one["score_columns"]) or "(none)"),
            words(", ".join(one["patterns"])),
        ]
        for one in card["inputs"]
    ]
    reasons = [
        f"{one['slice']}: {reason}: {times:,}"
        for one in card["inputs"]
        for reason, times in one["malformed_reasons"].items()
    ]
    listed = [Text("Malformed rows, not counted above:", reasons)] if reasons else []
    return [Table("Inputs", heads, rows), *listed]


def _definitions(card: _Card) -> list[Text]:
    facts = card["definitions"]
    return [
        Text(f"Token: {facts['token']}."),
        Text(f"Matching (version {facts['matching_version']}):", facts["matching"]),
        Text(f"Queries: {card['queries']['source']} (sha256 {facts['queries_sha256']})."),
        Text(f"Intervals: {facts['intervals']}"),
        Text("A hit says that a phrase occurs, not that a document is harmful: reports and warnings hold such too."),
    ]
