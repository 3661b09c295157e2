"""The n-grams of a report card by category; the paper's by default (`queries.json` names its source)."""

import dataclasses
import functools
import hashlib
import importlib.resources
import itertools
import json
from typing import Any

from safelm.io import remote
from safelm.safety.report_card import normal_form

MAX_WORDS = 8


@dataclasses.dataclass(frozen=True)
class QuerySet:
    """Queries by category.

    Attributes:
      name, source: the list's name and its origin.
      categories: names, in order.
      queries: the distinct normal forms: words separated by single spaces.
      categories_of: for each query, the indexes of the categories that list it.
      listed: number of queries in the list by category, before normalisation.
    """

    name: str
    source: str
    categories: tuple[str, ...]
    queries: tuple[str, ...]
    categories_of: tuple[tuple[int, ...], ...]
    listed: tuple[int, ...]

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of categories and normal forms, independent of names, sources and spelling."""
        facts = [self.categories, self.queries, self.categories_of, normal_form.RULES_VERSION]
        return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()

    def patterns(self) -> list[tuple[bytes, int]]:
        """(normal form in UTF-8, index of its query) of each occurrence, with a space or hyphen after each word."""
        found = []
        for index, query in enumerate(self.queries):
            first, *rest = query.encode().split(normal_form.SPACE)
            for joints in itertools.product((normal_form.SPACE, normal_form.HYPHEN), repeat=len(rest)):
                tail = b"".join(itertools.chain.from_iterable(zip(joints, rest, strict=True)))
                found.append((first + tail, index))
        return found


def load_queries(path: str | None = None) -> QuerySet:
    """Reads a JSON file {"name", "source", "categories": {name: [query, ...]}}; None for the paper's queries.

    A bare {category: [query, ...]} is accepted too. Raises ValueError naming the file and the faulty entry.
    """
    if path is None:
        text = importlib.resources.files(__package__).joinpath("queries.json").read_text("utf-8")
        return parse(json.loads(text), "queries.json")
    try:
        value = json.loads(remote.read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8: {error}") from None
    return parse(value, path)


def parse(value: Any, where: str) -> QuerySet:
    """A QuerySet from parsed JSON (see `load_queries`); `where` names it in errors."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object of categories, found {type(value).__name__}")
    categories = value.get("categories", value)
    if not isinstance(categories, dict) or not categories:
        raise ValueError(f"{where}: no categories")
    found: dict[str, list[int]] = {}
    for index, (category, queries) in enumerate(categories.items()):
        if not isinstance(queries, list) or not queries:
            raise ValueError(f"{where}: category {category!r} holds no list of queries")
        for query in queries:
            members = found.setdefault(_words(query, category, where), [])
            if index not in members:
                members.append(index)
    return QuerySet(
        name=str(value.get("name", where)) if "categories" in value else where,
        source=str(value.get("source", where)) if "categories" in value else where,
        categories=tuple(categories),
        queries=tuple(found),
        categories_of=tuple(map(tuple, found.values())),
        listed=tuple(map(len, categories.values())),
    )


def _words(query: Any, category: str, where: str) -> str:
    if not isinstance(query, str):
        raise ValueError(f"{where}: category {category!r}: {query!r} is not a string")
    form = normal_form.normal([query])[:-1].strip(b" .")
    words = form.replace(normal_form.HYPHEN, normal_form.SPACE).split(normal_form.SPACE)
    if normal_form.BREAK in form or not all(words):
        raise ValueError(f"{where}: category {category!r}: {query!r} isn't words separated by spaces or hyphens")
    if len(words) > MAX_WORDS:
        raise ValueError(f"{where}: category {category!r}: {query!r} has more than {MAX_WORDS} words")
    return b" ".join(words).decode()
