"""Compares monitors of a model at equal cost: P(tag), linear probes, token heads, header re-insertion.

A monitor gives every token a level from 0 to 1. Measured are, with 95% intervals: AUROC of the level after a prompt
(prompts that ask for harm against others), of an answer's highest level and of every token (harmful answers against
safe chats), how many harmful answers set off the alarm and how late, how many safe chats do, and what a token costs.
Everything that is chosen (probes, their layers, alarm thresholds) is chosen on development cases.

What is read:

    --prompts=DIR        prompts of the synthetic web, answered by --answers_by (the model itself unless named) and
                         judged by its word lists; development prompts are the generator's, or --development=DIR
    --labelled=FILE      answers that people labelled, in the columns of safelm.evaluate audit, with
                         --development=FILE of others
    --data=NAME:PATH     a benchmark's prompts, which have no answers: AUROC after prompts only, with
                         --development=NAME:PATH of others

--monitor=[NAME=]WHAT, repeatable: tag, refusal[?header=TEXT&words=A|B] (P(refusal) behind the re-inserted header of the
assistant), a linear head's folder (train_classifier --unit=token, or of this command), or one trained here: probe, and
header_probe[?header=TEXT], a probe at the re-inserted header. ?every=8 re-inserts it behind every eighth token only.

    OUTPUT/monitors.json, monitors.md   figures, costs, thresholds; no text
    OUTPUT/NAME/                        every head trained here, for --monitor in other commands
    OUTPUT/runs/                        answers as token ids: a stopped run goes on
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import cli, documents
from safelm.evaluate.answers import Checkpoint
from safelm.evaluate.monitors import cases as case_lib
from safelm.evaluate.monitors import measures, probes
from safelm.evaluate.monitors.cases import Case
from safelm.evaluate.protocol import hash_params
from safelm.evaluate.suites.suite import as_requests, choose, read_prompts
from safelm.evaluate.template import CHAT, KINDS, TEXT, Template
from safelm.formats import sources
from safelm.inference.monitors import Monitor
from safelm.io import hub, records
from safelm.io.files import write_whole
from safelm.io.progress import Bar
from safelm.report.table import Table, amount, count, estimate, share, words
from safelm.safety import monitors as saved
from safelm.safety import spec as specs
from safelm.safety.monitors.loading import HELP, header_ids, parse_monitors

PROBE, HEADER_PROBE = TRAINED = ("probe", "header_probe")
_NEW_TOKENS = 48


def main(arguments: argparse.Namespace) -> None:
    """Reads the cases, trains what is to be trained, measures, and writes the report."""
    asked = parse_monitors(arguments.monitor, usual=("tag", PROBE))
    sources_given = [name for name in ("prompts", "labelled", "data") if getattr(arguments, name)]
    if len(sources_given) != 1:
        raise ValueError("want one of --prompts, --labelled and --data")
    if not 0 <= arguments.false_alarms < 1:
        raise ValueError(f"--false_alarms={arguments.false_alarms}: must be a share of at least 0 and below 1")
    name, folder = cli.checkpoint(arguments.checkpoint)
    lm = _load(name, folder)
    output = pathlib.Path(arguments.output)
    (output / "runs").mkdir(parents=True, exist_ok=True)
    documents.declare_no_documents(str(output / "runs"), "safelm.evaluate")
    # Those that need no training are loaded before anything is answered: a name that is wrong shows at once.
    given = {key: saved.load_monitor(spec, lm, name=key) for key, spec in asked.items() if not _is_trained(spec)}
    development, test = read_cases(arguments, lm, output / "runs")
    parts = probes.halves(development)
    loaded = {key: given.get(key) or _monitor(key, spec, lm, parts, folder, output) for key, spec in asked.items()}
    found: dict[str, Any] = _describe(arguments, lm, parts, test) | {"monitors": {}}
    for key, monitor in Bar(loaded.items(), unit="monitor", disable=None):
        found["monitors"][key] = _measure(lm, monitor, parts, test, arguments.false_alarms)
    _write(output, found)


def _load(name: str, folder: str) -> Checkpoint:
    return Checkpoint(*sources.read_model(hub.pinned(folder)), name)


def read_cases(arguments: argparse.Namespace, lm: Checkpoint, folder: pathlib.Path) -> tuple[list[Case], list[Case]]:
    """(development, test) cases. Raises ValueError where one case is in both, and the errors of reading."""
    template = Template(arguments.template or (CHAT if arguments.labelled or arguments.data else TEXT))
    most, new_tokens, given = arguments.max_prompts, arguments.max_new_tokens, arguments.development
    if arguments.prompts:
        own = read_prompts(arguments.prompts)
        test_prompts = choose(as_requests(own) if template.kind == CHAT else own, most)
        prompts = case_lib.development_prompts(given[0] if given else "", template, most), test_prompts
        writers = [_load(*cli.checkpoint(flag)) for flag in arguments.answers_by] or [lm]
        of_answers = {"max_new_tokens": new_tokens, "batch_size": arguments.batch_size}
        parts = [case_lib.answered(each, writers, lm.tokenizer, template, folder, **of_answers) for each in prompts]
    elif not given:
        raise ValueError("--development: needed with --labelled and --data, for thresholds and probes")
    elif arguments.labelled:
        sizes = {"max_new_tokens": new_tokens, "max_tokens": lm.config.max_seq_len}
        parts = [case_lib.labelled(each, lm.tokenizer, template, **sizes) for each in (given, arguments.labelled)]
    else:
        both = [case_lib.benchmark_prompts(each, most) for each in (given, arguments.data)]
        parts = [case_lib.prompts_alone(each, lm.tokenizer, template) for each in both]
    development, test = parts
    if shared := {case.prompt_ids for case in development} & {case.prompt_ids for case in test}:
        raise ValueError(f"--development: {len(shared)} of its prompts are among those that are measured")
    if not test:
        raise ValueError("no cases to measure on")
    return development, test


def _is_trained(spec: str) -> bool:
    return spec.partition("?")[0] in TRAINED


def _monitor(key: str, spec: str, lm: Checkpoint, parts: probes.Halves, source: str, output: pathlib.Path) -> Monitor:
    """A monitor that is trained and saved, or read from OUTPUT where it was."""
    place, _, query = spec.partition("?")
    options = specs.options(query, what="monitor")
    every, header = options.pop("every", 1), str(options.pop("header", ""))
    if options or (place == PROBE and query):
        raise ValueError(f"--monitor={spec}: no option {min(options, default=query)!r} here")
    ids = header_ids(lm.tokenizer, header) if place == HEADER_PROBE else ()
    folder = output / key
    facts = records.fingerprint([[dataclasses.astuple(c) for c in (*parts.train, *parts.chosen_on)], ids])
    if (folder / "config.json").is_file():
        head = saved.read_head(str(folder))
        if head.training.get("cases_sha256") != facts:
            raise ValueError(f"{folder}: trained on other development cases or another header: remove it, or rename it")
    else:
        head = probes.train_probe(lm, parts, source=source, header_ids=ids)
        head = dataclasses.replace(head, training={**head.training, "cases_sha256": facts})
        saved.save_head(str(folder), head)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"--monitor={spec}: every={every!r}: must be a number of tokens, at least 1")
    return saved.load_monitor(f"{folder}?every={every}", lm, name=key)


def _measure(
    lm: Checkpoint, monitor: Monitor, parts: probes.Halves, test: Sequence[Case], false_alarms: float
) -> dict[str, Any]:
    threshold = None
    if any(case.is_safe_chat for case in parts.chosen_on):
        threshold = measures.alarm_threshold(parts.chosen_on, measures.read(lm, monitor, parts.chosen_on), false_alarms)
    figures = measures.measure(test, measures.read(lm, monitor, test), threshold)
    return {
        "fingerprint": monitor.fingerprint,
        "layer": monitor.layer,
        "header_tokens": len(monitor.header_ids),
        "every": monitor.every,
        "threshold": threshold,
        "cost": measures.cost(lm, monitor, test),
        **figures,
    }


def _describe(
    arguments: argparse.Namespace, lm: Checkpoint, parts: probes.Halves, test: Sequence[Case]
) -> dict[str, Any]:
    return {
        "checkpoint": lm.name,
        "checkpoint_sha256": hash_params(lm.params),
        "vocab_hash": lm.tokenizer.hash,
        "false_alarms": arguments.false_alarms,
        "max_new_tokens": arguments.max_new_tokens,
        "test_sha256": records.fingerprint([dataclasses.astuple(case) for case in test]),
        "cases": {
            name: {
                "harmful_answers": sum(case.answers_harm is True for case in of),
                "safe_chats": sum(case.is_safe_chat for case in of),
                "declined": sum(case.answers_harm is False and not case.is_safe_chat for case in of),
                "prompts": len({case.prompt_ids for case in of}),
            }
            for name, of in (("train", parts.train), ("development", parts.chosen_on), ("test", test))
        },
    }


def _write(output: pathlib.Path, found: Mapping[str, Any]) -> None:
    tables = _tables(found)
    head = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in found["cases"]["test"].items())
    print("\n\n".join(f"{title}\n{table.plain()}" for title, table in tables.items()))
    parts = ["# Monitors", f"{found['checkpoint']}, measured on {head}."]
    parts += [f"## {title}\n\n{table.caption}\n\n{table.markdown()}" for title, table in tables.items()]
    print(write_whole(output / "monitors.json", json.dumps(found, indent=1) + "\n"))
    print(write_whole(output / "monitors.md", "\n\n".join(parts) + "\n"))


def _tables(found: Mapping[str, Any]) -> dict[str, Table]:
    rows, costs = [], []
    for name, of in found["monitors"].items():
        areas = [estimate(of.get(f"{what}_auroc"), 3) for what in ("prompt", "answer", "token")]
        rates = [share(of.get(what)) for what in ("detected", "false_alarms", "alarms_on_declined")]
        rows.append([words(name), *areas, *rates, estimate(of.get("delay"), 1)])
        paid = of["cost"]
        where = "logits" if of["layer"] is None else f"layer {of['layer']}"
        costs.append(
            [
                words(name),
                words(where + (f", header of {of['header_tokens']}" if of["header_tokens"] else "")),
                count(of["every"]),
                *(words(f"{100 * paid[what]:.2f}") for what in ("extra_share", "reading_share")),
                amount(round(paid["microseconds"], 2)),
                words("" if of["threshold"] is None else f"{of['threshold']:.4g}"),
            ]
        )
    heads = ["monitor", "prompts", "answers", "tokens", "detected", "false alarms", "alarms on declined", "delay"]
    allowed = f"{100 * found['false_alarms']:g}% of development's safe chats set off an alarm"
    return {
        "What they tell": Table(
            f"AUROC; % of answers with an alarm, whose threshold lets at most {allowed}; delay in tokens over detected "
            "ones [95% interval]",
            heads,
            rows,
        ),
        "What they cost": Table(
            "FLOPs of a token, % of a forward of the model: beside decoding, and to read a given text; processor time "
            "of reading, microseconds a token",
            ["monitor", "reads", "every", "beside decoding, %", "reading, %", "us a token", "threshold"],
            costs,
        ),
    }


def parser() -> argparse.ArgumentParser:
    """The flags of `monitors`."""
    made = cli.parser(
        "safelm.evaluate monitors",
        __doc__,
        "python -m safelm.evaluate monitors --checkpoint=safety=W/safety --prompts=W/corpus/prompts \\\n"
        "      --answers_by=W/raw --answers_by=W/safety --monitor=tag --monitor=probe --monitor=W/token_head \\\n"
        "      --output=W/monitors",
    )
    add = made.add_argument
    add("--checkpoint", required=True, metavar=cli.CHECKPOINT, help="the model whose states are read")
    add(
        "--monitor",
        action="append",
        default=[],
        metavar="[NAME=]WHAT",
        help=f"{HELP}, probe, header_probe; repeatable (default: tag and probe)",
    )
    add("--output", required=True, metavar="DIR", help="folder for the report, trained heads and answers")
    add("--prompts", default="", metavar="DIR", help="prompts of the synthetic web, harmful.jsonl and safe.jsonl")
    add(
        "--answers_by",
        action="append",
        default=[],
        metavar=cli.CHECKPOINT,
        help="of --prompts: a model that answers them greedily; repeatable (default: the model itself)",
    )
    add("--labelled", action="append", default=[], metavar="FILE", help="labelled answers; repeatable")
    add("--data", action="append", default=[], metavar="NAME:PATH", help="prompts of a benchmark; repeatable")
    add(
        "--development",
        action="append",
        default=[],
        metavar="WHAT",
        help="other cases of the same kind, on which everything is chosen",
    )
    add(
        "--false_alarms",
        type=float,
        default=0.05,
        help="share of development's safe chats that may set off an alarm (default %(default)s)",
    )
    add("--template", choices=KINDS, default="", help="text to continue, or a chat (default: text with --prompts)")
    add("--max_prompts", type=int, default=0, help="most harmful and most safe prompts; 0 = all (default)")
    add(
        "--max_new_tokens",
        type=int,
        default=_NEW_TOKENS,
        help="tokens of an answer (default %(default)s)",
    )
    add("--batch_size", type=int, default=32, help="prompts answered at once (default %(default)s)")
    return made
