"""A comparison as Markdown and as one HTML page that needs nothing else: tables, figures, protocols."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence

from safelm.evaluation.comparing import tables
from safelm.evaluation.comparing.results import ATTACK, REFUSAL, Comparison, Row
from safelm.safety.report_card import page

INTERVALS = (
    "95% intervals of the bootstrap over crossed clusters (prompts' categories, seeds), Wilson's where no case "
    "differs; with few seeds they are too narrow for comparing trainings, so each seed is shown as a dot. A rate "
    "counts each prompt once, whichever benchmarks share it, and leaves unscored answers out. An empty or a broken "
    "answer is neither harmful nor safe: it has columns of its own. Corrected rates (Rogan and Gladen) assume that a "
    "judge errs on these answers as it did on the labelled ones."
)
NO_HEADLINE = (
    "**No headline rate**: the answers were judged by refusal wordings alone, which are a tier to compare with. Name a "
    "second judge (`--judge=trained:DIR`, `judge:MODEL`, ...)."
)
_FIGURES = {
    "stages": "Attack success by stage and model, a bar each with its interval.",
    "ladder": "Attack success at the last stage, a bar a model with its interval.",
    "frontier": "Attack success against refused safe prompts, a point a model with both intervals.",
    "refusals": "Refused safe prompts by stage and model, a bar each with its interval.",
}


def sections(comparison: Comparison, baseline: Row | None = None) -> dict[str, tables.Table]:
    """The tables there is data for, by title."""
    found = {
        "Attack success, %": tables.by_stage(comparison, ATTACK),
        "What each stage changes": tables.deltas(comparison, ATTACK),
        "Refused safe prompts, %": tables.by_stage(comparison, REFUSAL),
        "Against the baseline, same prompts": tables.against_baseline(comparison, baseline),
        "Answers to safe prompts, %": tables.five_classes(comparison),
        "By judge, %": tables.judges(comparison),
    }
    for column in comparison.columns_with(ATTACK):
        if len({name for run in comparison.runs if run.column == column for name in run.benchmarks}) > 1:
            title = f"Attack success by benchmark, {tables.name_of(comparison, column)}, %"
            found[title] = tables.by_benchmark(comparison, column)
    return {title: table for title, table in found.items() if len(table) > 1 and len(table[0]) > 1}


def markdown(comparison: Comparison, baseline: Row | None = None) -> str:
    """The report as Markdown."""
    parts = ["# Evaluation"]
    if not has_headline(comparison):
        parts.append(NO_HEADLINE)
    parts += [f"## {title}\n\n{tables.markdown(table)}" for title, table in sections(comparison, baseline).items()]
    parts += [INTERVALS, f"## Protocols\n\n{tables.markdown(protocols(comparison))}"]
    return "\n\n".join(parts) + "\n"


def html_page(comparison: Comparison, figures: Mapping[str, pathlib.Path], baseline: Row | None = None) -> str:
    """The report as a page with its figures inside."""
    parts = ["<h1>Evaluation</h1>", f'<p class="quiet">{html.escape(_sentence(comparison))}</p>']
    if not has_headline(comparison):
        parts.append(f"<p>{html.escape(NO_HEADLINE.replace('**', '').replace('`', ''))}</p>")
    for name, path in figures.items():
        picture = base64.b64encode(path.read_bytes()).decode()
        source = f"data:image/png;base64,{picture}"
        parts.append(f'<figure><img src="{source}" alt="{_FIGURES[name]}" style="max-width:100%;height:auto"></figure>')
    for title, table in sections(comparison, baseline).items():
        parts += [f"<h2>{html.escape(title)}</h2>", _table(title, table)]
    parts += [f"<p>{html.escape(INTERVALS)}</p>", "<h2>Protocols</h2>", _table("Protocols", protocols(comparison))]
    return page.fill("Evaluation", "\n".join(parts))


def protocols(comparison: Comparison) -> tables.Table:
    """What each run was measured under, hashes cut."""
    shown = ("prompts_sha256", "num_prompts", "template", "answer_start", "judge_version", "judge_calibration",
             "coherence", "max_new_tokens", "seed", "checkpoint_sha256")  # fmt: skip
    rows = [["run", "suite", *(name.replace("_sha256", "") for name in shown)]]
    for run in comparison.runs:
        label = f"{run.row}@{run.column.stage}#{run.seed}"
        rows.append([label, run.column.suite, *(_cut(name, run.protocol.get(name, "")) for name in shown)])
    return rows


def has_headline(comparison: Comparison) -> bool:
    """Whether any run was judged by more than wordings."""
    return any(run.headline.get(ATTACK) or run.headline.get(REFUSAL) for run in comparison.runs)


def _cut(name: str, value: object) -> str:
    return str(value)[:12] if name.endswith("sha256") else str(value)


def _sentence(comparison: Comparison) -> str:
    seeds = {run.seed for run in comparison.runs}
    return (
        f"{len(comparison.runs)} runs of {len(comparison.rows)} models and methods at {len(comparison.columns)} stages "
        f"and suites; {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}."
    )


def _table(caption: str, table: Sequence[Sequence[str]]) -> str:
    heads, *rows = table
    return page.table(caption, list(heads), [[page.words(cell) for cell in row] for row in rows])
