"""Measures checkpoints on a suite of held-out prompts: harmful completions, over-refusal, perplexity, P(tag).

Every rate comes with its 95% interval. Results go to <output>/results.json, results.md and results.png, and each
(checkpoint, method) to <output>/runs/ as soon as it is done: running the same command again continues.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from safelm import checkpoint as checkpoint_lib
from safelm import cli
from safelm.data.store import TokenStore
from safelm.evaluation import judge as judge_lib
from safelm.evaluation.protocol import Protocol, hash_params
from safelm.evaluation.report import format_table, table_rows, write_report
from safelm.evaluation.runs import METHODS, Checkpoint, measure_decoding, measure_model, resume
from safelm.evaluation.suite import SUITES, Prompt, as_requests, hash_prompts, read_prompts
from safelm.evaluation.template import CHAT, KINDS, Template
from safelm.inference.methods import Method

# Words per token of the vocabularies here; the judge's own accuracy is measured on about as many words as it judges.
_WORDS_PER_TOKEN = 0.77


def main(arguments: argparse.Namespace) -> None:
    """Evaluates every checkpoint with every method and reports."""
    folders, methods = parse_checkpoints(arguments.checkpoint), parse_methods(arguments.methods)
    skip = parse_skip(arguments.skip, folders, methods)
    template = Template(arguments.template, arguments.system)
    prompts = read_prompts(arguments.prompts, max_prompts=arguments.max_prompts)
    prompts = as_requests(prompts) if template.kind == CHAT else prompts
    runs_folder = pathlib.Path(arguments.output) / "runs"
    results: dict[str, Any] = {
        "suite": arguments.suite,
        "num_prompts": {
            "harmful": sum(prompt.harmful for prompt in prompts),
            "safe": sum(not prompt.harmful for prompt in prompts),
        },
        "max_new_tokens": arguments.max_new_tokens,
        "judge": judge_accuracy(arguments.max_new_tokens),
        "models": {},
        "runs": [],
    }
    with tqdm(total=len(folders) * (len(methods) + 1) - len(skip), unit="run", disable=None) as progress:
        for name, folder in folders.items():
            checkpoint = Checkpoint(name, *checkpoint_lib.load_for_inference(folder))
            store = open_validation(arguments.validation, checkpoint)
            base = _protocol(arguments, checkpoint, prompts, store)
            progress.set_description(f"{name}: P(tag), perplexity")
            results["models"][name] = resume(
                runs_folder / f"{name}.model.json",
                base,
                lambda c=checkpoint, s=store: measure_model(c, prompts, s, template),
            )
            progress.update()
            for method_name, method in methods.items():
                if (name, method_name) in skip:
                    continue
                progress.set_description(f"{name}: {method_name}")
                run = _decode(arguments, runs_folder, checkpoint, method_name, method, prompts, base, template)
                results["runs"].append({"checkpoint": name, "method": method_name, **run})
                progress.update()
    paths = write_report(arguments.output, _without_answers(results))
    print(format_table(table_rows(results)))
    print("\n".join(str(path) for path in paths))


def _decode(
    arguments: argparse.Namespace,
    runs_folder: pathlib.Path,
    checkpoint: Checkpoint,
    method_name: str,
    method: Method,
    prompts: Sequence[Prompt],
    base: Protocol,
    template: Template,
) -> dict[str, Any]:
    settings = dataclasses.asdict(method) | {"keep_texts": arguments.show_texts}
    protocol = dataclasses.replace(base, method=method_name, method_settings=settings)
    run = resume(
        runs_folder / f"{checkpoint.name}.{method_name}.json",
        protocol,
        lambda: measure_decoding(
            checkpoint,
            method,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
            template=template,
            keep_texts=arguments.show_texts,
        ),
    )
    if arguments.show_texts:
        for answer in run["answers"]:
            print(f"\n[{checkpoint.name}, {method_name}, {answer['id']}: {answer['label']}]\n{answer['prompt']}")
            print(f"    >>> {answer['continuation']}")
    return run


def parse_checkpoints(flags: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` flags as a dict. Raises ValueError for another form or a name given twice."""
    folders: dict[str, str] = {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        if not (equals and folder and name.replace("-", "").replace("_", "").isalnum()):
            raise ValueError(f"--checkpoint={flag}: want NAME=DIR with a name of letters, digits, - and _")
        if name in folders:
            raise ValueError(f"--checkpoint={flag}: the name {name} is given twice")
        folders[name] = folder
    return folders


def parse_methods(flag: str) -> Mapping[str, Method]:
    """Names with commas between them as methods with their default settings. Raises ValueError for an unknown name."""
    names = [name.strip() for name in flag.split(",")]
    unknown = next((name for name in names if name not in METHODS), None)
    if unknown is not None:
        raise ValueError(f"--methods={flag}: unknown method {unknown!r}, one of {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}


def parse_skip(flags: Sequence[str], folders: Mapping[str, str], methods: Mapping[str, Method]) -> set[tuple[str, str]]:
    """`NAME:METHOD` flags as pairs. Raises ValueError for a pair that would not be run anyway."""
    pairs = set()
    for flag in flags:
        name, _, method = flag.partition(":")
        if name not in folders or method not in methods:
            raise ValueError(f"--skip={flag}: want NAME:METHOD of a --checkpoint and one of --methods")
        pairs.add((name, method))
    return pairs


def open_validation(path: str, checkpoint: Checkpoint) -> TokenStore | None:
    """The token store of held-out safe text; it must have been made with the checkpoint's vocabulary."""
    return TokenStore.open(path, vocab_hash=checkpoint.tokenizer.hash) if path else None


def judge_accuracy(max_new_tokens: int) -> dict[str, Any]:
    """The judge's sensitivity and specificity on held-out documents of known label, as a dict."""
    accuracy = judge_lib.measure_judge(num_words=max(8, round(_WORDS_PER_TOKEN * max_new_tokens)))
    return {"version": judge_lib.JUDGE_VERSION, **dataclasses.asdict(accuracy)}


def _protocol(
    arguments: argparse.Namespace, checkpoint: Checkpoint, prompts: Sequence[Prompt], store: TokenStore | None
) -> Protocol:
    validation = ""
    if store:
        shards = json.dumps([dataclasses.asdict(shard) for shard in store.manifest.shards], sort_keys=True)
        validation = f"{store.manifest.task}/{store.manifest.split} {hashlib.sha256(shards.encode()).hexdigest()}"
    return Protocol(
        suite=arguments.suite,
        prompts_sha256=hash_prompts(prompts),
        num_prompts=len(prompts),
        judge_version=judge_lib.JUDGE_VERSION,
        checkpoint_sha256=hash_params(checkpoint.params),
        vocab_hash=checkpoint.tokenizer.hash,
        validation=validation,
        method="",
        method_settings={},
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        template=template_name(arguments),
    )


def template_name(arguments: argparse.Namespace) -> str:
    """The template as a protocol names it."""
    template = Template(arguments.template, arguments.system)
    return f"{template.kind} {template.hash[:12]}"


def _without_answers(results: Mapping[str, Any]) -> dict[str, Any]:
    runs = [{key: value for key, value in run.items() if key != "answers"} for run in results["runs"]]
    return {**results, "runs": runs}


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "safelm.evaluate",
        __doc__,
        "python -m safelm.evaluate --checkpoint=raw=W/raw --checkpoint=safety=W/safety --prompts=W/corpus/prompts \\\n"
        "      --validation=W/tokens/filtered_web/validation --methods=greedy,safe_beam --output=W/evaluation",
    )
    parser.add_argument("--checkpoint", action="append", required=True, metavar="NAME=DIR", help="a model; repeatable")
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0])
    parser.add_argument("--prompts", required=True, metavar="DIR", help="folder with harmful.jsonl and safe.jsonl")
    parser.add_argument(
        "--validation", default="", metavar="DIR", help="token store of held-out safe text (perplexity)"
    )
    parser.add_argument("--template", choices=KINDS, default=KINDS[0], help="a text to continue, or a chat (ChatML)")
    parser.add_argument("--system", default="", help="system message of a chat (default: none)")
    parser.add_argument("--methods", default="greedy,safe_beam", help=f"of {', '.join(METHODS)} (default %(default)s)")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME:METHOD", help="leave this pair out")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="per prompt (default %(default)s)")
    parser.add_argument("--max_prompts", type=int, default=0, help="harmful and safe each; 0 = all (default)")
    parser.add_argument("--seed", type=int, default=0, help="of methods that sample (default %(default)s)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for results and resumable runs")
    parser.add_argument("--show_texts", action="store_true", help="print and store texts, not only ids and labels")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
