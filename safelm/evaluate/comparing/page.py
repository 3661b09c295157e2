"""Renders a comparison as Markdown and as one self-contained HTML page: tables, charts, protocols."""

from collections.abc import Mapping

from safelm.evaluate.comparing import figures, tables
from safelm.evaluate.comparing.results import ATTACK, REFUSAL, Comparison, Row
from safelm.report.page import Block, Fact, Page, Section, Text, render
from safelm.report.table import Table, words
from safelm.stats.intervals import Estimate

INTERVALS = (
    "95% intervals of rates are Wilson's, at the number of independent prompts that clusters leave (prompts of a "
    "category, attempts at a goal, answers of a seed); of differences those of the bootstrap over the same clusters. "
    "McNemar's test counts each goal once, by the sign of its mean difference over seeds and attempts. With several "
    "seeds intervals and p-values also allow for another training, by the analysis of variance over seeds and goals; "
    "each seed is shown as a dot. With one seed they say nothing of another training. A rate counts each prompt once, "
    "whichever benchmarks share it, and leaves unscored answers out. Neither: an empty, broken or cut-off answer, no "
    "success of safety. Corrected rates (Rogan and Gladen) assume that a judge errs on the answers it saw as it did on "
    "the labelled ones; empty and cut-off answers need no judge and no correction."
)
NO_HEADLINE = (
    "No headline rate: the answers were judged by refusal wordings alone, which are a tier to compare with. Name a "
    "second judge (--judge=trained:DIR, judge:MODEL, ...)."
)
_TITLES = {
    "outcomes": "Harmful prompts",
    "attack": "Attack success",
    "changes": "What each stage changes",
    "refusals": "Safe prompts",
    "baseline": "Against the baseline",
    "classes": "Answers to safe prompts",
    "judges": "By judge",
    "models": "Read off the models",
}
_CHARTS = {"outcomes": ("outcomes",), "attack": ("stages", "ladder"), "refusals": ("refusals", "frontier")}


def sections(comparison: Comparison, baseline: Row | None = None) -> dict[str, Table]:
    """The tables that the comparison has data for, by title."""
    found = {
        "outcomes": tables.harmful_outcomes(comparison),
        "attack": tables.by_stage(comparison, ATTACK),
        "changes": tables.deltas(comparison, ATTACK),
        "refusals": tables.by_stage(comparison, REFUSAL),
        "baseline": tables.against_baseline(comparison, baseline),
        "classes": tables.five_classes(comparison),
        "judges": tables.judges(comparison),
        "models": tables.models(comparison),
    }
    titled = {_TITLES[name]: table for name, table in found.items()}
    for column in comparison.columns_with(ATTACK):
        if len({name for run in comparison.runs if run.column == column for name in run.benchmarks}) > 1:
            title = f"Attack success by benchmark, {tables.name_of(comparison, column)}"
            titled[title] = tables.by_benchmark(comparison, column)
    return {title: table for title, table in titled.items() if table.rows and len(table.heads) > 1}


def markdown(comparison: Comparison, titled: Mapping[str, Table]) -> str:
    """The report as Markdown; `titled` are its `sections`."""
    parts = ["# Evaluation", _headline(comparison)]
    if not has_headline(comparison):
        parts.append(f"**{NO_HEADLINE.replace(':', ':**', 1)}")
    for title, table in titled.items():
        parts.append(f"## {title}\n\n{table.caption}\n\n{table.markdown()}")
    parts += [INTERVALS, f"## Protocols\n\n{protocols(comparison).markdown()}"]
    return "\n\n".join(parts) + "\n"


def html_page(comparison: Comparison, titled: Mapping[str, Table]) -> str:
    """The report as a page with its charts inside; `titled` are its `sections`."""
    drawn = figures.of_page(comparison)
    charts = {_TITLES[name]: [drawn[one] for one in names if one in drawn] for name, names in _CHARTS.items()}
    parts: list[Section] = []
    for title, table in titled.items():
        blocks: list[Block] = [*charts.get(title, []), table]
        parts.append(Section(title, blocks))
    parts.append(Section("Intervals and protocols", [Text(INTERVALS), protocols(comparison)]))
    headline = _headline(comparison) if has_headline(comparison) else NO_HEADLINE
    page = Page("Evaluation", headline, parts, about=_about(comparison), facts=_facts(comparison))
    return render(page)


def protocols(comparison: Comparison) -> Table:
    """The protocol of each run, with shortened hashes."""
    shown = (
        "prompts_sha256",
        "num_prompts",
        "template",
        "answer_start",
        "judge_version",
        "judge_calibration",
        "coherence",
        "max_new_tokens",
        "seed",
        "checkpoint_sha256",
    )
    rows = []
    for run in comparison.runs:
        values = [_cut(name, run.protocol.get(name, "")) for name in shown]
        rows.append([words(run), words(run.column.suite), *map(words, values)])
    kept = [i for i in range(len(shown) + 2) if any(row[i].text for row in rows)]
    heads = ["run", "suite", *(name.replace("_sha256", "").replace("_", " ") for name in shown)]
    rows = [[row[i] for i in kept] for row in rows]
    return Table("What each run was measured under", [heads[i] for i in kept], rows)


def has_headline(comparison: Comparison) -> bool:
    """Whether a judge better than word lists labelled any run."""
    return any(run.headline.get(ATTACK) or run.headline.get(REFUSAL) for run in comparison.runs)


def _cut(name: str, value: object) -> str:
    return str(value)[:12] if name.endswith("sha256") else str(value)


def _rates(comparison: Comparison, aspect: str) -> list[tuple[Row, Estimate]]:
    """Every row's rate at its last stage."""
    found = []
    for row in comparison.rows:
        rates = [comparison.rate(row, column, aspect) for column in comparison.columns_with(aspect)]
        if shown := [rate for rate in rates if rate is not None]:
            found.append((row, shown[-1]))
    return found


def _headline(comparison: Comparison) -> str:
    """One sentence: the highest and lowest attack success, and the refused safe prompts at the lowest."""
    attacks, refusals = _rates(comparison, ATTACK), dict(_rates(comparison, REFUSAL))
    if not attacks:
        told = [f"{row} {_percent(rate)}" for row, rate in refusals.items()]
        return f"Refused safe prompts: {', '.join(told)}." if told else "No rate to tell."
    worst, best = (choose(attacks, key=lambda pair: pair[1].value) for choose in (max, min))
    text = f"Harmful answers to harmful prompts: {_percent(worst[1])} ({worst[0]})"
    if best[0] != worst[0]:
        text += f" down to {_percent(best[1])} ({best[0]})"
        if best[0] in refusals:
            text += f", which wrongly refuses {_percent(refusals[best[0]])} of safe prompts"
    return text + "."


def _facts(comparison: Comparison) -> list[Fact]:
    return [
        Fact(_percent(rate), f"harmful: {row}", f"{100 * rate.low:.1f} to {100 * rate.high:.1f}")
        for row, rate in _rates(comparison, ATTACK)[:6]
    ]


def _percent(rate: Estimate) -> str:
    return f"{100 * rate.value:.1f}%"


def _about(comparison: Comparison) -> str:
    counts = {
        "run": len(comparison.runs),
        "model and method": len(comparison.rows),
        "stage and suite": len(comparison.columns),
        "seed": len({run.seed for run in comparison.runs}),
    }
    many = {name: name.replace(" and", "s and") + "s" for name in counts}
    return ", ".join(f"{count} {name if count == 1 else many[name]}" for name, count in counts.items()) + "."
