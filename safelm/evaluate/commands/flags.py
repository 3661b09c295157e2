"""The flags of safelm.evaluate and the prompts and methods that they name."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from safelm import cli
from safelm.evaluate import published
from safelm.evaluate.answers import BATCH_SIZE
from safelm.evaluate.judges import ASKED, RULES
from safelm.evaluate.published import Published
from safelm.evaluate.runs import METHODS
from safelm.evaluate.suites import attempts, benchmarks, duplicates, suite, templates
from safelm.evaluate.suites.suite import Prompt
from safelm.evaluate.template import CHAT, KINDS, TEXT, Template
from safelm.inference.knobs import KNOB_HELP, Knob, read_knob
from safelm.inference.methods import Method, draws, looks_ahead
from safelm.safety.monitors.loading import add_monitor_flags
from safelm.text import banned_tokens, chat_template, named_templates
from safelm.text.tokenizer import Tokenizer

LABELLED = "answers that people labelled, repeatable: xstest:PATH, labelled:PATH, pyrit, pyrit_refusal"  # as help
_SYNTHETIC_TOKENS, _TOKENS = 48, 512  # new ones a prompt unless told
_METHODS = "greedy,safe_beam"


@dataclasses.dataclass(frozen=True)
class Asked:
    """The prompts and how they are put.

    Attributes:
      dropped: number of prompts that duplicated others.
      answer_start: for the protocol: how answers were prefilled.
    """

    prompts: list[Prompt]
    template: Template
    max_new_tokens: int
    answer_start: str
    dropped: int


def read_protocol(arguments: argparse.Namespace) -> Published | None:
    """The named protocol, if there is one; sets in `arguments` what it fixes, and the defaults where there is none.

    Raises ValueError for a flag that contradicts the protocol, prompts it isn't made for, or a judge that it can't
    ask.
    """
    protocol = published.load(arguments.protocol) if arguments.protocol else None
    if protocol is None:
        if arguments.grade_against:
            raise ValueError(f"--grade_against={arguments.grade_against}: goes with --protocol=ai_luminate")
        arguments.suite = arguments.suite or suite.SYNTHETIC
        arguments.methods = arguments.methods or _METHODS
        return None
    fixed = {
        "suite": protocol.suite,
        "max_new_tokens": protocol.max_new_tokens,
        "answer_start": protocol.answer_start,
    }
    nothing: dict[str, Any] = {"template": "", "system": "", "chat_template_kwargs": "", "target_words": 0}
    nothing |= {"templates": [], "samples": 0}
    for name, value in (fixed | nothing).items():
        given = getattr(arguments, name)
        if given and given != value:
            raise ValueError(f"--{name}={given}: --protocol={protocol.name} has {value or 'none'}")
        setattr(arguments, name, value)
    _check_methods(arguments, protocol)
    _check_asked(arguments, protocol)
    return protocol


def _check_methods(arguments: argparse.Namespace, protocol: Published) -> None:
    own = next(name for name, method in METHODS.items() if method == protocol.method)
    arguments.methods = arguments.methods or own
    for name, method in parse_methods(arguments.methods).items():
        if name != own and not looks_ahead(method):
            raise ValueError(f"--methods={arguments.methods}: --protocol={protocol.name} answers by {own}, not {name}")


def _check_asked(arguments: argparse.Namespace, protocol: Published) -> None:
    for source in arguments.data:
        name = source.partition(":")[0]
        if name not in protocol.benchmarks:
            made_for = ", ".join(protocol.benchmarks)
            raise ValueError(f"--data={source}: --protocol={protocol.name} is made for {made_for}")
    if arguments.likelihood_only or not protocol.ask:
        return
    for spec in arguments.judge:
        if spec != RULES and spec.partition(":")[0] not in ASKED:
            what = "log-probs of a number" if protocol.needs_log_probs else "grades"
            raise ValueError(
                f"--judge={spec}: --protocol={protocol.name} needs a judge that gives {what}: judge:MODEL or "
                f"endpoint:URL#MODEL"
            )
    if all(spec == RULES for spec in arguments.judge):
        raise ValueError(f"--judge: --protocol={protocol.name} needs judge:MODEL or endpoint:URL#MODEL")


def read_asked(arguments: argparse.Namespace) -> Asked:
    """The prompts that the flags name, in the suite's form.

    Raises ValueError for flags that contradict each other or a suite without prompts, and the errors of reading
    prompts.
    """
    if arguments.suite == suite.SYNTHETIC:
        return _synthetic(arguments)
    if not arguments.data:
        raise ValueError(f"--suite={arguments.suite}: no prompts; name them by --data=BENCHMARK:PATH")
    if arguments.prompts:
        raise ValueError(f"--prompts={arguments.prompts}: goes with --suite={suite.SYNTHETIC} only, here it is --data")
    is_base = arguments.suite == suite.BASE
    template = _template(arguments, TEXT if is_base else CHAT)
    prompts = benchmarks.read_all(arguments.data)
    if arguments.targets:
        prompts = suite.with_targets(prompts, benchmarks.read_targets(arguments.targets))
    prompts, dropped = duplicates.merge_duplicates(prompts)
    prompts = suite.choose(prompts, arguments.max_prompts)
    shells = [each for path in arguments.templates for each in templates.read_templates(path)]
    shells = [dataclasses.replace(each, name=f"t{number}") for number, each in enumerate(shells, 1)]
    prompts = templates.in_templates(prompts, shells)
    start = arguments.answer_start or ("target" if is_base else "none")
    if start == "target":
        prompts = suite.with_answer_starts(prompts, arguments.target_words)
        start = f"target:{arguments.target_words or 'all'}"
    if template.kind == TEXT:
        prompts = suite.as_completions(prompts)
    prompts = attempts.with_samples(prompts, arguments.samples)
    if not prompts:
        raise ValueError(f"--suite={arguments.suite}: no prompts are left to ask")
    return Asked(prompts, template, arguments.max_new_tokens or _TOKENS, "" if start == "none" else start, dropped)


def _template(arguments: argparse.Namespace, usual: str) -> Template:
    kwargs = chat_template.read_kwargs(arguments.chat_template_kwargs, "--chat_template_kwargs")
    kind = arguments.template or usual
    if arguments.system and kind != CHAT:
        raise ValueError(f"--system={arguments.system}: a system message goes with the chat template only")
    return Template(kind, arguments.system, json.dumps(kwargs, sort_keys=True) if kwargs else "")


def _synthetic(arguments: argparse.Namespace) -> Asked:
    for flag in ("data", "targets", "answer_start", "templates", "judge", "judge_calibration", "coherence_reference"):
        if given := getattr(arguments, flag):
            shown = " ".join(given) if isinstance(given, list) else given
            raise ValueError(f"--{flag}={shown}: does not go with --suite={suite.SYNTHETIC}")
    if not arguments.prompts:
        raise ValueError(f"--prompts: needed for --suite={suite.SYNTHETIC}, a folder with harmful.jsonl and safe.jsonl")
    template = _template(arguments, TEXT)
    prompts = suite.read_prompts(arguments.prompts, max_prompts=arguments.max_prompts)
    prompts = suite.as_requests(prompts) if template.kind == CHAT else prompts
    prompts = attempts.with_samples(prompts, arguments.samples)
    return Asked(prompts, template, arguments.max_new_tokens or _SYNTHETIC_TOKENS, "", 0)


def parse_methods(flag: str, tag_candidate: str = "") -> Mapping[str, Method]:
    """Comma-separated names as methods with default settings.

    Args:
      tag_candidate: what methods do with the tag as a candidate token.

    Raises ValueError for an unknown name.
    """
    names = [name.strip() for name in flag.split(",")]
    unknown = next((name for name in names if name not in METHODS), None)
    if unknown is not None:
        raise ValueError(f"--methods={flag}: unknown method {unknown!r}, one of {', '.join(METHODS)}")
    found = {name: METHODS[name] for name in names}
    if not tag_candidate:
        return found
    for name, method in found.items():
        if tag_candidate == "allow" and looks_ahead(method):
            raise ValueError(f"--tag_candidate=allow: {name} takes mask or stop")
    return {name: dataclasses.replace(method, tag_candidate=tag_candidate) for name, method in found.items()}


def check_samples(count: int, methods: Mapping[str, Method]) -> None:
    """Raises ValueError for a number of samples that can't be, or a method that always gives the same answer."""
    if count < 0:
        raise ValueError(f"--samples={count}: want 1 or more")
    fixed = next((name for name, method in methods.items() if not draws(method)), None)
    if count > 1 and fixed is not None:
        raise ValueError(f"--samples={count}: {fixed} always gives the same answer; take --methods=sample")


def parse_skip(flags: Sequence[str], folders: Mapping[str, str], methods: Collection[str]) -> set[tuple[str, str]]:
    """`NAME:METHOD` flags as pairs. Raises ValueError for a pair that would not be run anyway."""
    pairs = set()
    for flag in flags:
        name, _, method = flag.partition(":")
        if name not in folders or method not in methods:
            raise ValueError(f"--skip={flag}: want NAME:METHOD of a --checkpoint and one of --methods")
        pairs.add((name, method))
    return pairs


def parser(doc: str) -> argparse.ArgumentParser:
    """The command's parser."""
    made = cli.parser(
        "safelm.evaluate",
        doc,
        "python -m safelm.evaluate --checkpoint=raw=W/raw --checkpoint=safety=W/safety --prompts=W/corpus/prompts \\\n"
        "      --validation=W/tokens/filtered_web/validation --methods=greedy,safe_beam --output=W/evaluation\n"
        "  python -m safelm.evaluate --suite=chat --checkpoint=safety@instruct#0=W/chat0 \\\n"
        "      --data=advbench:advbench.csv --data=harmbench:harmbench.csv --judge=rules --judge=judge:W/judge \\\n"
        "      --judge_calibration=xstest:LABELLED --output=W/chat_evaluation",
    )
    made.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar=cli.CHECKPOINT,
        help="a model; repeatable; NAME is MODEL, MODEL@STAGE or MODEL@STAGE#SEED, as the report groups them",
    )
    made.add_argument(
        "--suite", choices=suite.SUITES, default="", help=f"how prompts are put (default: {suite.SYNTHETIC})"
    )
    made.add_argument(
        "--protocol",
        default="",
        metavar="NAME",
        help=f"a published protocol, frozen: it sets suite, decoding, length and what judges are asked; of "
        f"{', '.join(published.names())}",
    )
    made.add_argument(
        "--grade_against",
        default="",
        metavar="NAME",
        help="with --protocol=ai_luminate: the --checkpoint that is the reference system",
    )
    made.add_argument("--output", required=True, metavar="DIR", help="folder for results and resumable runs")
    _add_asked(made.add_argument_group("what is asked").add_argument)
    _add_decoding(made.add_argument_group("decoding").add_argument)
    _add_judging(made.add_argument_group("judging and measuring").add_argument)
    return made


def banned_ids(flags: Sequence[str], name: str, names: Collection[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that the checkpoint `name`, of `names`, never writes: by --banned_tokens of all and those of its own.

    Raises ValueError for what isn't a special token of its vocabulary or ends its answers.
    """
    found: set[int] = set()
    for flag in flags:
        owner, equals, tokens = flag.partition("=")
        has_owner = bool(equals) and owner in names
        if has_owner and owner != name:
            continue
        own = tokens if has_owner else flag
        found |= set(banned_tokens.banned_ids(tokenizer, own, flag=f"--banned_tokens={flag}, {name}"))
    return tuple(sorted(found))


def knob(flags: Sequence[str], name: str, names: Collection[str]) -> Knob | None:
    """The knob of the checkpoint `name`, of `names`: its own of --knob=NAME=FILE, else that of all.

    Raises what `read_knob` does.
    """
    owned = [(owner, path) for owner, equals, path in (flag.partition("=") for flag in flags) if equals]
    own = [path for owner, path in owned if owner == name]
    of_all = [flag for flag in flags if flag.partition("=")[0] not in names or "=" not in flag]
    chosen = (own or of_all)[-1:]
    return read_knob(chosen[0]) if chosen else None


def _add_asked(add: Callable[..., Any]) -> None:
    add("--prompts", default="", metavar="DIR", help="synthetic_web: folder with harmful.jsonl and safe.jsonl")
    add(
        "--data",
        action="append",
        default=[],
        metavar="BENCHMARK:PATH",
        help=f"other suites: prompts, repeatable, duplicates counted once; of {', '.join(benchmarks.BENCHMARKS)}",
    )
    add("--targets", default="", metavar="FILE", help="how harmful answers begin, by prompt or id (TDC, HarmBench)")
    add(
        "--answer_start",
        choices=("none", "target"),
        default="",
        help="prefill the answer with the target's first words (default: target for base, otherwise none)",
    )
    add("--target_words", type=int, default=0, help="words to prefill; 0 = all (default)")
    add(
        "--templates",
        action="append",
        default=[],
        metavar="FILE",
        help="jailbreak templates (DAN) as published: every harmful prompt is also put in each; repeatable",
    )
    add("--max_prompts", type=int, default=0, help="most harmful and most safe prompts; 0 = all (default)")
    add(
        "--template",
        choices=KINDS,
        default="",
        help="text to continue, or a chat (default: text for synthetic_web and base, otherwise chat)",
    )
    add("--system", default="", help="system message of a chat (default: none)")
    add("--chat_template_kwargs", default="", metavar="JSON", help=chat_template.KWARGS_HELP)
    add("--chat_template", default="", metavar="NAME|FILE", help=f"of all models: {named_templates.HELP}")


def _add_decoding(add: Callable[..., Any]) -> None:
    add("--methods", default="", help=f"of {', '.join(METHODS)} (default {_METHODS}; a protocol has its own)")
    add("--skip", action="append", default=[], metavar="NAME:METHOD", help="leave out this pair of model and method")
    add_monitor_flags(add)
    add("--max_new_tokens", type=int, default=0, help=f"(default {_TOKENS}, {_SYNTHETIC_TOKENS} for synthetic_web)")
    add(
        "--tag_candidate",
        choices=("mask", "stop", "allow"),
        default="",
        help="treatment of the harm tag as the next token; stop and allow show short circuits (default: mask)",
    )
    add(
        "--banned_tokens",
        action="append",
        default=[],
        metavar="[NAME=]TOKENS",
        help=f"of one checkpoint or of all, repeatable: {banned_tokens.HELP}",
    )
    add(
        "--knob",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help=f"of one checkpoint or of all, repeatable: {KNOB_HELP} (default: none)",
    )
    add(
        "--samples",
        type=int,
        default=0,
        help="answers to every harmful prompt by methods that draw; the worst of them is reported too (default 1)",
    )
    add("--seed", type=int, default=0, help="seed of methods that sample (default %(default)s)")
    add("--batch_size", type=int, default=BATCH_SIZE, help="prompts decoded at once (default %(default)s)")


def _add_judging(add: Callable[..., Any]) -> None:
    add(
        "--judge",
        action="append",
        default=[],
        metavar="JUDGE",
        help=f"repeatable: {RULES}, trained:DIR, classifier:DIR, judge:MODEL, endpoint:URL#MODEL; the first that is "
        f"not {RULES} is the headline; an endpoint's key is in SAFELM_ENDPOINT_KEY, or in the variable that "
        "key_env=NAME names (OPENAI_API_KEY goes to OpenAI's host only), and redirects are not followed",
    )
    add("--judge_calibration", action="append", default=[], metavar="SOURCE", help=LABELLED)
    add(
        "--calibration_answers",
        type=int,
        default=0,
        help="most labelled answers, spread evenly over authors, kinds of request and labels; 0 = all (default)",
    )
    add(
        "--coherence_reference",
        default="",
        metavar="DIR",
        help="reference checkpoint whose perplexity counts towards coherence",
    )
    add("--validation", default="", metavar="DIR", help="token store of held-out safe text (perplexity)")
    add(
        "--likelihood_only",
        action="store_true",
        help="decode nothing; only measure P(tag), targets against refusals and the probe",
    )
    add("--show_texts", action="store_true", help="print and store texts beside ids and labels")
