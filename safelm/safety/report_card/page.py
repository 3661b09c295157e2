"""A card as one self-contained HTML page and as a Markdown table. Everything from a corpus is escaped."""

import html
import importlib.resources
import string
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.safety.report_card import charts
from safelm.safety.report_card.charts import number

_Card = Mapping[str, Any]
Cell = tuple[str, int | float | str | None]  # what is shown (HTML), what it is sorted by


def write(card: _Card) -> str:
    """The page of a card."""
    drawn = charts.svgs(card)
    parts = [
        "<h1>Data safety report card</h1>",
        f'<p class="quiet">{_sentence(card)}</p>',
        f"<figure>{drawn['scores']}</figure><figure>{drawn['shares']}</figure>",
        "<h2>Slices</h2>",
        table("One row a slice; intervals are 95%.", _SLICES, [_slice_row(one) for one in card["slices"]]),
        "<h2>Harmful n-grams by category</h2>",
        f"<figure>{drawn['heat']}</figure>",
        _categories(card),
        "<h2>By query</h2>",
        _queries(card),
        "<h2>Documents with the most hits</h2>",
        _documents(card),
        "<h2>What was read</h2>",
        _inputs(card),
        "<h2>Definitions</h2>",
        _definitions(card),
    ]
    return fill("Data safety report card", "\n".join(parts))


def fill(title: str, body: str) -> str:
    """A whole page around a body of HTML."""
    template = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return string.Template(template).substitute(title=html.escape(title), body=body)


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]], *, tall: bool = False) -> str:
    """A table that sorts by a click on a column's head; a head that ends in `*` has words under it."""
    words = [head.endswith("*") for head in heads]
    cells = "".join(
        f'<th scope="col"{_class(is_words)}><button>{html.escape(head.rstrip("*"))}</button></th>'
        for head, is_words in zip(heads, words, strict=True)
    )
    lines = []
    for row in rows:
        line = [f'<th scope="row"{_sorted_by(row[0])}>{row[0][0]}</th>']
        line += [f"<td{_class(w)}{_sorted_by(cell)}>{cell[0]}</td>" for cell, w in zip(row[1:], words[1:], strict=True)]
        lines.append(f"<tr>{''.join(line)}</tr>")
    caption = f"<caption>{html.escape(caption)}</caption>"
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll{" tall" if tall else ""}" tabindex="0"><table>{caption}{body}</table></div>'


def words(text: Any) -> Cell:
    return html.escape(str(text)), None


def count(value: int) -> Cell:
    return f"{value:,}", value


def frequency(found: Mapping[str, Any]) -> Cell:
    """Hits per million with the interval under it."""
    if found["per_million"] is None:
        return "–", -1
    small = f"<small>{number(found['low'])} to {number(found['high'])}</small>"
    return f"{number(found['per_million'])}{small}", found["per_million"]


def share(found: Mapping[str, Any]) -> Cell:
    if found["share"] is None:
        return "–", -1
    low, high = (100 * found[key] for key in ("share_low", "share_high"))
    return f"{percent(found['share'])}<small>{low:.3g}% to {high:.3g}%</small>", found["share"]


def percent(value: int | float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g}%"


def markdown(card: _Card) -> str:
    """Slices side by side: documents, tokens, scores, hits per million by category."""
    slices = card["slices"]
    rows = [["", *(one["name"] for one in slices)]]
    rows += [[key, *(f"{one[key]:,}" for one in slices)] for key in ("documents", "tokens")]
    rows += [
        [f"{label}, %", *(percent(_scored(one, scores)).rstrip("%") for one in slices)]
        for label, scores in (("score 0", "0"), ("score 1 to 3", "123"), ("score 4 to 5", "45"))
    ]
    rows.append(["documents with a hit, %", *(percent(one["all"]["share"]).rstrip("%") for one in slices)])
    rows.append(["hits per 1M tokens", *(_interval(one["all"]) for one in slices)])
    for category in card["queries"]["by_category"]:
        rows.append([category, *(_interval(one["categories"][category]) for one in slices)])
    header, *body = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    return "\n".join([header, "|---" * len(rows[0]) + "|", *body])


_SLICES = ("slice", "documents", "empty", "tokens", "bytes", "hits per 1M tokens", "hits", "documents with a hit")


def _slice_row(one: _Card) -> list[Cell]:
    counts = [count(one[key]) for key in ("documents", "empty_documents", "tokens", "bytes")]
    return [words(one["name"]), *counts, frequency(one["all"]), count(one["all"]["hits"]), share(one["all"])]


def _scored(one: _Card, scores: str) -> int | float | None:
    if not one["documents"] or one["scores"]["unscored"]["documents"] == one["documents"]:
        return None
    return sum(one["scores"][score]["share"] for score in scores)


def _interval(found: Mapping[str, Any]) -> str:
    if found["per_million"] is None:
        return "–"
    return f"{number(found['per_million'])} [{number(found['low'])}, {number(found['high'])}]"


def _sentence(card: _Card) -> str:
    documents = sum(one["rows"] - one["malformed_rows"] for one in card["inputs"])
    token, queries = card["definitions"]["token"], len(_distinct_queries(card))
    return html.escape(
        f"{documents:,} documents read; {queries} n-gram queries in {len(card['queries']['by_category'])} "
        f"categories ({card['queries']['name']}). Token: {token}."
    )


def _distinct_queries(card: _Card) -> set[str]:
    return {query for queries in card["queries"]["by_category"].values() for query in queries}


def _categories(card: _Card) -> str:
    heads = ["category", *(one["name"] for one in card["slices"])]
    rows = [
        [words(category), *(frequency(one["categories"][category]) for one in card["slices"])]
        for category in card["queries"]["by_category"]
    ]
    rows.append([words("any"), *(frequency(one["all"]) for one in card["slices"])])
    return table(
        "Hits per million tokens with 95% intervals. Any counts a query once that has two categories.", heads, rows
    )


def _queries(card: _Card) -> str:
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
    return table(caption, ["query", "category*", *(one["name"] for one in slices)], rows, tall=True)


def _query(one: _Card, query: str) -> Cell:
    found = one["queries_found"].get(query)
    if found is None:
        return "0", 0
    return f"{number(found['per_million'])}<small>{found['hits']:,}</small>", found["per_million"]


def _documents(card: _Card) -> str:
    parts = []
    for one in card["slices"]:
        top = one["top_documents"]
        if not top:
            parts.append(f"<p><b>{html.escape(one['name'])}</b>: no document has a hit.</p>")
            continue
        heads = ["id", "hits", "score", "file*", "row", "queries*"]
        heads += ["first hit, in normal form*"] if any("excerpt" in document for document in top) else []
        rows = [_document(document, with_text=len(heads) == 7) for document in top]
        summary = f"<summary>{html.escape(one['name'])}</summary>"
        parts.append(f"<details>{summary}{table(f'{len(top)} documents', heads, rows, tall=True)}</details>")
    return "\n".join(parts)


def _document(document: _Card, *, with_text: bool) -> list[Cell]:
    queries = ", ".join(f"{query} ({hits})" for query, hits in document["queries"].items())
    row = [words(document["id"] or "(none)"), count(document["hits"]), words(document["score"])]
    row += [words(document["file"]), count(document["row"]), words(queries)]
    return [*row, words(document.get("excerpt", ""))] if with_text else row


def _inputs(card: _Card) -> str:
    heads = ["slice", "files", "bytes of files", "rows", "malformed", "unusable scores", "score column*", "input*"]
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
        f"<li>{html.escape(one['slice'])}: {html.escape(reason)}: {times:,}</li>"
        for one in card["inputs"]
        for reason, times in one["malformed_reasons"].items()
    ]
    listed = f"<p>Malformed rows, not counted above:</p><ul>{''.join(reasons)}</ul>" if reasons else ""
    return table("Inputs", heads, rows) + listed


def _definitions(card: _Card) -> str:
    facts = card["definitions"]
    rules = "".join(f"<li>{html.escape(rule)}</li>" for rule in facts["matching"])
    return (
        f"<p><b>Token</b>: {html.escape(facts['token'])}.</p><p><b>Matching</b> (version {facts['matching_version']}):"
        f"</p><ul>{rules}</ul><p><b>Queries</b>: {html.escape(card['queries']['source'])} "
        f"<code>sha256 {facts['queries_sha256']}</code></p><p><b>Intervals</b>: {html.escape(facts['intervals'])}</p>"
        "<p>A hit says that a phrase occurs, not that a document is harmful: reports and warnings hold such phrases "
        "too.</p>"
    )


def _class(is_words: bool) -> str:
    return ' class="words"' if is_words else ""


def _sorted_by(cell: Cell) -> str:
    return "" if cell[1] is None else f' data-value="{html.escape(str(cell[1]))}"'
