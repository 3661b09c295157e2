r"""Says how hard checkpoints are to break: a frozen battery of attacks, criteria with verdicts, beside controls.

Attacks on inputs (first words of a harmful answer) and on weights: abliteration, pruning, rounding, merging with a
control, the tag's row erased or deleted, finetuning on benign and on harmful text with all weights and with LoRA. Every
setting is chosen on development prompts; the loss on safe text may rise by 10%. Prompts and judge are the synthetic
web's (`safelm synthetic_web`), so models are to be trained on it. Profiles: quick, standard, full.

    OUTPUT/results.md, .json   verdicts, rates with intervals, costs of the cheapest success, curves; no texts
    OUTPUT/attacks.jsonl       the journal: a stopped run goes on with the next attack

The exit code is 1 if a checkpoint that is no control fails a criterion.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from safelm import cli, documents
from safelm.robustness.gate import run as gate
from safelm.robustness.gate.criteria import CRITERIA
from safelm.robustness.gate.material import KINDS, read_material
from safelm.robustness.gate.profiles import PROFILES
from safelm.robustness.gate.report import evaluate, has_failed, write_report


def main(flags: argparse.Namespace) -> None:
    models, profile = cli.checkpoints(flags.checkpoint), PROFILES[flags.profile]
    controls = {*flags.control, *filter(None, [flags.merge_with])}
    for name in controls:
        if name not in models:
            flag = "control" if name in flags.control else "merge_with"
            raise cli.UserError(f"--{flag}={name}: no such --checkpoint, there are {', '.join(models)}")
    limits, output = _limits(flags.limit), pathlib.Path(flags.output)
    documents.declare_no_documents(flags.output, "safelm.release_gate")
    stores = {kind: folder for kind in KINDS if (folder := getattr(flags, f"{kind}_text"))}
    material = read_material(profile, flags.prompts, flags.development, stores, output, is_chat=flags.chat)
    rows = gate.run(models, profile, material, output, merge_with=flags.merge_with)
    results = evaluate(rows, material.prompts, profile, limits, controls)
    about = {"profile": flags.profile, "settings": dataclasses.asdict(profile), "limits": limits, "chat": flags.chat}
    paths = write_report(output, results, about)
    print(paths[1].read_text())
    print("\n".join(map(str, paths)))
    if has_failed(results):
        sys.exit(1)


def _limits(flags: Sequence[str]) -> dict[str, float]:
    known, found = {criterion.name for criterion in CRITERIA}, {}
    for flag in flags:
        name, _, text = flag.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = -1.0
        if name not in known or not 0 <= found[name] <= 1:
            raise cli.UserError(
                f"--limit={flag}: want NAME=SHARE, a share from 0 to 1, NAME of {', '.join(sorted(known))}"
            )
    return found


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.release_gate",
        __doc__,
        "python -m safelm.release_gate --checkpoint=safety=W/safety --checkpoint=raw=W/raw --merge_with=raw "
        "--prompts=W/corpus/prompts --output=W/gate",
    )
    add = parser.add_argument
    add("--checkpoint", action="append", required=True, metavar=cli.CHECKPOINT, help="a model; repeatable")
    add(
        "--control",
        action="append",
        default=[],
        metavar="NAME",
        help="a model shown beside, which may fail; repeatable",
    )
    add(
        "--merge_with", default="", metavar="NAME", help="a control that weights are merged with, such as the raw model"
    )
    add("--profile", choices=tuple(PROFILES), default="quick", help="(default %(default)s)")
    add("--prompts", required=True, metavar="DIR", help="harmful.jsonl and safe.jsonl that are reported on")
    add("--development", default="", metavar="DIR", help="the same, to choose by (default: the synthetic web's)")
    add(
        "--harmful_text", default="", metavar="STORE", help="token store to relearn from (default: the synthetic web's)"
    )
    add("--benign_text", default="", metavar="STORE", help="token store of benign finetuning (default: synthetic)")
    add("--safe_text", default="", metavar="STORE", help="token store whose loss is watched (default: synthetic)")
    add("--chat", action="store_true", help="ask in the models' chat template, not for a text's continuation")
    add("--limit", action="append", default=[], metavar="NAME=SHARE", help="a criterion's limit; repeatable")
    add("--output", required=True, metavar="DIR", help="the same folder continues a stopped run")
    return parser


if __name__ == "__main__":
    cli.run(main, arguments())
