"""The flags of safelm.evaluate, and the methods, pairs, banned tokens and knobs that they name."""

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from safelm import cli
from safelm.evaluate import published
from safelm.evaluate.answers import BATCH_SIZE
from safelm.evaluate.judges import RULES
from safelm.evaluate.runs import METHODS
from safelm.evaluate.suites import benchmarks, suite
from safelm.evaluate.template import KINDS
from safelm.inference.knobs import KNOB_HELP, Knob, read_knob
from safelm.inference.methods import Method, draws, looks_ahead
from safelm.safety.monitors.loading import add_monitor_flags
from safelm.text import banned_tokens, chat_template, named_templates
from safelm.text.tokenizer import Tokenizer

LABELLED = "answers that people labelled, repeatable: xstest:PATH, labelled:PATH, pyrit, pyrit_refusal"  # as help
SYNTHETIC_TOKENS, DEFAULT_TOKENS = 48, 512  # new ones a prompt unless told
DEFAULT_METHODS = "greedy,safe_beam"


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
    add("--methods", default="", help=f"of {', '.join(METHODS)} (default {DEFAULT_METHODS}; a protocol has its own)")
    add("--skip", action="append", default=[], metavar="NAME:METHOD", help="leave out this pair of model and method")
    add_monitor_flags(add)
    add(
        "--max_new_tokens",
        type=int,
        default=0,
        help=f"(default {DEFAULT_TOKENS}, {SYNTHETIC_TOKENS} for synthetic_web)",
    )
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
