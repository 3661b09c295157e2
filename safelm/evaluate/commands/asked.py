"""What safelm.evaluate's flags ask: the published protocol, if one is named, and the prompts in the suite's form."""

import argparse
import dataclasses
import json
from typing import Any

from safelm.evaluate import published
from safelm.evaluate.commands.flags import DEFAULT_METHODS, DEFAULT_TOKENS, SYNTHETIC_TOKENS, parse_methods
from safelm.evaluate.judges import ASKED, RULES
from safelm.evaluate.published import Published
from safelm.evaluate.runs import METHODS
from safelm.evaluate.suites import attempts, benchmarks, duplicates, suite, templates
from safelm.evaluate.suites.suite import Prompt
from safelm.evaluate.template import CHAT, TEXT, Template
from safelm.inference.methods import looks_ahead
from safelm.text import chat_template


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
        arguments.methods = arguments.methods or DEFAULT_METHODS
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
    return Asked(
        prompts, template, arguments.max_new_tokens or DEFAULT_TOKENS, "" if start == "none" else start, dropped
    )


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
    return Asked(prompts, template, arguments.max_new_tokens or SYNTHETIC_TOKENS, "", 0)
