"""Sets how readily a model refuses: a threshold on a control token, by the share of safe prompts that it may refuse.

`--kind=refusal`: answers begin with <refuse> or <respond> (refusal tokens); the value is P(<refuse>) over the
probability of both. `--kind=red_flag`: <red_flag> may come anywhere; the value is its largest probability along the
model's own answer to the prompt. The threshold is the lowest with which at most --max_over_refusal of further safe
prompts of the same kind are expected to be refused (split conformal prediction). With refusal tokens of categories
(--category) each has a threshold of its own and a part of that share, so that together they keep it. The knob is
written with what it was calibrated on; `--knob=FILE` of generate, evaluate and serve uses it.
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
from safelm.inference.knobs import KINDS, MESSAGE, NEVER, REFUSAL, VOCABULARY, Knob, logit_bias
from safelm.inference.methods import METHODS, is_planned
from safelm.inference.weights import WEIGHTS_DTYPES
from safelm.io import remote
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
    add(
        "--category",
        action="append",
        default=[],
        metavar="TOKEN[=SHARE]",
        help="of refusal: the refusal token of a category, repeatable, and its part of --max_over_refusal (0: it never "
        "refuses; default: an equal part of what is left); --token's part is given in the same way",
    )
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
    remote.check_local_output(flags.output)
    share = flags.max_over_refusal
    if not 0 < share < 1:
        raise ValueError(f"--max_over_refusal={share}: must be above 0 and below 1")
    safe = [row["prompt"] for row in read_prompts(flags.safe_prompts, "safe_prompts")]
    harmful = []
    if flags.harmful_prompts:
        harmful = [row["prompt"] for row in read_prompts(flags.harmful_prompts, "harmful_prompts")]
    knob = _knob(flags)
    shares = _shares(flags, knob)
    for token, part in shares.items():
        if part and len(safe) < (needed := pages_needed(part)):
            most = f"{part:g} of safe ones" + (f" by {token}" if len(shares) > 1 else "")
            raise ValueError(
                f"--safe_prompts={flags.safe_prompts}: {len(safe)} prompts; to refuse at most {most} at least {needed} "
                "are needed"
            )
    name, source = cli.checkpoint(flags.checkpoint)
    kwargs = chat_template.read_kwargs(flags.chat_template_kwargs, "--chat_template_kwargs")
    model = lm.load(source, step=flags.step, chat_template=flags.chat_template, chat_template_kwargs=kwargs)
    values_PK = _values(model, knob, [*safe, *harmful], flags)
    thresholds, facts = calibrate(values_PK[: len(safe)], shares)
    facts |= {"checkpoint": name, VOCABULARY: model.tokenizer.hash, "parameters": model.config.num_params}
    facts["chat"] = flags.chat
    if flags.kind != REFUSAL:
        facts |= {name: getattr(flags, name) for name in ("method", "max_new_tokens")}
    if harmful:
        refused_PK = values_PK[len(safe) :] >= np.array(list(thresholds.values()))
        facts["harmful_refused"] = dataclasses.asdict(rate(int(refused_PK.any(axis=1).sum()), len(harmful)))
    threshold, *others = thresholds.values()
    categories = dict(zip(knob.categories, others, strict=True))
    knob = dataclasses.replace(knob, threshold=threshold, categories=categories, calibration=facts)
    written = {name: value for name, value in dataclasses.asdict(knob).items() if name != "origin"}
    write_whole(flags.output, json.dumps(written, indent=1) + "\n")
    sys.stdout.write("\n".join([*describe(knob, facts), flags.output]) + "\n")


def calibrate(
    values_NK: Float64[np.ndarray, "N K"], shares: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, Any]]:
    """The threshold of each of K tokens, and the bounds: of each, and of all together.

    A safe prompt is refused where any token reaches its threshold, so the expected shares add up to a bound on all; so
    do the shares at the joint confidence, each of which holds with 1 - (1 - CONFIDENCE) / K (Bonferroni).

    Args:
      values_NK: the knob's values on N safe prompts.
      shares: of safe prompts that each token may refuse, by token; 0 for one that never refuses, but not for all.
    """
    thresholds, by_token = {}, {}
    confidence = 1 - (1 - CONFIDENCE) / sum(share > 0 for share in shares.values())
    for place, (token, share) in enumerate(shares.items()):
        if share:
            thresholds[token], by_token[token] = conformal_threshold(values_NK[:, place], share, confidence)
        else:
            thresholds[token] = NEVER
    refused_NK = values_NK >= np.array(list(thresholds.values()))
    facts: dict[str, Any] = {
        "share": sum(shares.values()),
        "flagged": int(refused_NK.any(axis=1).sum()),
        "safe_prompts": len(values_NK),
        "confidence": CONFIDENCE,
    }
    for bound in ("expected_at_most", "with_confidence_at_most"):
        facts[bound] = min(1.0, sum(each[bound] for each in by_token.values()))
    return thresholds, facts | ({"tokens": by_token} if len(shares) > 1 else {})


def describe(knob: Knob, facts: Mapping[str, Any]) -> list[str]:
    """The report in lines."""
    refuses = (
        f"refuses {facts['flagged']} of {facts['safe_prompts']} safe prompts; of further ones at most "
        f"{facts['expected_at_most']:.2%} are expected, {facts['with_confidence_at_most']:.2%} with "
        f"{facts['confidence']:.0%} confidence"
    )
    lines = []
    for token, threshold in knob.thresholds.items():
        if threshold >= NEVER:
            lines.append(f"{token} never refuses")
            continue
        as_bias = f", which is a logit bias of {logit_bias(threshold):+.3g}" if knob.kind == REFUSAL else ""
        own = refuses
        if knob.categories:
            found = facts["tokens"][token]
            own = (
                f"refuses {found['flagged']}; of further safe prompts at most {found['expected_at_most']:.2%} expected"
            )
        lines.append(f"threshold {threshold:.4g} of {token}{as_bias}: {own}")
    if knob.categories:
        lines.append(f"together: {refuses}")
    if found := facts.get("harmful_refused"):
        lines.append(f"harmful prompts refused: {found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]")
    return lines


def _knob(flags: argparse.Namespace) -> Knob:
    """The knob that is asked for, without its thresholds."""
    token, other = _TOKENS[flags.kind]
    for flag, value in (("other_token", flags.other_token), ("category", " ".join(flags.category))):
        if flags.kind != REFUSAL and value:
            raise ValueError(f"--{flag}={value}: goes with --kind={REFUSAL} only")
    token, other = flags.token or token, flags.other_token or other
    tokens = [_category(each)[0] for each in flags.category]
    for each in tokens:
        if not each.strip() or each == other or tokens.count(each) > 1:
            raise ValueError(f"--category={each}: want a refusal token, each once, and not {other}")
    categories = dict.fromkeys((each for each in tokens if each != token), 1.0)
    return Knob(flags.kind, token, 1.0, other, flags.message, categories)


def _category(flag: str) -> tuple[str, float | None]:
    """Token and share of a `--category`; None without a share. Raises ValueError for a share that is no number."""
    token, equals, share = flag.rpartition("=")
    try:
        return (token, float(share)) if equals else (flag, None)
    except ValueError:
        if token.endswith(">"):
            raise ValueError(f"--category={flag}: the share {share!r} is no number") from None
        return flag, None


def _shares(flags: argparse.Namespace, knob: Knob) -> dict[str, float]:
    """The part of --max_over_refusal of every token.

    Raises ValueError where the given ones leave nothing, or less, or are all 0.
    """
    total, given = flags.max_over_refusal, dict(map(_category, flags.category))
    for token, share in given.items():
        if share is not None and not 0 <= share < 1:
            raise ValueError(f"--category={token}={share:g}: must be at least 0 and below 1")
    left = total - sum(share for share in given.values() if share is not None)
    without = [token for token in knob.thresholds if given.get(token) is None]
    part = left / max(1, len(without))
    if left < -1e-9 * total or (without and part < 1e-9 * total):
        raise ValueError(
            f"--max_over_refusal={total:g}: the shares of --category add up to {total - left:g}, and leave nothing for "
            f"{', '.join(without)}"
            if without
            else f"--max_over_refusal={total:g}: the shares of --category add up to {total - left:g}"
        )
    shares = {token: part if given.get(token) is None else given[token] for token in knob.thresholds}
    if not any(shares.values()):
        raise ValueError(f"--category={flags.category[0]}: the share of every token is 0: none would ever refuse")
    return shares


def _values(
    model: lm.LanguageModel, knob: Knob, prompts: Sequence[str], flags: argparse.Namespace
) -> Float64[np.ndarray, "P K"]:
    ids = [prompting.prompt_ids(model.tokenizer, prompt, is_chat=flags.chat) for prompt in prompts]
    ends = model.tokenizer.conventions.end_ids
    answering = Answering(METHODS[flags.method](), flags.max_new_tokens, ends, flags.seed, flags.batch_size)
    bound, tag = knob.bound(model.tokenizer), model.tokenizer.harm_tag_id
    return knob_values(model.config, model.params, ids, bound, answering, harm_tag_id=tag, weights=flags.weights)


if __name__ == "__main__":
    cli.run(main, arguments(), decodes=True)
