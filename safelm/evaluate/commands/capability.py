"""Runs the paper's nine capability tasks on local files through lm-evaluation-harness; prints a table with intervals.

A finished task is kept under <output>/runs, and the same command continues with the next one.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

from safelm import cli
from safelm.evaluate.capability import documents
from safelm.evaluate.capability.suite import TASKS, CapabilityOptions, merge, run_capability, task_protocol
from safelm.evaluate.capability.table import capability_table
from safelm.evaluate.protocol import hash_params
from safelm.formats import sources
from safelm.io import hub, records
from safelm.io.files import write_whole
from safelm.io.progress import Bar
from safelm.text import named_templates


def capability_main(arguments: argparse.Namespace) -> None:
    """Runs every task on every checkpoint; writes capability.json and capability.md."""
    folders, options = cli.checkpoints(arguments.checkpoint), options_from(arguments)
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: scripts/install.sh eval")
    for task in options.tasks:
        documents.find(task, options.data)  # what is missing shows before any model is loaded
    output = pathlib.Path(arguments.output)
    results = {}
    with Bar(total=len(folders) * len(options.tasks), unit="task", disable=None) as progress:
        for name, folder in folders.items():
            source = hub.pinned(folder)
            config, params, tokenizer = sources.read_model(source, chat_template=arguments.chat_template)
            subject = {"checkpoint": hash_params(params), "vocabulary": tokenizer.hash, "dtype": config.dtype}
            subject |= {"chat_template": tokenizer.chat_template_hash} if options.chat else {}
            found = []
            for task in options.tasks:
                progress.set_description(f"{name}: {task}")
                chosen = dataclasses.replace(options, tasks=(task,))
                key = records.fingerprint([subject, task_protocol(chosen)])
                path = output / "runs" / f"{name}.capability.{task}.{key[:12]}.json"
                if not path.is_file():
                    _write(path, run_capability(config, params, tokenizer, chosen))
                found.append(records.read(path, "remove it, and the task is measured again"))
                progress.update()
            subject |= {"source": source} if hub.is_name(source) else {}
            results[name] = merge(found) | {"subject": subject}
    _write(output / "capability.json", results)
    table = capability_table(results)
    write_whole(output / "capability.md", f"# Capability\n\n{table.markdown()}\n\n{_NOTE}\n")
    print(table.plain())
    print(f"{output / 'capability.json'}\n{output / 'capability.md'}")


_NOTE = """Percent with Wilson 95% intervals; the average over tasks with a normal one from the tasks' variances.
ARC, OpenBookQA and PIQA by length-normalised likelihood, CommonsenseQA, WinoGrande and MMLU by likelihood, zero-shot;
TriviaQA and GSM8K (few-shot, last number) by greedy generation."""


def options_from(arguments: argparse.Namespace) -> CapabilityOptions:
    """The options that the flags set. Raises ValueError for an unknown task."""
    return CapabilityOptions(
        data=tuple(folder for flag in arguments.data for folder in flag.split(",") if folder),
        tasks=tuple(name for name in arguments.tasks.split(",") if name),
        max_items=arguments.max_items,
        num_fewshot=arguments.num_fewshot,
        max_gen_toks=arguments.max_gen_toks,
        chat=arguments.chat,
    )


def _write(path: pathlib.Path, values: Any) -> None:
    write_whole(path, json.dumps(values, indent=1) + "\n")


def capability_parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "safelm.evaluate capability",
        __doc__,
        "python -m safelm.evaluate capability --checkpoint=raw=W/raw --checkpoint=safety=W/safety \\\n"
        "      --data=BENCHMARKS --output=W/capability",
    )
    parser.add_argument(
        "--checkpoint", action="append", required=True, metavar=cli.CHECKPOINT, help="a model; repeatable"
    )
    parser.add_argument(
        "--data", action="append", required=True, metavar="DIR", help="folder with json files; repeatable"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="default %(default)s")
    parser.add_argument(
        "--max_items", type=int, default=0, help="items per task, drawn with a fixed seed; 0 = all (default)"
    )
    parser.add_argument("--num_fewshot", type=int, default=5, help="examples for GSM8K (default %(default)s)")
    parser.add_argument(
        "--max_gen_toks", type=int, default=0, help="most tokens per answer; 0 = the task's own (default)"
    )
    parser.add_argument("--chat", action="store_true", help="put prompts in the chat template")
    parser.add_argument("--chat_template", default="", metavar="NAME|FILE", help=named_templates.HELP)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for results and resumable runs")
    return parser
