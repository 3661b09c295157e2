"""The data card of a selection: funnel, counts by stratum, licences, marks and contamination, as JSON and Markdown."""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from safelm.jobs.output import OutputFolder
from safelm.report.table import Table, count, words
from safelm.selection.choosing import OUTCOMES, SELECTED, Choice
from safelm.selection.contamination import GRAM_WORDS, PromptIndex
from safelm.selection.licences import COUNTS
from safelm.selection.settings import SelectSettings

SCHEMA = "safelm.select/1"
_FUNNEL = (*range(1, len(OUTCOMES)), SELECTED)  # what is left out, in order, then what stays


def build(
    choice: Choice, index: PromptIndex | None, settings: SelectSettings, totals: Mapping[str, Any]
) -> dict[str, Any]:
    """The card as JSON."""
    documents, tokens = (
        sum(each.values(), np.zeros(len(OUTCOMES), np.int64)) for each in (choice.documents, choice.tokens)
    )
    funnel = [{"step": "read", "documents": totals["rows"], "tokens": int(tokens.sum())}]
    funnel += [{"step": "malformed", "documents": totals["malformed"], "tokens": 0}]
    funnel += [{"step": OUTCOMES[at], "documents": int(documents[at]), "tokens": int(tokens[at])} for at in _FUNNEL]
    selected = {"documents": int(documents[SELECTED]), "tokens": int(tokens[SELECTED])}
    budget = settings.token_budget
    return {
        "schema": SCHEMA,
        "selected": selected,
        "token_budget": budget,
        "seed": settings.seed,
        "score_columns": dict(totals["score_columns"]),
        "funnel": funnel,
        "strata": {"columns": list(settings.strata), "rows": _strata(choice)},
        "scores": _summed(choice, lambda kind: "none" if kind[0] is None else str(kind[0])),
        "licences": choice.licences,
        "matched": _matched(choice, settings),
        "contamination": _contamination(choice, index, settings),
    }


def write(out: OutputFolder, card: Mapping[str, Any]) -> None:
    """Writes data_card.json and data_card.md."""
    texts = {"data_card.json": json.dumps(card, indent=1, ensure_ascii=False), "data_card.md": markdown(card)}
    with out.staging() as folder:
        for name, text in texts.items():
            pathlib.Path(folder, name).write_text(text.rstrip() + "\n", encoding="utf-8", errors="backslashreplace")
            out.publish(f"{folder}/{name}", name)


def markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    selected, budget = card["selected"], card["token_budget"]
    of = f" of a budget of {budget:,} ({budget - selected['tokens']:,} below it)" if budget else ""
    counted = f"tokenizer {card['tokenizer'][:16]}" if card["tokenizer"] else "a column of the input"
    parts = [
        "# Data card",
        f"{selected['documents']:,} documents, {selected['tokens']:,} tokens{of}. Tokens by {counted}, without the "
        f"end-of-document token of each document. Seed {card['seed']}. {len(card['input'])} input files, harm scores "
        f"from {', '.join(card['score_columns']) or 'no column'}.",
        "## Funnel",
        "What was read, what each step left out, what stays.",
        _table("step", card["funnel"], "step"),
        f"## Strata: {', '.join(card['strata']['columns']) or 'none'}",
        _strata_table(card["strata"]),
        "## Harm scores",
        _shares("score", card["scores"]),
        "## Licences",
        _shares("licence", card["licences"]) if card["licences"] else "Not read.",
    ]
    if card["matched"]:
        parts += ["## Harmful rows and matched safe ones", *_matched_text(card["matched"])]
    return "\n\n".join([*parts, "## Contamination", *_contamination_text(card["contamination"])])


def _strata(choice: Choice) -> list[dict[str, Any]]:
    found = _summed(choice, lambda kind: kind[1])
    return [{"values": list(values), **counts} for values, counts in found.items()]


def _summed(choice: Choice, name: Any) -> dict[Any, dict[str, int]]:
    """Documents and tokens that were read and that stay, by a name of each kind."""
    found: dict[Any, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for kind in choice.documents:
        documents, tokens = choice.documents[kind], choice.tokens[kind]
        counts = (documents.sum(), tokens.sum(), documents[SELECTED], tokens[SELECTED])
        for key, value in zip(COUNTS, counts, strict=True):
            found[name(kind)][key] += int(value)
    return {key: dict(found[key]) for key in sorted(found)}


def _matched(choice: Choice, settings: SelectSettings) -> dict[str, Any] | None:
    if not choice.matched:
        return None
    short = [{"values": list(values), "tokens": tokens} for values, tokens in sorted(choice.short.items())]
    return {"harmful_score": settings.harmful_score, "ratio": settings.matched_safe, **choice.matched, "short": short}


def _contamination(choice: Choice, index: PromptIndex | None, settings: SelectSettings) -> dict[str, Any] | None:
    if index is None:
        return None
    suites = {name: counts | {"found": {}} for name, counts in sorted(index.suites.items())}
    for prompt, documents in sorted(choice.prompts.items()):
        suite, prompt_id = index.prompts[prompt]
        suites[suite]["found"][prompt_id] = documents
    return {"gram_words": GRAM_WORDS, "min_prompt_words": settings.min_prompt_words, "suites": suites}


def _matched_text(matched: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"Rows of score {matched['harmful_score']} and more, and {matched['ratio']:g} tokens of safer rows for each of "
        "theirs, from the same strata (the score aside)."
    )
    yield _table("rows", [{"rows": name, **matched[name]} for name in ("harmful", "safe")], "rows")
    for one in matched["short"]:
        yield f"{', '.join(one['values']) or 'All'}: {one['tokens']:,} tokens of safer rows are missing."


def _contamination_text(found: Mapping[str, Any] | None) -> Iterable[str]:
    if found is None:
        yield "Not looked for: no evaluation set was named (`--decontaminate`)."
        return
    yield (
        f"Left out: documents that share a run of {found['gram_words']} words with a prompt, or hold a shorter prompt "
        f"of at least {found['min_prompt_words']} words as a whole. A document that holds several prompts counts for "
        "each. The ids of the prompts found stand in data_card.json."
    )
    heads = ["suite", "prompts", "too short to look for", "prompts found", "prompts times documents"]
    rows = [
        [words(name), *map(count, (one["prompts"], one["too_short"], len(one["found"]), sum(one["found"].values())))]
        for name, one in found["suites"].items()
    ]
    yield Table("", heads, rows).markdown()


def _strata_table(strata: Mapping[str, Any]) -> str:
    heads = [*strata["columns"], "documents read", "tokens read", "documents", "tokens"]
    rows = [[*map(words, row["values"]), *(count(row[name]) for name in COUNTS)] for row in strata["rows"]]
    return Table("", heads, rows).markdown()


def _shares(head: str, found: Mapping[str, Mapping[str, int]]) -> str:
    return _strata_table({"columns": [head], "rows": [{"values": [name], **counts} for name, counts in found.items()]})


def _table(head: str, rows: Iterable[Mapping[str, Any]], name: str) -> str:
    cells = [[words(row[name]), count(row["documents"]), count(row["tokens"])] for row in rows]
    return Table("", [head, "documents", "tokens"], cells).markdown()
