"""Renders the report as one self-contained HTML page with counts and ids, without text."""

from collections.abc import Mapping, Sequence
from typing import Any

from safelm.report.page import Block, Fact, Fold, Page, Section, Text, render
from safelm.report.table import NOTHING, Cell, Table, amount, count, number, percent, words
from safelm.safety.report_card import difference
from safelm.safety.synthesis.report import charts
from safelm.safety.synthesis.report.funnel import HISTOGRAMS
from safelm.safety.synthesis.report.summary import unit_of

_TITLES = {"safeweb": "SafeWeb", "refuseweb": "RefuseWeb", "moral_education": "Moral Education"}
_TITLES |= {"reflection": "Reflections", "preflection": "Preflections"}
_Report = Mapping[str, Any]


def write(report: _Report) -> str:
    """The HTML page of a report."""
    drawn = charts.of_page(report)
    likeness = [drawn[name] for name in charts.measured(report) if name in drawn]
    by = ", ".join(report["similarity_by"]) or "nothing"
    sections = [
        Section("Gates", [*_charts(drawn, "funnel"), _gates(report)]),
        Section(unit_of(report["kind"]).capitalize(), [_outcomes(report)]),
        Section("Harm before and after", [_matrix(report)]),
        Section("Report card", _card(report)),
        Section("Styles, categories, scores", [*_charts(drawn, "styles"), *_all_groups(report)]),
        Section(
            "Likeness to the source", [*likeness, Text(f"Similarity is measured by: {by}."), *_distributions(report)]
        ),
        Section("Throughput and cost", _cost(report)),
    ]
    title = f"{_TITLES[report['kind']]}: from sources to a corpus"
    return render(Page(title, _headline(report), sections, about=_about(report), facts=_facts(report)))


def markdown(report: _Report) -> str:
    """The funnel as a Markdown table."""
    drafts = report["drafts"]
    rows = [[words("attempts"), count(drafts["attempts"]), words("")]]
    rows.append([words("written"), count(drafts["written"]), words(_reasons(drafts["no_draft"]))])
    rows += [[words(gate["gate"]), count(gate["passed"]), words(_reasons(gate["reasons"]))] for gate in drafts["gates"]]
    return Table("", ["stage", "drafts", "rejected here, by reason"], rows).markdown()


def _charts(drawn: Mapping[str, Any], name: str) -> list[Block]:
    return [drawn[name]] if name in drawn else []


def _headline(report: _Report) -> str:
    unit = unit_of(report["kind"])
    counts = report[unit]
    text = f"{counts['published']:,} of {counts['in']:,} {unit}"
    if unit == "notes":
        text += f" on {counts['documents']:,} documents passed"
    else:
        text += f" became {_TITLES[report['kind']]}"
    worst = max(counts["rejected_by"].items(), key=lambda item: item[1], default=None)
    return f"{text}; {worst[1]:,} failed at {worst[0].replace(':', ', ').replace('_', ' ')}." if worst else f"{text}."


def _about(report: _Report) -> str:
    return f"Writer: {report['model']}. Prompts: {report['prompt_version']}. Intervals of shares are Wilson's 95%."


def _facts(report: _Report) -> list[Fact]:
    unit, drafts = unit_of(report["kind"]), report["drafts"]
    published, passed = _rate(report[unit]["publication_rate"]), _rate(drafts["pass_rate"])
    facts = [
        Fact(f"{report[unit]['published']:,}", f"{unit} published"),
        Fact(published.text, f"of the {unit}", published.under),
        Fact(passed.text, "of the drafts passed every gate", passed.under),
    ]
    if (change := report["card"]["difference"]) is not None:
        one = change["slices"][0]["all"]
        before, after = (number(one[side]["per_million"]) for side in ("before", "after"))
        if (before, after) != ("0", "0"):
            facts.append(Fact(f"{before} → {after}", "harmful n-grams per million tokens, sources to texts"))
    return facts


def _outcomes(report: _Report) -> Table:
    unit = unit_of(report["kind"])
    counts = report[unit]
    rows = [[words("documents"), count(counts["documents"])]] if "documents" in counts else []
    rows += [[words("in"), count(counts["in"])], [words("published"), count(counts["published"])]]
    rows += [[words(f"rejected: {reason}"), count(times)] for reason, times in counts["rejected_by"].items()]
    rows.append([words("malformed documents, not counted above"), count(counts["malformed"])])
    rows += [
        [words(f"left out: harm score {score}"), count(times)] for score, times in counts["left_out_by_score"].items()
    ]
    return Table(f"The last attempt at each of the {unit} decides.", [unit, "number"], rows).without_zeros()


def _gates(report: _Report) -> Table:
    drafts = report["drafts"]
    written = [count(drafts["attempts"]), count(drafts["written"]), NOTHING, words(_reasons(drafts["no_draft"]))]
    rows = [[words("(writer)"), *written]]
    rows += [
        [
            words(gate["gate"]),
            count(gate["checked"]),
            count(gate["passed"]),
            _rate(gate["pass_rate"]),
            words(_reasons(gate["reasons"])),
        ]
        for gate in drafts["gates"]
    ]
    caption = "Drafts by gate, in their order: a draft that fails one is not shown to those behind it."
    heads = ["gate", "checked", "passed", "passed, share", "reasons of the others"]
    return Table(caption, heads, rows).without_zeros()


def _matrix(report: _Report) -> Table:
    rows = []
    for before, (drafts, passed) in enumerate(zip(*report["score_before_after"].values(), strict=True)):
        total = max(sum(drafts), 1)
        cells = [
            Cell(f"{n:,}", n, note=f"{kept:,} passed" if n else "", shade=n / total if n else None)
            for n, kept in zip(drafts, passed, strict=True)
        ]
        rows.append([words(f"source scored {before}"), *cells])
    caption = "Drafts by harm score: that of the source, and that of the draft by the scorer."
    return Table(caption, ["", *(f"draft {i}" for i in range(6))], rows).without_zeros()


def _card(report: _Report) -> list[Block]:
    change = report["card"]["difference"]
    if change is None:
        if unit_of(report["kind"]) == "notes":
            return [Text("Notes stand beside the documents, whose text stays as it is: there is nothing to compare.")]
        return [Text("Nothing was published, so there is nothing to compare.")]
    (one,) = change["slices"]
    sizes = Table(
        "Sources (before) and published texts (after), by their own scores.",
        ["", "before", "after"],
        difference.sizes(one),
    )
    frequencies = difference.frequencies_table(one)
    return [
        sizes,
        frequencies if frequencies.rows else Text("No harmful n-gram in either."),
        Text(change["definitions"]["intervals"]),
    ]


def _all_groups(report: _Report) -> list[Table]:
    named = (("styles", "style"), ("categories", "category"), ("scores", "harm score"))
    return [_groups(report[key], name, unit_of(report["kind"])) for key, name in named]


def _groups(groups: Sequence[_Report], name: str, unit: str) -> Table:
    keys = ("documents", "passed", "near_duplicates", "attempts", "written", "drafts_passed")
    rows = [[words(one["name"]), *(count(one[key]) for key in keys), _rate(one["pass_rate"])] for one in groups]
    heads = [name, unit, "passed", "of these near-duplicates", "attempts", "written", "drafts passed"]
    caption = f"By {name}; {unit} count by their last attempt."
    return Table(caption, [*heads, "attempts passed, share"], rows).without_zeros()


def _distributions(report: _Report) -> list[Fold]:
    parts = []
    for name, edges in HISTOGRAMS.items():
        found = report["distributions"][name]
        lower = [None, *edges]
        rows = [
            [_bin(low, high), count(drafts), count(passed)]
            for low, high, drafts, passed in zip(lower, [*edges, None], found["drafts"], found["passed"], strict=True)
            if drafts
        ]
        if rows:
            title = name.replace("_", " ")
            parts.append(Fold(title, [Table(f"Drafts by {title}", ["from, to", "drafts", "passed"], rows)]))
    return parts


def _bin(low: int | float | None, high: int | float | None) -> Cell:
    shown = f"{'up to' if low is None else f'above {low:g}'}{'' if high is None or low is None else ' to'}"
    return Cell(shown + ("" if high is None else f" {high:g}"), -1 if low is None else low)


def _cost(report: _Report) -> list[Block]:
    speed = report["throughput"]
    rows = [[words(name.replace("_", " ")), _plain(value)] for name, value in speed.items()]
    rows += [[words(f"spent: {name.replace('_', ' ')}"), _plain(value)] for name, value in report["spent"].items()]
    run = Table("This run; speed is of the shards that its last start finished.", ["", "value"], rows).without_zeros()
    found = report["cost_per_million"]
    if found is None:
        return [run]
    here = "unknown" if found["hours_as_here"] is None else f"{number(found['hours_as_here'])} h at this run's speed"
    spent = "" if found["cost_as_here"] is None else f", {number(found['cost_as_here'])} at the endpoint's prices"
    sums = f"{found['prompt_tokens']:,.0f} prompt and {found['completion_tokens']:,.0f} generated tokens"
    keys = ("completion_tokens_per_second", "times_measured", "hours", "dollars")
    rows = [
        [words(f"{one['machine']}: {one['model']}"), count(one["batch"]), *(amount(one.get(key)) for key in keys)]
        for one in found["machines"]
    ]
    if found["measured"]:
        measured = [amount(found["measured"].get(key)) for key in keys]
        rows.insert(0, [words(f"measured: this run's writer, {report['model']}"), NOTHING, *measured])
    unit = unit_of(report["kind"])
    caption = f"A million published {unit}, extrapolated by the formula below; only a row that says so is measured."
    header = ["machine and writer", "batch", "generated tokens/s", "times measured", "hours", "US dollars"]
    formula = [Text(part) for part in found["definition"].split("\n\n")]
    return [run, Text(f"A million published {unit}: {sums}; {here}{spent}."), Table(caption, header, rows), *formula]


def _plain(value: Any) -> Cell:
    return Cell(f"{value:,.6g}", value) if isinstance(value, int | float) else words(value)


def _rate(found: _Report | None) -> Cell:
    if found is None:
        return NOTHING
    value = {"value": found["share"], "low": found["low"], "high": found["high"]}
    return Cell(percent(found["share"]), value, interval=(f"{100 * found['low']:.3g}%", f"{100 * found['high']:.3g}%"))


def _reasons(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {times:,}" for reason, times in reasons.items())
