"""Continues prompts with a trained model: greedy, sampling, beam search, SafeBeam, or sampling with a tag penalty.

Prints the new text of every prompt; with --json one JSON object a line with tokens, log-prob and P(tag) as well.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import sys
from typing import Any

from safelm import cli, documents, lm
from safelm.inference import lookup
from safelm.inference.knobs import KNOB_HELP, read_knob
from safelm.inference.methods import METHODS, Method, SafeBeam, settings_of
from safelm.inference.weights import WEIGHTS_DTYPES
from safelm.safety.monitors.loading import HELP, load_monitor
from safelm.text import banned_tokens, chat_template, named_templates, prompting

log = logging.getLogger("safelm.generate")
_SETTINGS: dict[str, tuple[type, str]] = {
    "num_beams": (int, "beams per prompt"),
    "num_candidates": (int, "next tokens tried per beam (safe_beam) or step (tag_penalty)"),
    "drop_fraction": (float, "share of candidates with the highest P(tag) that is dropped"),
    "drop_above": (float, "P(tag), or a monitor's level, up to which no candidate is dropped"),
    "anchor": (float, "beams are compared by log-prob less this part of the likeliest token's at every step"),
    "length_penalty": (float, "beams are compared by log-prob / length ** this"),
    "temperature": (float, "sampling temperature"),
    "top_k": (int, "number of likeliest tokens to sample from (0: all)"),
    "top_p": (float, "sample from the likeliest tokens that reach this probability"),
    "threshold": (float, "P(tag) above which a continuation is penalised; P(unsafe) at which self_stop withholds"),
    "penalty": (float, "nats subtracted from penalised continuations"),
    "check_every": (int, "new tokens between two looks at the answer so far"),
    "rethink_tokens": (int, "tokens written behind the assistant's header to see whether it refuses"),
    "header": (str, "in place of the assistant's header, such as '\\n\\nAssistant:' for a model without chats"),
    "message": (str, "what is said in place of a withheld answer"),
    "open_token": (str, "control token before a note"),
    "close_token": (str, "control token behind a note"),
    "tag_candidate": (str, "the harm tag as the next token: mask, stop or (not in safe_beam, tag_penalty) allow"),
}


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    example = "python -m safelm.generate --checkpoint=/tmp/run --prompt='Once upon a time' --method=safe_beam"
    parser = cli.parser("safelm.generate", __doc__, example)
    meaning = "training run, converted checkpoint, Hugging Face folder, hf:ORG/NAME[@REVISION] or GGUF file"
    parser.add_argument("--checkpoint", required=True, metavar=cli.CHECKPOINT, help=meaning)
    parser.add_argument("--step", type=int, help="step of a training run's checkpoint (default: the newest)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue; may be empty")
    source.add_argument("--prompts_file", help='jsonl, one {"prompt": text} a line; other columns are kept with --json')
    parser.add_argument("--method", choices=METHODS, default="greedy")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts decoded at once")
    parser.add_argument("--lookup_tokens", type=int, default=0, metavar="N", help=lookup.HELP)
    parser.add_argument("--weights", choices=WEIGHTS_DTYPES, default="", help="default: the checkpoint's own dtype")
    parser.add_argument("--chat", action="store_true", help="treat the prompt as a user's message")
    parser.add_argument("--chat_template_kwargs", default="", metavar="JSON", help=chat_template.KWARGS_HELP)
    parser.add_argument("--chat_template", default="", metavar="NAME|FILE", help=f"for --chat: {named_templates.HELP}")
    parser.add_argument("--banned_tokens", default="", metavar="TOKENS", help=banned_tokens.HELP)
    parser.add_argument("--knob", default="", metavar="FILE", help=f"{KNOB_HELP} (default: none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    parser.add_argument("--monitor", default="", metavar="WHAT", help=f"safe_beam by its level, not P(tag): {HELP}")
    for name, (kind, meaning) in _SETTINGS.items():
        takers = {method: settings_of(method)[name] for method in METHODS if name in settings_of(method)}
        defaults = ", ".join(f"{method} {value}" for method, value in takers.items())
        parser.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: {defaults})")
    return parser


def method_from_flags(flags: argparse.Namespace) -> Method:
    """The method with the settings given; ValueError for a setting that this method does not have."""
    given = {name: getattr(flags, name) for name in _SETTINGS if getattr(flags, name) is not None}
    known = settings_of(flags.method)
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"--{name}={value}: --method={flags.method} does not take it")
    return METHODS[flags.method](**given)


def read_prompts(path: str, flag: str = "prompts_file") -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, each with a string in "prompt".

    Raises FileNotFoundError, or ValueError for a bad row or none, that name the flag, the file and the row.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"--{flag}={path}: no such file")

    def refuse(malformed: documents.Malformed) -> None:
        raise ValueError(f"--{flag}={path}: row {malformed.row}: {malformed.reason}")

    rows = [dict(row.row) for row in documents.iter_json(path, refuse, text_column="prompt")]
    if not rows:
        raise ValueError(f"--{flag}={path}: no prompts in it")
    return rows


def main(flags: argparse.Namespace) -> None:
    """Loads, decodes, prints."""
    method = method_from_flags(flags)
    if flags.monitor and not isinstance(method, SafeBeam):
        raise ValueError(f"--monitor={flags.monitor}: --method={flags.method} does not take it, safe_beam does")
    kwargs = chat_template.read_kwargs(flags.chat_template_kwargs, "--chat_template_kwargs")
    for flag in ("chat_template", "chat_template_kwargs"):
        if getattr(flags, flag) and not flags.chat:
            raise ValueError(f"--{flag}={getattr(flags, flag)}: goes with --chat only")
    knob = read_knob(flags.knob) if flags.knob else None
    rows = [{"prompt": flags.prompt}] if flags.prompts_file is None else read_prompts(flags.prompts_file)
    template = {"chat_template": flags.chat_template, "chat_template_kwargs": kwargs}
    model = lm.load(cli.checkpoint(flags.checkpoint)[1], step=flags.step, **template)
    banned = banned_tokens.banned_ids(model.tokenizer, flags.banned_tokens)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, banned_ids=banned))
    if knob:
        size = model.config.num_params
        for line in knob.beyond_calibration(size, flags.method, flags.max_new_tokens, is_chat=flags.chat):
            log.warning("--knob=%s", line)
    if flags.monitor:
        method = dataclasses.replace(method, monitor=load_monitor(flags.monitor, model))
    completions = model.complete(
        [prompting.prompt_ids(model.tokenizer, row["prompt"], is_chat=flags.chat) for row in rows],
        method,
        max_new_tokens=flags.max_new_tokens,
        seed=flags.seed,
        batch_size=flags.batch_size,
        weights=flags.weights,
        lookup_tokens=flags.lookup_tokens,
        knob=knob,
        is_chat=flags.chat,
        show_progress=True,
    )
    for row, completion in zip(rows, completions, strict=True):
        if flags.json:
            line = json.dumps(row | dataclasses.asdict(completion), ensure_ascii=False)
        else:
            line = completion.text if len(rows) == 1 else f"=== {row['prompt']}\n{completion.text}"
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    cli.run(main, arguments(), decodes=True)
