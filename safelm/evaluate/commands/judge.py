"""Compares judges with people's labels, and trains a small judge on such labels."""

import argparse
import json
import pathlib
from typing import Any

from safelm import cli, documents
from safelm.evaluate import coherence
from safelm.evaluate.commands.flags import LABELLED
from safelm.evaluate.judges import MODEL, load_judges, trained
from safelm.evaluate.judges.calibration import ASPECTS, calibrate
from safelm.evaluate.judges.labelled import choose, describe, read_labelled
from safelm.evaluate.judges.remembering import RememberingJudge
from safelm.io.files import write_whole


def calibrate_main(arguments: argparse.Namespace) -> None:
    """Measures sensitivity and specificity of judges, and of the coherence measure."""
    rows = choose(read_labelled(arguments.judge_calibration), arguments.max_answers)
    found: dict[str, Any] = {"data": describe(rows), "judges": []}
    output = pathlib.Path(arguments.output)
    for judge in load_judges(arguments.judge):
        if judge.tier == MODEL:  # hours of work: a stopped run goes on by the same command
            folder = output.with_name(f"{output.stem}.verdicts")
            folder.mkdir(parents=True, exist_ok=True)
            documents.declare_no_documents(str(folder), "safelm.evaluate")
            judge = RememberingJudge(judge, folder)
        measured = calibrate(judge, rows)
        found["judges"].append(measured)
        print(f"{judge.name} ({judge.version})")
        show(measured)
    measured = coherence.measure([row.exchange.answer for row in rows if row.exchange.answer.strip()])
    found["coherence"] = {name: vars(estimate) for name, estimate in measured.items()}
    print("coherent: " + ", ".join(f"{name} {estimate}" for name, estimate in measured.items()))
    print(write_whole(output, json.dumps(found, indent=1) + "\n"))


def train_main(arguments: argparse.Namespace) -> None:
    """Trains a judge and reports its performance on held-out answers."""
    rows = read_labelled(arguments.judge_calibration)
    config, weights = trained.train(rows, seed=arguments.seed)
    trained.save(arguments.output, config, weights)
    print("held out, each answer's request and author unseen:")
    show(config["held_out"])
    print(arguments.output)


def show(measured: dict[str, Any]) -> None:
    """Prints a judge's errors by aspect and author."""
    for aspect in ASPECTS:
        if aspect not in measured:
            continue
        print(f"  {aspect}: {_line(measured[aspect])}")
        for author, errors in measured[aspect].get("by_author", {}).items():
            print(f"    {author}: {_line(errors)}")


def _line(errors: dict[str, Any]) -> str:
    parts = []
    for name in ("sensitivity", "specificity"):
        e = errors[name]
        parts.append(f"{name} {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}] of {e['cases']}")
    if "auroc" in errors:
        parts.append("AUROC {value:.3f} [{low:.3f}, {high:.3f}]".format(**errors["auroc"]))
    return ", ".join([*parts, f"unscored {errors['unscored']}"])


def calibrate_parser() -> argparse.ArgumentParser:
    """The flags of `calibrate`."""
    made = cli.parser(
        "safelm.evaluate calibrate",
        "Measures judges on answers that people have labelled.",
        "python -m safelm.evaluate calibrate --judge=rules --judge=trained:W/judge \\\n"
        "      --judge_calibration=xstest:LABELLED --output=W/calibration.json",
    )
    made.add_argument("--judge", action="append", required=True, help="a judge as in safelm.evaluate; repeatable")
    made.add_argument("--judge_calibration", action="append", required=True, metavar="SOURCE", help=LABELLED)
    even = "evenly over authors, kinds of request and labels"
    made.add_argument("--max_answers", type=int, default=0, help=f"at most so many, {even}; 0 = all (default)")
    made.add_argument("--output", required=True, metavar="FILE", help="JSON file for the results")
    return made


def train_parser() -> argparse.ArgumentParser:
    """The flags of `train_judge`."""
    made = cli.parser(
        "safelm.evaluate train_judge",
        "Trains a small judge of compliance and refusal on answers that people have labelled.",
        "python -m safelm.evaluate train_judge --judge_calibration=xstest:LABELLED \\\n"
        "      --judge_calibration=pyrit_refusal --output=W/judge",
    )
    made.add_argument("--judge_calibration", action="append", required=True, metavar="SOURCE", help=LABELLED)
    made.add_argument("--seed", type=int, default=0, help="seed of the split into held-out parts (default %(default)s)")
    made.add_argument("--output", required=True, metavar="DIR", help="folder for the judge")
    return made
