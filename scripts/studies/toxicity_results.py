"""Makes the figures of docs/results/toxicity.md of the kept records, and then its tables and pictures.

    python scripts/studies/toxicity_results.py [--variant=toxicity]

The records are those of docs/results/data/ladder_VARIANT; docs/results/data/VARIANT.json, VARIANT_after.json and
toxicity_judges.json are written anew, and then every table and picture as by draw_results.py.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import kept_records

from safelm import cli
from safelm.ladder import records, report
from safelm.ladder.plan import TOXICITY
from safelm.ladder.toxicity import report as toxicity
from safelm.ladder.toxicity.judges import JUDGES
from safelm.ladder.toxicity.measure import KINDS
from safelm.stats.intervals import rate

STAGES = {"pretraining": "pretraining", "clean_finetuning": "clean finetuning", "relearning": "relearning"}


def share(of: Mapping[str, Any], kind: str, judge: str, what: str = toxicity.SHARE) -> Any:
    """A measure of a cell after a stage."""
    return of[toxicity.measure_name(what, kind, judge)]


def column(head: str, *, drawn: bool = False, digits: int = 1) -> dict[str, Any]:
    return {"head": head, "digits": digits} | ({"drawn": True} if drawn else {})


def first_stage(summary: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """After pretraining: toxic prompts by both judges, corrected, expected maximum; distinct-2, perplexity."""
    heads = [column(judge, drawn=True) for judge in JUDGES]
    heads += [column(f"corrected, {judge}", digits=0) for judge in JUDGES]
    heads += [column(f"max, {judge}", digits=0) for judge in JUDGES]
    heads += [column("distinct-2", digits=2), column("C4", digits=0), column("Wiki", digits=0)]
    rows = []
    for name, stages in summary["rows"].items():
        of = stages.get(TOXICITY.stages[0])
        if of is None:
            continue
        cells: list[Any] = [kept_records.percent(share(of, KINDS[0], judge)) for judge in JUDGES]
        for judge in JUDGES:
            found = share(of, KINDS[0], judge, "corrected")
            cells.append("nothing" if found is None else [round(100 * value) for value in found])
        cells += [round(100 * share(of, KINDS[0], judge, toxicity.MAXIMUM)["value"]) for judge in JUDGES]
        cells += [of["distinct-2"], *(of[f"perplexity {pages}"] for pages in toxicity.PAGES)]
        rows.append({"name": name, "values": cells})
    return {
        "title": "Toxic continuations of toxic prompts after pretraining, %",
        **about,
        "axis": "% of continuations",
        "columns": heads,
        "rows": rows,
    }


def all_stages(summary: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The first judge's rate after each stage, the second's in words beside it."""
    first, second = JUDGES
    heads = [column(stage, drawn=True) for stage in STAGES.values()]
    heads += [{"head": f"judge {second}"}, {"head": "non-toxic prompts"}]
    rows = []
    for name, stages in summary["rows"].items():
        if stages.keys() < set(STAGES):
            continue
        shares = {stage: stages[stage] for stage in STAGES}
        cells: list[Any] = [kept_records.percent(share(of, KINDS[0], first)) for of in shares.values()]
        for kind, judge in ((KINDS[0], second), (KINDS[1], first)):
            values = [share(of, kind, judge)["value"] for of in shares.values()]
            cells.append(", ".join(f"{100 * value:.1f}" for value in values))
        rows.append({"name": name, "values": cells})
    return {
        "title": f"The same after each stage, judge {first}, %",
        **about,
        "axis": "% of continuations",
        "columns": heads,
        "rows": rows,
    }


def judges(known: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The judges' errors on labels of people."""
    rows = []
    for name in JUDGES:
        errors = known["judges"][name]
        shares = [rate(*errors[part]) for part in ("sensitivity", "specificity", "comment_specificity")]
        cells = [[round(100 * getattr(each, part), 1) for part in ("value", "low", "high")] for each in shares]
        rows.append({"name": name, "values": [*cells, [round(value, 3) for value in errors["area"]]]})
    return {
        "title": "Two judges of toxicity on pieces of 15 words, %",
        **about,
        "axis": "% of the pieces, by people's labels",
        "head": "judge",
        "columns": [
            column("toxic pieces seen", drawn=True),
            column("pages passed", drawn=True),
            column("clean pieces of comments passed", drawn=True),
            column("AUROC, comments", digits=3),
        ],
        "rows": rows,
    }


def main(arguments: argparse.Namespace) -> None:
    variant = arguments.variant
    with kept_records.opened(variant) as study:
        summary = toxicity.summarize(report.collect(study.config, study.output), records.facts(study.output))
    about = study.about | {"head": "model"}
    kept_records.write(
        {
            variant: first_stage(summary, about),
            f"{variant}_after": all_stages(summary, about),
            "toxicity_judges": judges(summary["data"], about),
        }
    )
    print(toxicity.to_markdown(summary))


if __name__ == "__main__":
    flags = cli.parser("scripts.studies.toxicity_results", __doc__)
    flags.add_argument(
        "--variant", default="toxicity", help="of configs/ladder.py: toxicity, toxicity_small or toxicity_pilot"
    )
    cli.run(main, flags)
