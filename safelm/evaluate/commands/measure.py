"""Measures checkpoints on a suite of prompts: harmful answers, over-refusal, and measures that need no decoding.

Every rate has its 95% interval. Results go to <output>/results.json with a table and figures beside it. Each finished
(checkpoint, method) goes to <output>/runs/ and each answer to a journal there, so the same command continues with the
next prompt. `safelm.evaluate report` compares any number of results, `safelm.evaluate calibrate` measures judges on
people's labels, `safelm.evaluate audit` does so by kind of answer and by wording, `safelm.evaluate train_judge` trains
one, `safelm.evaluate monitors` compares what watches every token, `safelm.evaluate capability` runs the paper's nine
capability tasks.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import cli, documents
from safelm.data.store import TokenStore
from safelm.evaluate import coherence, likelihood, runs
from safelm.evaluate.answers import Answer, Checkpoint, check_tag, collect
from safelm.evaluate.commands import audit as evaluate_audit
from safelm.evaluate.commands import capability as evaluate_capability
from safelm.evaluate.commands import flags as evaluate_flags
from safelm.evaluate.commands import hazards
from safelm.evaluate.commands import judge as evaluate_judge
from safelm.evaluate.commands import monitors as evaluate_monitors
from safelm.evaluate.commands import report as evaluate_report
from safelm.evaluate.commands.asked import Asked, read_asked, read_protocol
from safelm.evaluate.commands.flags import check_samples, parse_methods, parse_skip
from safelm.evaluate.judges import MODEL, RULES, Judge, load_judges
from safelm.evaluate.judges import word_lists as synthetic_judge
from safelm.evaluate.judges.calibration import calibrate
from safelm.evaluate.judges.labelled import choose, read_labelled
from safelm.evaluate.judges.remembering import RememberingJudge
from safelm.evaluate.outcomes import Perplexity
from safelm.evaluate.protocol import Protocol, hash_params
from safelm.evaluate.published import Published
from safelm.evaluate.report import results_table, write_report
from safelm.evaluate.suites.suite import SYNTHETIC, hash_prompts
from safelm.evaluate.template import CHAT
from safelm.formats import sources
from safelm.inference.methods import Method, SafeBeam, described
from safelm.inference.monitors import Monitor
from safelm.io import hub, records
from safelm.io.files import write_whole
from safelm.io.progress import Bar
from safelm.safety.monitors.loading import load_monitor, parse_monitors

log = logging.getLogger(__name__)

# Words per token of the vocabularies here; the judge's own accuracy is measured on about as many words as it judges.
_WORDS_PER_TOKEN = 0.77
_MONITORED = "safe_beam_"  # what a method by a monitor is called, with the monitor's name


@dataclasses.dataclass(frozen=True)
class Bench:
    """Everything that all checkpoints and methods share."""

    arguments: argparse.Namespace
    asked: Asked
    judges: Sequence[Judge]
    calibrations: Mapping[str, Mapping[str, Any]]
    reference: Checkpoint | None
    published: Published | None = None

    @property
    def is_synthetic(self) -> bool:
        return self.arguments.suite == SYNTHETIC

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.arguments.output) / "runs"

    @functools.cached_property
    def perplexity(self) -> Perplexity | None:
        return functools.partial(likelihood.perplexities, self.reference) if self.reference else None

    @functools.cached_property
    def coherence_version(self) -> str:
        if self.is_synthetic:
            return ""
        return f"{coherence.VERSION}, {hash_params(self.reference.params)[:12] if self.reference else 'text alone'}"


def main(arguments: argparse.Namespace) -> None:
    """Evaluates every checkpoint with every method and writes the report."""
    folders = cli.checkpoints(arguments.checkpoint)
    protocol = read_protocol(arguments)
    hazards.check_reference(arguments.grade_against, folders, protocol)
    methods = {} if arguments.likelihood_only else parse_methods(arguments.methods, arguments.tag_candidate)
    monitors = {} if arguments.likelihood_only else parse_monitors(arguments.monitor)
    names = [*methods, *(f"{_MONITORED}{key}" for key in monitors)]
    check_samples(arguments.samples, methods | {name: SafeBeam() for name in names if name not in methods})
    skip = parse_skip(arguments.skip, folders, names)
    bench = _open_bench(arguments, protocol)
    results = _describe(bench) | {"models": {}, "runs": []}
    with Bar(total=len(folders) * (len(names) + 1) - len(skip), unit="run", disable=None) as progress:
        for name, folder in folders.items():
            source = hub.pinned(folder)
            checkpoint = _load(source, name, bench)
            for method in methods.values():
                check_tag(checkpoint, method)
            store = open_validation(arguments.validation, checkpoint)
            base = _protocol(bench, checkpoint, store)
            progress.set_description(f"{name}: P(tag), perplexity")
            seen = {"saw_tag": sources.saw_tag(source)} | ({"source": source} if hub.is_name(source) else {})
            results["models"][name] = _measure_model(bench, checkpoint, store, base) | seen
            progress.update()
            own = dict(methods)
            for key, spec in monitors.items():
                if (name, f"{_MONITORED}{key}") not in skip:
                    own[f"{_MONITORED}{key}"] = _monitored(load_monitor(spec, checkpoint, name=key), arguments)
            for method_name, method in own.items():
                if (name, method_name) in skip:
                    continue
                progress.set_description(f"{name}: {method_name}")
                run = _measure_method(bench, checkpoint, method_name, method, base)
                results["runs"].append({"checkpoint": name, "method": method_name, **run})
                progress.update()
    if protocol is not None and protocol.name == hazards.NAME and results["runs"]:
        print(hazards.add(results, arguments.grade_against).plain())
    _report(bench, results)


def _monitored(monitor: Monitor, arguments: argparse.Namespace) -> SafeBeam:
    stops = arguments.tag_candidate or "mask"
    return SafeBeam(monitor=monitor, drop_above=arguments.drop_above, tag_candidate=stops)


def _load(source: str, name: str, bench: Bench) -> Checkpoint:
    config, params, tokenizer = sources.read_model(source, chat_template=bench.arguments.chat_template)
    names = cli.checkpoints(bench.arguments.checkpoint)
    banned = evaluate_flags.banned_ids(bench.arguments.banned_tokens, name, names, tokenizer)
    config = dataclasses.replace(config, banned_ids=banned)
    kwargs = json.loads(bench.asked.template.kwargs or "{}")
    knob = evaluate_flags.knob(bench.arguments.knob, name, names)
    return Checkpoint(config, params, tokenizer.with_template_kwargs(kwargs), name, knob)


def _open_bench(arguments: argparse.Namespace, protocol: Published | None) -> Bench:
    """Reads prompts, judges and labels before any model, so that wrong flags show at once."""
    for flag, least in (("max_prompts", 0), ("target_words", 0), ("calibration_answers", 0), ("batch_size", 1)):
        if (value := getattr(arguments, flag)) < least:
            raise ValueError(f"--{flag}={value}: must be at least {least}")
    if not 0 <= arguments.drop_above <= 1:
        raise ValueError(f"--drop_above={arguments.drop_above}: must be from 0 to 1")
    asked = read_asked(arguments)
    arguments.judge = [hub.pinned_in(spec) for spec in arguments.judge]
    judges = [] if arguments.suite == SYNTHETIC else _load_judges(arguments.judge, protocol)
    if arguments.suite != SYNTHETIC and not arguments.likelihood_only:
        _check_judges(arguments, asked, judges)
    rows = read_labelled(arguments.judge_calibration) if arguments.judge_calibration else []
    rows = choose(rows, arguments.calibration_answers)
    folder = pathlib.Path(arguments.output) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    documents.declare_no_documents(str(folder), "safelm.evaluate")
    judges = [RememberingJudge(judge, folder) if judge.tier == MODEL else judge for judge in judges]
    calibrations = {judge.name: calibrate(judge, rows) for judge in judges} if rows else {}
    reference = None
    if arguments.coherence_reference:
        reference = Checkpoint(*sources.read_model(arguments.coherence_reference), "reference")
    return Bench(arguments, asked, judges, calibrations, reference, protocol)


def _load_judges(specs: Sequence[str], protocol: Published | None) -> list[Judge]:
    """The judges, asked as the protocol has it; our own engine reads as much of an answer as the protocol says."""
    if protocol is None:
        return load_judges(specs)
    return load_judges(specs, ask=protocol.ask, answer_tokens=protocol.answer_tokens)


def _check_judges(arguments: argparse.Namespace, asked: Asked, judges: Sequence[Judge]) -> None:
    if not judges:
        raise ValueError(f"--suite={arguments.suite}: no judge; name one by --judge={RULES} and better a second one")
    if any(not prompt.harmful for prompt in asked.prompts) and not any(judge.judges_manner for judge in judges):
        raise ValueError(
            f"--judge={', '.join(arguments.judge)}: none can tell refusals of safe prompts; add rules, trained:, "
            "judge: or endpoint:"
        )
    if all(judge.tier == RULES for judge in judges):
        log.warning("judged by refusal wordings alone: the report has no headline rate")


def _describe(bench: Bench) -> dict[str, Any]:
    prompts = bench.asked.prompts
    benchmarks = sorted({name for prompt in prompts for name in prompt.benchmarks})
    headline = next((judge.name for judge in bench.judges if judge.tier != RULES), "")
    manner = next((judge.name for judge in bench.judges if judge.tier != RULES and judge.judges_manner), "")
    return {
        "suite": bench.published.name if bench.published else bench.arguments.suite,
        "num_prompts": {
            "harmful": sum(prompt.harmful for prompt in prompts),
            "safe": sum(not prompt.harmful for prompt in prompts),
        },
        "benchmarks": {name: sum(name in prompt.benchmarks for prompt in prompts) for name in benchmarks},
        "duplicates_dropped": bench.asked.dropped,
        "max_new_tokens": bench.asked.max_new_tokens,
        "template": dataclasses.asdict(bench.asked.template),
        "judge": judge_accuracy(bench.asked.max_new_tokens) if bench.is_synthetic else {},
        "judges": [
            {
                "name": judge.name,
                "tier": judge.tier,
                "version": judge.version,
                "calibration": bench.calibrations.get(judge.name),
            }
            for judge in bench.judges
        ],
        "headline": {
            "attack_success": runs.SYNTHETIC_JUDGE if bench.is_synthetic else headline,
            "over_refusal": runs.SYNTHETIC_JUDGE if bench.is_synthetic else manner,
        },
    }


def _measure_model(bench: Bench, checkpoint: Checkpoint, store: TokenStore | None, base: Protocol) -> dict[str, Any]:
    return runs.resume(
        bench.folder / f"{checkpoint.name}.model.json",
        base,
        lambda: runs.measure_model(
            checkpoint, bench.asked.prompts, store, bench.asked.template, with_probe=not bench.is_synthetic
        ),
    )


def _measure_method(
    bench: Bench, checkpoint: Checkpoint, method_name: str, method: Method, base: Protocol
) -> dict[str, Any]:
    settings = described(method)
    if banned := checkpoint.config.banned_ids:
        settings["banned_tokens"] = [checkpoint.tokenizer.special_token(token) for token in banned]
    if checkpoint.knob is not None:
        settings["knob"] = checkpoint.knob.settings
        size, asked = checkpoint.config.num_params, bench.asked
        is_chat = asked.template.kind == CHAT
        for line in checkpoint.knob.beyond_calibration(size, method_name, asked.max_new_tokens, is_chat=is_chat):
            log.warning("--knob=%s", line)
    protocol = dataclasses.replace(base, method=method_name, method_settings=settings)
    prefix = f"{checkpoint.name}.{method_name}"

    def answer() -> list[Answer]:
        return collect(
            checkpoint,
            method,
            bench.asked.prompts,
            bench.folder / f"{prefix}.{protocol.decoding_hash[:12]}.answers.jsonl",
            template=bench.asked.template,
            max_new_tokens=bench.asked.max_new_tokens,
            seed=bench.arguments.seed,
            batch_size=bench.arguments.batch_size,
            description=prefix,
        )

    def measure() -> dict[str, Any]:
        if bench.is_synthetic:
            return runs.judge_synthetic(answer())
        return runs.judge_answers(answer(), bench.judges, bench.calibrations, bench.perplexity)

    run = runs.resume(bench.folder / f"{prefix}.json", protocol, measure)
    if bench.arguments.show_texts:
        _show_texts(bench.folder / f"{prefix}.texts.jsonl", answer(), run["cases"])
    return run


def _show_texts(path: pathlib.Path, answers: Sequence[Answer], cases: Sequence[Mapping[str, Any]]) -> None:
    """Prints and stores prompts and answers; by now the journal has all answers."""
    lines = []
    for answer, case in zip(answers, cases, strict=True):
        continuation = answer.prompt.answer_start + answer.text
        row = {"id": answer.prompt.id, "labels": case["labels"], "prompt": answer.prompt.prompt}
        lines.append(json.dumps(row | {"continuation": continuation}) + "\n")
        print(f"\n[{path.name}, {answer.prompt.id}: {case['labels']}]\n{answer.prompt.prompt}\n    >>> {continuation}")
    write_whole(path, "".join(lines))


def _report(bench: Bench, results: Mapping[str, Any]) -> None:
    if bench.is_synthetic and results["runs"]:
        paths = write_report(bench.arguments.output, results)
        table = results_table(results)
        print((table if len(table.rows) > 5 else table.transposed()).plain())  # few runs: one a column
    else:
        paths = evaluate_report.write_single(bench.arguments.output, results)
    print("\n".join(str(path) for path in paths))


def open_validation(path: str, checkpoint: Checkpoint) -> TokenStore | None:
    """The token store of held-out safe text. Raises ValueError if its vocabulary isn't the checkpoint's."""
    return TokenStore.open(path, vocab_hash=checkpoint.tokenizer.hash) if path else None


def judge_accuracy(max_new_tokens: int) -> dict[str, Any]:
    """Sensitivity and specificity of the synthetic web's judge on held-out documents of known label, as a dict."""
    accuracy = synthetic_judge.measure_judge(num_words=max(8, round(_WORDS_PER_TOKEN * max_new_tokens)))
    return {"version": synthetic_judge.JUDGE_VERSION, **dataclasses.asdict(accuracy)}


def _protocol(bench: Bench, checkpoint: Checkpoint, store: TokenStore | None) -> Protocol:
    validation = ""
    if store:
        shards = json.dumps([dataclasses.asdict(shard) for shard in store.manifest.shards], sort_keys=True)
        validation = f"{store.manifest.task}/{store.manifest.split} {hashlib.sha256(shards.encode()).hexdigest()}"
    versions = [f"{judge.name} {judge.version}" for judge in bench.judges]
    template = bench.asked.template
    return Protocol(
        suite=bench.published.stamp if bench.published else bench.arguments.suite,
        prompts_sha256=hash_prompts(bench.asked.prompts),
        num_prompts=len(bench.asked.prompts),
        judge_version=synthetic_judge.JUDGE_VERSION if bench.is_synthetic else "; ".join(versions),
        judge_calibration=records.fingerprint(bench.calibrations)[:16] if bench.calibrations else "",
        checkpoint_sha256=hash_params(checkpoint.params),
        vocab_hash=checkpoint.tokenizer.hash,
        validation=validation,
        method="",
        method_settings={},
        max_new_tokens=bench.asked.max_new_tokens,
        seed=bench.arguments.seed,
        template=f"{template.kind} {template.hash[:12]}",
        answer_start=bench.asked.answer_start,
        coherence=bench.coherence_version,
        chat_template=checkpoint.tokenizer.chat_template_hash if template.kind == CHAT else "",
    )


def _parser() -> argparse.ArgumentParser:
    return evaluate_flags.parser(__doc__)


def command() -> None:
    """Runs the subcommand of the command line."""
    commands = {
        "report": (evaluate_report.main, evaluate_report.parser),
        "capability": (evaluate_capability.capability_main, evaluate_capability.capability_parser),
        "calibrate": (evaluate_judge.calibrate_main, evaluate_judge.calibrate_parser),
        "audit": (evaluate_audit.main, evaluate_audit.parser),
        "monitors": (evaluate_monitors.main, evaluate_monitors.parser),
        "train_judge": (evaluate_judge.train_main, evaluate_judge.train_parser),
    }
    chosen, make = commands.get("".join(sys.argv[1:2]).replace("-", "_"), (main, _parser))
    cli.run(chosen, make(), sys.argv[2:] if chosen is not main else None, decodes=True)
