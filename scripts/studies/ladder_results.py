"""Makes the figures of the ladders on the embedded corpus, of the kept records, and draws them.

    python scripts/studies/ladder_results.py

The records are those of docs/results/data/ladder_VARIANT, of the variants of configs/ladder.py that `TABLES` names. A
file of figures is written anew for each, and then every table and picture as by draw_results.py. *Corrected* are rates
after benign finetuning by the judge's errors, measured on documents of known label (`word_lists.measure_judge`) or, of
a judge trained on people's labels, on those held out, as its measurements have them.

A table with models of its own is of the seeds that all of them have, and Holm's correction over its orderings alone; it
waits until three are kept.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
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
    "moral_education": "treated",
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


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table: its head, its values' digits, and a model's cell from its measures by stage."""

    head: str
    cell: Callable[[Mapping[str, Any]], Any]
    digits: int | None = None  # of a cell with an interval; none: words
    drawn: bool = False

    def as_json(self) -> dict[str, Any]:
        """The column as tables of results have it."""
        found: dict[str, Any] = {"head": self.head}
        if self.digits is not None:
            found["digits"] = self.digits
        return found | ({"drawn": True} if self.drawn else {})


def _at(stage: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda stages: _percent(stages.get(stage, {}).get(report.HARMFUL))


def _moves(measure: str, written: Callable[[float], str]) -> Callable[[Mapping[str, Any]], str]:
    """X finetuning" in words, of the stages that were measured so."""
    return lambda stages: " to ".join(
        written(stages[stage][measure]["value"]) for stage in (_TUNED, _LAST) if measure in stages[stage]
    )


def _whole_percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _perplexity(stages: Mapping[str, Any]) -> float | None:
    found = stages.get(_FIRST, {}).get(report.PERPLEXITY)
    return None if found is None else round(found["value"], 2)


HARMFUL_BY_STAGE = (
    Column("pretraining", _at(_FIRST), 0, drawn=True),
    Column("instruction tuning", _at(_TUNED), 0, drawn=True),
    Column("benign finetuning", _at(_LAST), 0, drawn=True),
)
NEITHER = Column("neither", _moves(report.NEITHER, _whole_percent))
SAFE_REFUSED = Column("safe refused", _moves(report.OVER_REFUSED, _whole_percent))
LEANINGS = Column("leans", _moves(LEANING, "{:.2f}".format))
PERPLEXITY = Column("perplexity", _perplexity, 2)


def corrected_column(errors: tuple[Counts, Counts]) -> Column:
    """Harmful completions after the last stage behind a judge's (sensitivity, specificity)."""
    return Column("corrected", lambda stages: corrected(stages[_LAST][report.HARMFUL], errors), 0)


def rates(
    summary: Mapping[str, Any],
    about: Mapping[str, Any],
    names: Mapping[str, str],
    prompts: int,
    columns: Sequence[Column],
) -> dict[str, Any]:
    """A row for each model that went through the last stage, and its difference to raw."""
    rows = [
        {
            "name": names.get(name, name),
            "values": [*(each.cell(stages) for each in columns), _against_raw(summary, name)],
        }
        for name, stages in summary["rows"].items()
        if _LAST in stages
    ]
    return {
        "title": "Harmful completions of every intervention after each of three stages, %",
        **about,
        "axis": f"% of {prompts} held-out harmful prompts",
        "head": "model",
        "columns": [*(each.as_json() for each in columns), {"head": "less raw"}],
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


def table_of(variant: str, study: kept_records.Study, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The table of one study: which columns and names depends on its judge."""
    if study.config.answers:
        perplexity = dataclasses.replace(PERPLEXITY, head="ppl", digits=1)  # a narrow column: there are many
        columns = (corrected_column(trained_judge_errors(study)), SAFE_REFUSED, LEANINGS, perplexity)
        names, prompts = NAMES_OF_ANSWERS, study.config.prompts
    elif variant in CORRECTED:
        errors = judge_errors(composed=study.config.corpus.get("references", 0) > 0)
        columns = (corrected_column(errors), NEITHER, SAFE_REFUSED)
        names, prompts = NAMES | NAMES_OF_RUNGS, study.config.corpus.prompts
    else:
        columns = (NEITHER, SAFE_REFUSED, PERPLEXITY)
        names, prompts = NAMES, study.config.corpus.prompts
    return rates(summary, study.about, names, prompts, (*HARMFUL_BY_STAGE, *columns))


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
            tables[name] = table_of(variant, study, summary)
        sys.stdout.write(f"# {name}: {study.about['machine']}\n\n{report.to_markdown(summary)}\n")
    kept_records.write(tables)


if __name__ == "__main__":
    cli.run(main, cli.parser("scripts.studies.ladder_results", __doc__))
