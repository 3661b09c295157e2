"""Compares two cards, before and after: how each slice's scores and frequencies changed."""

import json
import math
from collections.abc import Mapping
from typing import Any

from safelm import cli
from safelm.report.page import Page, Section, Text, render
from safelm.report.table import NOTHING, Cell, Table, count, number, percent, words
from safelm.safety.report_card.card import SCHEMA
from safelm.safety.report_card.page import frequency
from safelm.safety.report_card.tally import SCORES
from safelm.stats.intervals import Z_95

DIFFERENCE_SCHEMA = "safelm.report_card.difference/1"
_MUST_AGREE = {"token": "token", "queries_sha256": "list of queries", "matching_version": "version of the rules"}
_Card = Mapping[str, Any]


def read_card(path: str) -> dict[str, Any]:
    """Reads a card.json (or the one in a folder). Raises ValueError naming the file if it is no card."""
    from safelm.io import remote

    path = path if path.endswith(".json") else f"{path.rstrip('/')}/card.json"
    try:
        card = json.loads(remote.read_text(path))
    except (ValueError, RecursionError) as error:
        raise cli.UserError(f"{path}: not a report card: {error}") from None
    if not isinstance(card, dict) or card.get("schema") != SCHEMA:
        found = card.get("schema") if isinstance(card, dict) else type(card).__name__
        raise cli.UserError(f"{path}: not a report card of schema {SCHEMA!r}: {found!r}")
    return card | {"path": path}


def compare(before: _Card, after: _Card) -> dict[str, Any]:
    """The changes of each slice that both cards have; if both have a single slice, of those two.

    Raises ValueError if the cards' definitions differ (tokens, queries, rules) or they share no slice.
    """
    for key, meaning in _MUST_AGREE.items():
        if before["definitions"][key] != after["definitions"][key]:
            one, other = (_named(card, key) for card in (before, after))
            raise cli.UserError(
                f"{before['path']} and {after['path']} can't be compared: the {meaning} is {one} in one and {other} in "
                "the other"
            )
    named = [{one["name"]: one for one in card["slices"]} for card in (before, after)]
    pairs = [(name, named[0][name], named[1][name]) for name in named[0] if name in named[1]]
    if not pairs and len(named[0]) == len(named[1]) == 1:
        (first,), (second,) = (card["slices"] for card in (before, after))
        pairs = [(f"{first['name']} to {second['name']}", first, second)]
    if not pairs:
        names = " and ".join(", ".join(one) for one in named)
        raise cli.UserError(f"{before['path']} and {after['path']} share no slice: {names}")
    return {
        "schema": DIFFERENCE_SCHEMA,
        "definitions": before["definitions"],
        "before": before["path"],
        "after": after["path"],
        "only_before": [name for name in named[0] if name not in named[1] and len(pairs) < len(named[0])],
        "only_after": [name for name in named[1] if name not in named[0] and len(pairs) < len(named[1])],
        "slices": [_slice(*pair) for pair in pairs],
    }


def _named(card: _Card, key: str) -> str:
    value = card["definitions"][key]
    return f"{card['queries']['name']!r} (hash {value[:12]})" if key == "queries_sha256" else repr(value)


def _slice(name: str, before: _Card, after: _Card) -> dict[str, Any]:
    def sides(value: Any) -> dict[str, Any]:
        return {"before": value(before), "after": value(after)}

    return {
        "name": name,
        "documents": sides(lambda one: one["documents"]),
        "tokens": sides(lambda one: one["tokens"]),
        "scores": {score: sides(lambda one, score=score: one["scores"][score]["share"]) for score in SCORES},
        "all": _change(before["all"], after["all"]),
        "categories": {
            category: _change(found, after["categories"][category]) for category, found in before["categories"].items()
        },
    }


def _change(before: _Card, after: _Card) -> dict[str, Any]:
    """Both frequencies, their ratio (95% interval normal on the log scale), and whether their intervals overlap."""
    keys = ("hits", "per_million", "low", "high")
    change: dict[str, Any] = {
        "before": {key: before[key] for key in keys},
        "after": {key: after[key] for key in keys},
        "ratio": None,
        "ratio_low": None,
        "ratio_high": None,
        "overlap": None,
    }
    if before["low"] is None or after["low"] is None:
        return change
    change["overlap"] = before["low"] <= after["high"] and after["low"] <= before["high"]
    if before["hits"]:
        change["ratio"] = after["per_million"] / before["per_million"]
    if before["hits"] and after["hits"]:
        variance = sum(one["squares"] / one["hits"] ** 2 for one in (before, after))
        factor = math.exp(Z_95 * math.sqrt(variance))
        change |= {"ratio_low": change["ratio"] / factor, "ratio_high": change["ratio"] * factor}
    return change


def markdown(difference: _Card) -> str:
    """One table per slice."""
    return "\n\n".join(_markdown(one) for one in difference["slices"])


def _markdown(one: _Card) -> str:
    changes = [("hits per 1M tokens", one["all"]), *one["categories"].items()]
    rows = [[*row, words(""), words("")] for row in sizes(one)] + [
        [
            words(name),
            *(Cell(number(change[side]["per_million"])) for side in ("before", "after")),
            Cell(_ratio(change)),
            words(_overlap(change)),
        ]
        for name, change in changes
    ]
    return Table("", [one["name"], "before", "after", "ratio", "intervals"], rows).markdown()


def write_page(difference: _Card) -> str:
    """The HTML page of a difference."""
    sections = [
        Section(
            one["name"],
            [
                Table("Documents, tokens and share of documents by score", ["", "before", "after"], sizes(one)),
                frequencies_table(one),
            ],
        )
        for one in difference["slices"]
    ]
    only = [
        f"Only {side}: {', '.join(difference[f'only_{side}'])}."
        for side in ("before", "after")
        if difference[f"only_{side}"]
    ]
    facts = difference["definitions"]
    sections.append(
        Section(
            "Definitions",
            [
                Text(f"Token: {facts['token']}."),
                Text(f"{facts['intervals']} Ratios: normal on the log scale."),
                *map(Text, only),
            ],
        )
    )
    about = f"Before: {difference['before']}. After: {difference['after']}."
    return render(Page("Data safety report cards compared", _headline(difference), sections, about=about))


def _headline(difference: _Card) -> str:
    one = difference["slices"][0]
    before, after = (number(one["all"][side]["per_million"]) for side in ("before", "after"))
    return f"Harmful n-grams per million tokens ({one['name']}): {before} before, {after} after, {_ratio(one['all'])}."


def sizes(one: _Card) -> list[list[Cell]]:
    """Documents, tokens and shares of documents by score, before and after."""
    rows = [[words(key), *(count(one[key][side]) for side in ("before", "after"))] for key in ("documents", "tokens")]
    for score, found in one["scores"].items():
        if found["before"] or found["after"]:
            name = f"score {score}".replace("score un", "un")
            rows.append([words(name), *(Cell(percent(value), value) for value in found.values())])
    return rows


def frequencies_table(one: _Card) -> Table:
    """A slice's frequencies by category before and after, with their ratio."""
    rows = []
    for category, change in (("any", one["all"]), *one["categories"].items()):
        sides = [frequency(change[side]) for side in ("before", "after")]
        rows.append([words(category), *sides, _ratio_cell(change), words(_overlap(change))])
    heads = ["category", "before", "after", "after / before", "intervals"]
    return Table("Hits per million tokens with 95% intervals.", heads, rows).without_zeros()


def _ratio_cell(change: _Card) -> Cell:
    if change["ratio"] is None:
        return Cell(_ratio(change)) if change["after"]["hits"] else NOTHING
    low, high = change["ratio_low"], change["ratio_high"]
    interval = None if low is None else (number(low), number(high))
    return Cell(_ratio(change), {"value": change["ratio"], "low": low, "high": high}, interval=interval)


def _ratio(change: _Card) -> str:
    if change["ratio"] is None:
        return "new" if change["after"]["hits"] and change["overlap"] is not None else "–"
    return f"{number(change['ratio'])}x"


def _overlap(change: _Card) -> str:
    if change["overlap"] is None:
        return "–"
    return "overlap" if change["overlap"] else "apart"
