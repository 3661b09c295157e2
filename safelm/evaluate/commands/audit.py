"""Audits judges on answers that people have labelled: errors by kind of answer, disagreement, wordings, corrections.

--labelled is a file with the columns prompt, response, label (harmful or harmless) and kind, what kind of answer it is:
plain_refusal, topic_refusal (a refusal that names the topic), victim_side, partial, educational, compliance, or kinds
of your own. For every judge the audit gives its confusion, sensitivity and specificity, and errors by kind; for every
two judges where they disagree; with --wordings=K, for language models, how far the rate hangs on the wording of the
question; with --results, the rates of safelm.evaluate by these judges, observed and corrected (Rogan and Gladen). A
corrected rate holds where a judge errs on those answers as on the labelled ones, so kinds should be mixed alike.

    OUTPUT/audit.json, audit.md    counts, rates with 95% intervals, hashes; no text
    OUTPUT/verdicts/               what models have said: a stopped audit goes on by the same command
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import cli, documents
from safelm.evaluate import outcomes
from safelm.evaluate.comparing.results import ATTACK, Run, read_runs
from safelm.evaluate.judges import ASKED, MODEL, Judge, audit, judge_and_score, load_judges, load_worded
from safelm.evaluate.judges.audit import Audited
from safelm.evaluate.judges.remembering import RememberingJudge
from safelm.evaluate.judges.verdicts import UNSCORED
from safelm.io import records
from safelm.io.files import write_whole
from safelm.report.table import Table, count, estimate, share, words
from safelm.stats.intervals import Estimate


def main(arguments: argparse.Namespace) -> None:
    """Audits the judges and writes the report."""
    rows = audit.read_audited(arguments.labelled)
    runs = read_runs(arguments.results) if arguments.results else []
    judges = load_judges(arguments.judge)
    output = pathlib.Path(arguments.output)
    found: dict[str, Any] = {"labels": _describe(rows), "judges": {}, "wordings": {}}
    verdicts: dict[str, Sequence[str]] = {}
    for judge in judges:
        if not judge.judges_harm:
            raise ValueError(f"--judge: {judge.name} says nothing of harm")
        verdicts[judge.name], scores = _ask(judge, rows, output)
        errors = audit.errors(rows, verdicts[judge.name], scores)
        found["judges"][judge.name] = {"version": judge.version, "tier": judge.tier, **errors}
    found["disagreements"] = audit.disagreements(rows, verdicts)
    for spec in arguments.judge if arguments.wordings else ():
        if spec.partition(":")[0] in ASKED:
            worded = load_worded(spec, arguments.wordings)
            asked = [_ask(judge, rows, output)[0] for judge in worded]
            found["wordings"][worded[0].name.rpartition(".")[0]] = audit.wording_spread(rows, asked)
    if arguments.wordings and not found["wordings"]:
        raise ValueError(f"--wordings={arguments.wordings}: no judge is a language model ({' or '.join(ASKED)})")
    found["corrected"] = _corrected(runs, found["judges"])
    _write(output, found)


def _ask(judge: Judge, rows: Sequence[Audited], output: pathlib.Path) -> tuple[list[str], list[float | None]]:
    if judge.tier == MODEL:  # hours of work: a stopped audit goes on
        folder = output / "verdicts"
        folder.mkdir(parents=True, exist_ok=True)
        documents.declare_no_documents(str(folder), "safelm.evaluate")
        judge = RememberingJudge(judge, folder)
    return judge_and_score(judge, [row.exchange for row in rows])


def _describe(rows: Sequence[Audited]) -> dict[str, Any]:
    said = [[row.exchange.request, row.exchange.answer, row.harmful, row.kind] for row in rows]
    return {
        "answers": len(rows),
        "requests": len({row.group for row in rows}),
        "harmful": sum(row.harmful for row in rows),
        "sha256": records.fingerprint(said),
    }


def _corrected(runs: Sequence[Run], judges: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rates of results by the audited judges, of the same version, observed and corrected."""
    found = []
    for run in runs:
        for name, errors in judges.items():
            judged = run.judged.get(name, {})
            if ATTACK not in judged:
                continue
            if judged["version"] != errors["version"]:
                raise ValueError(
                    f"{run.source}: its judge {name} is {judged['version']}, the audited one is {errors['version']}"
                )
            observed, corrected = judged[ATTACK].get("observed"), None
            if observed:
                scored = [case for case in run.cases if case["harmful"] and case["labels"][name] != UNSCORED]
                corrected = audit.correct(errors, Estimate(**observed), outcomes.judged_share(scored, name))
            found.append(
                {
                    "run": str(run),
                    "judge": name,
                    "observed": observed,
                    "corrected": vars(corrected) if corrected else None,
                }
            )
    return found


def _write(output: pathlib.Path, found: Mapping[str, Any]) -> None:
    tables = {title: table for title, table in _tables(found).items() if table.rows}
    print("\n\n".join(f"{title}\n{table.plain()}" for title, table in tables.items()))
    labels = found["labels"]
    head = f"{labels['answers']} answers to {labels['requests']} requests, {labels['harmful']} labelled harmful."
    parts = ["# Audit of judges", head]
    parts += [f"## {title}\n\n{table.caption}\n\n{table.markdown()}" for title, table in tables.items()]
    print(write_whole(output / "audit.json", json.dumps(found, indent=1) + "\n"))
    print(write_whole(output / "audit.md", "\n\n".join(parts) + "\n"))


def _tables(found: Mapping[str, Any]) -> dict[str, Table]:
    judges = found["judges"]
    overall = [
        [
            words(name),
            *(count(each["confusion"][cell]) for cell in (*audit.CELLS, "unscored")),
            *(share(each[rate]) for rate in ("sensitivity", "specificity", "wrong")),
            estimate(each.get("auroc")),
        ]
        for name, each in judges.items()
    ]
    heads = ["judge", *(cell.replace("_", " ") for cell in (*audit.CELLS, "unscored"))]
    kinds = list(dict.fromkeys(kind for each in judges.values() for kind in each["by_kind"]))
    by_kind = [
        [words(kind.replace("_", " ")), count(next(iter(judges.values()))["by_kind"].get(kind, {}).get("answers", 0))]
        + [share(each["by_kind"].get(kind, {}).get("wrong")) for each in judges.values()]
        for kind in kinds
    ]
    return {
        "Judges": Table(
            "Counts, and % [95% interval]", [*heads, "sensitivity", "specificity", "wrong", "AUROC"], overall
        ),
        "Errors by kind of answer": Table("Wrong verdicts, % [95% interval]", ["kind", "answers", *judges], by_kind),
        "Disagreement": _disagreement(found["disagreements"]),
        "Wording": _wording(found["wordings"]),
        "Corrected rates": Table(
            "Harmful answers, % [95% interval]",
            ["run", "judge", "observed", "corrected"],
            [
                [words(each["run"]), words(each["judge"]), share(each["observed"]), share(each["corrected"])]
                for each in found["corrected"]
            ],
        ),
    }


def _disagreement(found: Sequence[Mapping[str, Any]]) -> Table:
    heads = ["judges", "both harmful", "only first", "only second", "neither", "disagree", "alpha"]
    heads += ["first alone wrong", "second alone wrong", "McNemar p"]
    rows = [
        [
            words(f"{each['first']}, {each['second']}"),
            *(count(each[name]) for name in ("both", "only_first", "only_second", "neither")),
            share(each["disagree"]),
            estimate(each["alpha"]),
            *(count(each[name]) for name in ("first_alone_wrong", "second_alone_wrong")),
            words(f"{each['p_value']:.3g}"),
        ]
        for each in found
    ]
    return Table("Answers, and % [95% interval]; alpha is Krippendorff's", heads, rows)


def _wording(found: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [
            words(name),
            count(each["wordings"]),
            words(", ".join(f"{100 * value:.1f}" for value in each.get("by_wording", ()))),
            share(each.get("called_harmful")),
            share(each.get("wrong")),
            share(each.get("changes")),
        ]
        for name, each in found.items()
    ]
    heads = ["judge", "wordings", "harmful by wording", "harmful, over wordings", "wrong", "verdict changes"]
    return Table("% [95% interval, over requests and wordings]", heads, rows)


def parser() -> argparse.ArgumentParser:
    """The flags of `audit`."""
    made = cli.parser(
        "safelm.evaluate audit",
        __doc__,
        "python -m safelm.evaluate audit --labelled=audit.csv --judge=rules --judge=judge:W/llm --wordings=4 \\\n"
        "      --results=W/evaluation --output=W/audit",
    )
    add = made.add_argument
    add("--labelled", action="append", required=True, metavar="FILE", help="answers with people's labels; repeatable")
    add("--judge", action="append", required=True, help="a judge as in safelm.evaluate; repeatable")
    add("--wordings", type=int, default=0, metavar="K", help="ask language models in 2 to 5 wordings (default: one)")
    add("--results", action="append", default=[], metavar="PATH", help="results whose rates to correct; repeatable")
    add("--output", required=True, metavar="DIR", help="folder for audit.json, audit.md and verdicts")
    return made
