"""The report as one self-contained HTML page, made of the report card's tables. Counts and ids; everything escaped."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.safety.report_card import difference, page
from safelm.safety.report_card.charts import number
from safelm.safety.report_card.page import Cell, count, words
from safelm.safety.synthesis.report import charts
from safelm.safety.synthesis.report.funnel import HISTOGRAMS

_TITLES = {"safeweb": "SafeWeb", "refuseweb": "RefuseWeb", "moral_education": "Moral Education"}
_Report = Mapping[str, Any]


def write(report: _Report) -> str:
    """The page of a report."""
    drawn = {name: f"<figure>{svg}</figure>" for name, svg in charts.svgs(report).items()}
    title = f"{_TITLES[report['kind']]}: from sources to a corpus"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">{_sentence(report)}</p>',
        _documents(report),
        "<h2>Gates</h2>",
        drawn["funnel"],
        _gates(report),
        "<h2>Harm before and after</h2>",
        drawn["scores"],
        _matrix(report),
        "<h2>Report card: sources and published texts</h2>",
        _card(report),
        "<h2>Styles, categories, scores</h2>",
        drawn["styles"],
        *(_groups(report[key], name) for key, name in (("styles", "style"), ("categories", "category"),
                                                       ("scores", "harm score"))),
        "<h2>Likeness to the source</h2>",
        *(drawn[name] for name in ("similarity", "length_ratio", "copied_share")),
        f"<p>Similarity is measured by: {html.escape(', '.join(report['similarity_by']) or 'nothing')}.</p>",
        _distributions(report),
        "<h2>Throughput and cost</h2>",
        _cost(report),
    ]  # fmt: skip
    return page.fill(title, "\n".join(parts))


def markdown(report: _Report) -> str:
    """The funnel as a table."""
    rows = [["stage", "drafts", "rejected here, by reason"], ["attempts", f"{report['drafts']['attempts']:,}", ""]]
    rows.append(["written", f"{report['drafts']['written']:,}", _reasons(report["drafts"]["no_draft"])])
    rows += [[gate["gate"], f"{gate['passed']:,}", _reasons(gate["reasons"])] for gate in report["drafts"]["gates"]]
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|---|---|---|", *body])


def _sentence(report: _Report) -> str:
    documents = report["documents"]
    share = _share(documents["publication_rate"])
    text = (
        f"{documents['published']:,} of {documents['in']:,} documents published ({share}). Writer: {report['model']}. "
        f"Prompts: {report['prompt_version']}. Intervals are Wilson's 95%."
    )
    return html.escape(text)


def _documents(report: _Report) -> str:
    documents = report["documents"]
    rows = [[words("in"), count(documents["in"])], [words("published"), count(documents["published"])]]
    rows += [[words(f"rejected: {reason}"), count(times)] for reason, times in documents["rejected_by"].items()]
    rows.append([words("malformed, not counted above"), count(documents["malformed"])])
    rows += [
        [words(f"left out: harm score {score}"), count(times)]
        for score, times in documents["left_out_by_score"].items()
    ]
    return page.table("Documents; what a document's last attempt failed decides", ["documents", "number"], rows)


def _gates(report: _Report) -> str:
    drafts = report["drafts"]
    rows: list[Sequence[Cell]] = [
        [
            words("(writer)"),
            count(drafts["attempts"]),
            count(drafts["written"]),
            words(""),
            words(_reasons(drafts["no_draft"])),
        ]
    ]
    rows += [
        [words(gate["gate"]), count(gate["checked"]), count(gate["passed"]), _rate(gate["pass_rate"]),
         words(_reasons(gate["reasons"]))]
        for gate in drafts["gates"]
    ]  # fmt: skip
    caption = "Drafts by gate, in their order: a draft that fails one is not shown to those behind it"
    return page.table(caption, ["gate", "checked", "passed", "passed, share", "reasons of the others*"], rows)


def _matrix(report: _Report) -> str:
    rows = []
    for before, (drafts, passed) in enumerate(zip(*report["score_before_after"].values(), strict=True)):
        if any(drafts):
            cells = [(f"{n:,}<small>{kept:,} passed</small>", n) for n, kept in zip(drafts, passed, strict=True)]
            rows.append([words(f"source {before}"), *cells])
    return page.table("Drafts by harm score, source to draft", ["", *(f"draft {i}" for i in range(6))], rows)


def _card(report: _Report) -> str:
    change = report["card"]["difference"]
    if change is None:
        return "<p>Nothing was published, so there is nothing to compare.</p>"
    (one,) = change["slices"]
    rows = [[words(key), *(count(one[key][side]) for side in ("before", "after"))] for key in ("documents", "tokens")]
    sizes = page.table("Sources (before) and published texts (after)", ["", "before", "after"], rows)
    frequencies = difference.frequencies_table(one)
    return f"{sizes}{frequencies}<p>{html.escape(change['definitions']['intervals'])}</p>"


def _groups(groups: Sequence[_Report], name: str) -> str:
    keys = ("documents", "passed", "near_duplicates", "attempts", "written", "drafts_passed")
    rows = [[words(one["name"]), *(count(one[key]) for key in keys), _rate(one["pass_rate"])] for one in groups]
    heads = [name, "documents", "passed", "of these near-duplicates", "attempts", "written", "drafts passed"]
    return page.table(f"By {name}; documents count by their last attempt", [*heads, "attempts passed, share"], rows)


def _distributions(report: _Report) -> str:
    parts = []
    for name, edges in HISTOGRAMS.items():
        found = report["distributions"][name]
        lower = [None, *edges]
        rows = [
            [_bin(low, high), count(drafts), count(passed)]
            for low, high, drafts, passed in zip(lower, [*edges, None], found["drafts"], found["passed"], strict=True)
            if drafts
        ]
        summary = f"<summary>{html.escape(name.replace('_', ' '))}</summary>"
        parts.append(f"<details>{summary}{page.table(name, ['from, to', 'drafts', 'passed'], rows)}</details>")
    return "\n".join(parts)


def _bin(low: int | float | None, high: int | float | None) -> Cell:
    shown = f"{'up to' if low is None else f'above {low:g}'}{'' if high is None or low is None else ' to'}"
    return html.escape(shown + ("" if high is None else f" {high:g}")), -1 if low is None else low


def _cost(report: _Report) -> str:
    speed = report["throughput"]
    rows = [[words(name.replace("_", " ")), words(value)] for name, value in speed.items()]
    rows += [[words(f"spent: {name.replace('_', ' ')}"), words(f"{v:,.6g}")] for name, v in report["spent"].items()]
    text = page.table("This run; speed is of the shards that its last start finished", ["", "value*"], rows)
    found = report["cost_per_million"]
    if found is None:
        return text
    here = "unknown" if found["hours_as_here"] is None else f"{number(found['hours_as_here'])} h at this run's speed"
    spent = "" if found["cost_as_here"] is None else f", {number(found['cost_as_here'])} at the endpoint's prices"
    sums = f"{found['prompt_tokens']:,.0f} prompt and {found['completion_tokens']:,.0f} generated tokens"
    keys = ("completion_tokens_per_second", "times_measured", "hours", "dollars")
    cells = lambda one: [(number(one.get(key)), one.get(key) or -1) for key in keys]  # noqa: E731
    rows = [[words(f"{one['machine']}: {one['model']}"), count(one["batch"]), *cells(one)] for one in found["machines"]]
    if found["measured"]:
        rows.insert(0, [words(f"measured: this run's writer, {report['model']}"), ("", -1), *cells(found["measured"])])
    caption = "A million published documents, extrapolated by the formula below; only a row that says so is measured"
    header = ["machine and writer", "batch", "generated tokens/s", "times measured", "hours", "US dollars"]
    table = page.table(caption, header, rows)
    formula = html.escape(found["definition"]).replace("\n\n", "</p><p>")
    return f"{text}<p>A million published documents: {sums}; {html.escape(here + spent)}.</p>{table}<p>{formula}</p>"


def _rate(found: _Report | None) -> Cell:
    if found is None:
        return "–", -1
    interval = f"<small>{100 * found['low']:.3g}% to {100 * found['high']:.3g}%</small>"
    return f"{100 * found['share']:.3g}%{interval}", found["share"]


def _share(found: _Report | None) -> str:
    return (
        "–" if found is None else f"{100 * found['share']:.3g}%, {100 * found['low']:.3g} to {100 * found['high']:.3g}"
    )


def _reasons(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {times:,}" for reason, times in reasons.items())
