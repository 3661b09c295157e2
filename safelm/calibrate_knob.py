"""Sets how readily a model refuses: a threshold on a control token, by the share of safe prompts that it may refuse.

`--kind=refusal`: answers begin with <refuse> or <respond> (refusal tokens); the value is P(<refuse>) over the
probability of both. `--kind=red_flag`: <red_flag> may come anywhere; the value is its largest probability along the
model's own answer to the prompt. The threshold is the lowest with which at most --max_over_refusal of further safe
prompts of the same kind are expected to be refused (split conformal prediction). It is written with what it was
calibrated on; `--knob=FILE` of generate, evaluate and serve uses it.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from safelm import cli, lm
from safelm.generate import read_prompts
from safelm.inference.knob_values import Answering, knob_values
from safelm.inference.knobs import KINDS, MESSAGE, REFUSAL, Knob
from safelm.inference.methods import METHODS, is_planned
from safelm.inference.weights import WEIGHTS_DTYPES
from safelm.io.files import write_whole
from safelm.safety.scoring.safe_bound import CONFIDENCE, conformal_threshold, pages_needed
from safelm.stats.intervals import rate
from safelm.text import chat_template, named_templates, prompting

_TOKENS = {"refusal": ("<refuse>", "<respond>"), "red_flag": ("<red_flag>", "")}
_METHODS = [name for name, kind in METHODS.items() if not is_planned(kind())]


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    example = (
        "python -m safelm.calibrate_knob --checkpoint=W/chat --kind=refusal --chat --safe_prompts=safe.jsonl \\\n"
        "      --max_over_refusal=0.05 --output=W/knob.json"
    )
    parser = cli.parser("safelm.calibrate_knob", __doc__, example)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar=cli.CHECKPOINT, help="the model, as for safelm.generate")
    add("--step", type=int, help="step of a training run's checkpoint (default: the newest)")
    add("--kind", required=True, choices=KINDS)
    add("--token", default="", help="control token whose probability decides (default: <refuse>, <red_flag>)")
    add("--other_token", default="", help="of refusal: that of answers that aren't refused (default: <respond>)")
    add("--safe_prompts", required=True, metavar="FILE", help='jsonl of your safe prompts, one {"prompt": text} a line')
    add("--harmful_prompts", default="", metavar="FILE", help="the same of harmful ones, to see how many are refused")
    add("--max_over_refusal", type=float, required=True, metavar="SHARE", help="of safe prompts that may be refused")
    add("--message", default=MESSAGE, help="of red_flag: what is said in place of an answer (default: %(default)s)")
    add("--method", choices=_METHODS, default="greedy", help="of red_flag: how answers are made (default %(default)s)")
    add("--max_new_tokens", type=int, default=64, help="of red_flag: length of answers (default %(default)s)")
    add("--chat", action="store_true", help="treat prompts as users' messages")
    add("--chat_template_kwargs", default="", metavar="JSON", help=chat_template.KWARGS_HELP)
    add("--chat_template", default="", metavar="NAME|FILE", help=f"for --chat: {named_templates.HELP}")
    add("--seed", type=int, default=0, help="seed of methods that sample")
    add("--batch_size", type=int, default=64, help="prompts decoded at once")
    add("--weights", choices=WEIGHTS_DTYPES, default="", help="default: the checkpoint's own dtype")
    add("--output", required=True, metavar="FILE", help="the knob, as JSON")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Measures, chooses the threshold, writes and says it."""
    share = flags.max_over_refusal
    if not 0 < share < 1:
        raise ValueError(f"--max_over_refusal={share}: must be above 0 and below 1")
    safe = [row["prompt"] for row in read_prompts(flags.safe_prompts, "safe_prompts")]
    harmful = []
    if flags.harmful_prompts:
        harmful = [row["prompt"] for row in read_prompts(flags.harmful_prompts, "harmful_prompts")]
    if len(safe) < (needed := pages_needed(share)):
        raise ValueError(
            f"--safe_prompts={flags.safe_prompts}: {len(safe)} prompts; to refuse at most {share:g} of safe ones at "
            f"least {needed} are needed"
        )
    name, source = cli.checkpoint(flags.checkpoint)
    kwargs = chat_template.read_kwargs(flags.chat_template_kwargs, "--chat_template_kwargs")
    model = lm.load(source, step=flags.step, chat_template=flags.chat_template, chat_template_kwargs=kwargs)
    knob = _knob(flags)
    values = _values(model, knob, [*safe, *harmful], flags)
    threshold, facts = conformal_threshold(values[: len(safe)], share)
    of_harmful = values[len(safe) :] >= threshold
    facts |= {"safe_prompts": len(safe), "confidence": CONFIDENCE, "checkpoint": name, "chat": flags.chat}
    if flags.kind != REFUSAL:
        facts |= {name: getattr(flags, name) for name in ("method", "max_new_tokens")}
    if harmful:
        facts["harmful_refused"] = dataclasses.asdict(rate(int(of_harmful.sum()), len(harmful)))
    knob = dataclasses.replace(knob, threshold=threshold, calibration=facts)
    write_whole(flags.output, json.dumps(dataclasses.asdict(knob), indent=1) + "\n")
    sys.stdout.write("\n".join([*describe(knob, facts), flags.output]) + "\n")


def describe(knob: Knob, facts: Mapping[str, Any]) -> list[str]:
    """The report in lines."""
    as_bias = f", which is a logit bias of {knob.logit_bias:+.3g}" if knob.kind == REFUSAL else ""
    lines = [
        f"threshold {knob.threshold:.4g} of {knob.token}{as_bias}: refuses {facts['flagged']} of "
        f"{facts['safe_prompts']} safe prompts; of further ones at most {facts['expected_at_most']:.2%} are expected, "
        f"{facts['with_confidence_at_most']:.2%} with {facts['confidence']:.0%} confidence"
    ]
    if found := facts.get("harmful_refused"):
        lines.append(f"harmful prompts refused: {found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]")
    return lines


def _knob(flags: argparse.Namespace) -> Knob:
    """The knob that is asked for, without its threshold."""
    token, other = _TOKENS[flags.kind]
    if flags.kind != REFUSAL and flags.other_token:
        raise ValueError(f"--other_token={flags.other_token}: goes with --kind={REFUSAL} only")
    return Knob(flags.kind, flags.token or token, 1.0, flags.other_token or other, flags.message)


def _values(
    model: lm.LanguageModel, knob: Knob, prompts: Sequence[str], flags: argparse.Namespace
) -> Float64[np.ndarray, " P"]:
    ids = [prompting.prompt_ids(model.tokenizer, prompt, is_chat=flags.chat) for prompt in prompts]
    ends = model.tokenizer.conventions.end_ids
    answering = Answering(METHODS[flags.method](), flags.max_new_tokens, ends, flags.seed, flags.batch_size)
    bound, tag = knob.bound(model.tokenizer), model.tokenizer.harm_tag_id
    return knob_values(model.config, model.params, ids, bound, answering, harm_tag_id=tag, weights=flags.weights)


if __name__ == "__main__":
    cli.run(main, arguments())
