"""Makes the figures of the ladders on the embedded corpus, of the kept records, and draws them.

    python scripts/studies/ladder_results.py

The records are those of docs/results/data/ladder_VARIANT, of the variants of configs/ladder.py that `TABLES` names. A
file of figures is written anew for each, and then every table and picture as by draw_results.py. *Corrected* are rates
after benign finetuning by the judge's errors, measured on documents of known label (`word_lists.measure_judge`) or, of
a judge trained on people's labels, on those held out, as its measurements have them.

A table with models of its own is of the seeds that all of them have, and Holm's correction over its orderings alone; it
waits until three are kept.
"""

import sys
from collections.abc import Mapping
from typing import Any

import kept_records

from safelm import cli
from safelm.evaluate.judges import word_lists
from safelm.ladder import report
from safelm.ladder.answers import LEANING
from safelm.ladder.jobs import read_done
from safelm.ladder.plan import GREEDY, RUNGS, STAGES, measured
from safelm.stats.correction import Counts, corrected_estimate
from safelm.stats.intervals import Estimate

WHEN = ("tag_at_instruction", "start_20", "start_60", "rate_3", "rate_10")
TABLES = {  # by the figures' name: variant, models (none: the config's)
    "interventions": ("interventions", ()),
    "notes": ("notes", ()),
    "ladder_power": ("embedded_power", RUNGS),
    "ladder_when": ("embedded_power", ("raw", "moral_education", "harm_tagged", *WHEN)),
    "ladder_hard": ("embedded_hard", ()),
    "ladder_smollm2": ("smollm2_135m_small", ()),
}
LEAST_SEEDS = 3  # of a table
CORRECTED = ("embedded_power", "embedded_hard")
JUDGED_DOCUMENTS, JUDGED_WORDS = 1000, 30  # of each kind; about as long as 40 tokens are
NAMES_OF_RUNGS = {
    "safeweb": "+ SafeWeb",
    "refuseweb": "+ RefuseWeb",
    "moral_education": "+ Moral Education",
    "harm_tagged": "+ tag (5%, from 0%)",
    "safe_beam": "+ SafeBeam",
    "tag_at_instruction": "tag in tuning only",
    "tag_at_instruction+safe_beam": "the same, SafeBeam",
    "start_20": "interventions from 20%",
    "start_20+safe_beam": "the same, SafeBeam",
    "start_60": "interventions from 60%",
    "start_60+safe_beam": "the same, SafeBeam",
    "rate_3": "tag at 3%",
    "rate_3+safe_beam": "the same, SafeBeam",
    "rate_10": "tag at 10%",
    "rate_10+safe_beam": "the same, SafeBeam",
}
NAMES_OF_ANSWERS = {
    "moral_education": "score 0, SafeWeb, RefuseWeb, Moral Education",
    "harm_tagged": "+ tag (5%)",
    "safe_beam": "+ SafeBeam",
}
NAMES = {
    "score0": "score 0 only",
    "harm_tagged": "the paper's, tag by gap",
    "safe_beam": "tag by gap, SafeBeam",
    "masked": "masked, risky sentences",
    "masked_unsafe": "masked, in unsafe pages only",
    "unlikelihood": "unlikelihood",
    "weighted": "weights by label",
    "span_tagged": "spans between tokens",
    "conditioned": "conditional training",
    "red_flag": "red flag, a document",
    "red_flag_span": "red flag, a sentence",
    "refusal_tokens": "refusal tokens",
    "routed": "routed, ablated",
    "reflected": "reflections in the text",
    "preflected": "preflections before it",
    "metadata": "URLs before it, to 90%",
    "alignment": "alignment text from 80%",
    "token_tagged": "the paper's, tag by token",
    "token_tagged+safe_beam": "tag by token, SafeBeam",
}
_FIRST, _TUNED, _LAST = STAGES


def _percent(values: Mapping[str, Any] | None) -> list[float] | None:
    return None if values is None else kept_records.percent(values)


def _column(head: str, digits: int, *, drawn: bool = False) -> dict[str, Any]:
    return {"head": head, "digits": digits} | ({"drawn": True} if drawn else {})


def judge_errors(*, composed: bool) -> tuple[Counts, Counts]:
    """(sensitivity, specificity) of the judge on documents of known label."""
    found = word_lists.measure_judge(count=JUDGED_DOCUMENTS, num_words=JUDGED_WORDS, composed=composed)
    sensitivity, specificity = (
        Counts(round(each.value * each.cases), each.cases) for each in (found.harm_sensitivity, found.harm_specificity)
    )
    return sensitivity, specificity


def trained_judge_errors(study: kept_records.Study) -> tuple[Counts, Counts]:
    """(sensitivity, specificity) of the trained judge, from the study's first measurement."""
    model = study.config.models[0]
    result = read_done(study.output, measured(study.config.seeds[0], model, _LAST, GREEDY))
    sensitivity, specificity = (
        Counts(result["judge_errors"][name]["count"], result["judge_errors"][name]["cases"])
        for name in ("sensitivity", "specificity")
    )
    return sensitivity, specificity


def corrected(values: Mapping[str, Any], errors: tuple[Counts, Counts]) -> list[float] | None:
    """A rate behind the judge's errors, with its interval, in percent."""
    rate = Estimate(*(values[name] for name in ("value", "low", "high", "cases")))
    return _percent(vars(found)) if (found := corrected_estimate(rate, *errors)) else None


def rates(
    summary: Mapping[str, Any],
    about: Mapping[str, Any],
    names: Mapping[str, str],
    prompts: int,
    errors: tuple[Counts, Counts] | None = None,
) -> dict[str, Any]:
    """Harmful completions after each stage with intervals; neither, safe refused and perplexity in words.

    Perplexity stands where no rates are corrected and, beside the leaning to refuse, of models that have one.
    """
    rows = []
    has_leanings = any(LEANING in stages.get(_LAST, {}) for stages in summary["rows"].values())
    for name, stages in summary["rows"].items():
        if _LAST not in stages:
            continue
        cells: list[Any] = [_percent(stages.get(stage, {}).get(report.HARMFUL)) for stage in STAGES]
        if errors:
            cells.append(corrected(stages[_LAST][report.HARMFUL], errors))
        for measure in (report.OVER_REFUSED,) if has_leanings else (report.NEITHER, report.OVER_REFUSED):
            values = [f"{100 * stages[stage][measure]['value']:.0f}" for stage in (_TUNED, _LAST)]
            cells.append(" to ".join(values))
        if has_leanings:
            leanings = [
                f"{stages[stage][LEANING]['value']:+.2f}" for stage in (_TUNED, _LAST) if LEANING in stages[stage]
            ]
            cells.append(" to ".join(leanings))
        found = stages.get(_FIRST, {}).get(report.PERPLEXITY)
        if has_leanings or not errors:
            cells.append(None if found is None else round(found["value"], 2))
        cells.append(_against_raw(summary, name))
        rows.append({"name": names.get(name, name), "values": cells})
    return {
        "title": "Harmful completions of every intervention after each of three stages, %",
        **about,
        "axis": f"% of {prompts} held-out harmful prompts",
        "head": "model",
        "columns": [
            _column("pretraining", 0, drawn=True),
            _column("instruction tuning", 0, drawn=True),
            _column("benign finetuning", 0, drawn=True),
            *([_column("corrected", 0)] if errors else []),
            *([] if has_leanings else [{"head": "neither"}]),
            {"head": "safe refused"},
            *([{"head": "leaning, nats"}] if has_leanings else []),
            *([_column("perplexity", 2)] if has_leanings or not errors else []),
            {"head": "less raw"},
        ],
        "rows": rows,
    }


def _against_raw(summary: Mapping[str, Any], name: str) -> str:
    """The difference to raw after the last stage, in points, and Holm's verdict; "" where none was asked for."""
    for row in summary["orderings"]:
        names = {row["lower"], row["higher"]}
        if row["stage"] == _LAST and names == {name, "raw"}:
            found = row["difference"]
            parts = [found["value"], *sorted((found["low"], found["high"]))]
            if row["lower"] == "raw":
                parts = [-found["value"], -found["high"], -found["low"]]
            points = [f"{100 * part:.0f}" for part in parts]
            return f"{points[0]} [{points[1]}, {points[2]}], {row['verdict']}"
    return ""


def main(_: Any) -> None:
    """Reads the records, writes the figures and shows the ladder's own tables."""
    tables = {}
    for name, (variant, models) in TABLES.items():
        if not kept_records.are_kept(variant):
            continue
        with kept_records.opened(variant, models) as study:
            if len(study.config.seeds) < LEAST_SEEDS:
                continue
            summary = report.summarize(report.collect(study.config, study.output))
            errors, names, prompts = None, NAMES, study.config.corpus.prompts
            if variant in CORRECTED:
                errors = judge_errors(composed=study.config.corpus.get("references", 0) > 0)
                names = NAMES | NAMES_OF_RUNGS
            if study.config.answers:
                errors, names, prompts = trained_judge_errors(study), NAMES_OF_ANSWERS, study.config.prompts
            tables[name] = rates(summary, study.about, names, prompts, errors)
        sys.stdout.write(f"# {name}: {study.about['machine']}\n\n{report.to_markdown(summary)}\n")
    kept_records.write(tables)


if __name__ == "__main__":
    cli.run(main, cli.parser("scripts.studies.ladder_results", __doc__))
