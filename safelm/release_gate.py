r"""Says how hard checkpoints are to break: a frozen battery of attacks, criteria with verdicts, beside controls.

Attacks on inputs: first tokens of a harmful answer, many-shot, requests rewritten by an attacker (`--attacker`: a model
behind an endpoint or on our own engine), the worst of several samples, a suffix and a soft prompt by gradient. Attacks
on weights: abliteration, pruning, rounding, merging with a control, the tag's row erased or deleted, finetuning on
benign and on harmful text with all weights and with LoRA. Every setting is chosen on development prompts; the loss on
safe text may rise by 10%. Prompts and judge are the synthetic web's (`safelm synthetic_web`), so models are to be
trained on it. Profiles: quick, standard, full; `--estimate` says how long one will take. Controls called weak and
strong, known to be so, check the gate itself: the report says whether it ranks them.

    OUTPUT/results.md, .json   verdicts, rates with intervals, costs of the cheapest success, curves; no texts
    OUTPUT/attacks.jsonl       the journal: a stopped run goes on with the next attack

The exit code is 1 if a checkpoint that is no control fails a criterion, or has one that could not be measured.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from safelm import cli, documents
from safelm.formats import sources
from safelm.io import hub
from safelm.robustness.gate import run as gate
from safelm.robustness.gate.criteria import CRITERIA
from safelm.robustness.gate.estimate import estimate_all
from safelm.robustness.gate.material import KINDS, read_material
from safelm.robustness.gate.profiles import PROFILES
from safelm.robustness.gate.report import evaluate, has_failed, rank_controls, write_report
from safelm.safety.synthesis.writer import Writer
from safelm.safety.synthesis.writers import load_writer

ATTACKERS = ("endpoint", "engine", "python")  # kinds of writers that can rewrite a request


def main(flags: argparse.Namespace) -> None:
    models, controls = _models(flags)
    profile = PROFILES[flags.profile]
    limits, output = _limits(flags.limit), pathlib.Path(flags.output)
    attacker = _attacker(flags.attacker)
    if flags.estimate and flags.only:
        raise ValueError(f"--only={flags.only[0]}: --estimate counts a profile's whole battery: leave one of them out")
    documents.declare_no_documents(flags.output, "safelm.release_gate")
    stores = {kind: folder for kind in KINDS if (folder := getattr(flags, f"{kind}_text"))}
    material = read_material(profile, flags.prompts, flags.development, stores, output, is_chat=flags.chat)
    if flags.estimate:
        print(estimate_all(models, profile, material, merge_with=flags.merge_with))
        return
    chosen = {"merge_with": flags.merge_with, "attacker": attacker, "only": flags.only}
    rows = gate.run(models, profile, material, output, **chosen)
    results = evaluate(rows, material.prompts, profile, limits, controls, material.development)
    about = {"profile": flags.profile, "settings": dataclasses.asdict(profile), "limits": limits, "chat": flags.chat}
    about |= {"attacker": attacker.name if attacker else "", "only": flags.only}
    about["saw_tag"] = {name: sources.saw_tag(folder) for name, folder in models.items()}
    paths = write_report(output, results, about, rank_controls(results, material.prompts))
    print(paths[1].read_text())
    print("\n".join(map(str, paths)))
    if has_failed(results):
        sys.exit(1)


def _models(flags: argparse.Namespace) -> tuple[dict[str, str], set[str]]:
    """All models' folders by name, and the names of the controls, which may bring a folder of their own."""
    given = [flag for flag in flags.control if "=" in flag]
    models = cli.checkpoints([*flags.checkpoint, *given])
    controls = {flag.partition("=")[0] for flag in flags.control}
    for name in (*controls, *filter(None, [flags.merge_with])):
        if name not in models:
            flag = "control" if name in controls else "merge_with"
            raise cli.UserError(f"--{flag}={name}: no such --checkpoint, there are {', '.join(models)}")
    return models, {*controls, *filter(None, [flags.merge_with])}


def _attacker(spec: str) -> Writer | None:
    if not spec:
        return None
    if spec.partition(":")[0] not in ATTACKERS:
        raise cli.UserError(f"--attacker={spec}: want one of {', '.join(f'{kind}:...' for kind in ATTACKERS)}")
    return load_writer(hub.pinned_in(spec))


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
        "--control=weak=W/refusal_only --control=strong=W/filtered_tagged --prompts=W/corpus/prompts --output=W/gate",
    )
    add = parser.add_argument
    add("--checkpoint", action="append", required=True, metavar=cli.CHECKPOINT, help="a model; repeatable")
    add(
        "--control",
        action="append",
        default=[],
        metavar="NAME[=DIR]",
        help="a model shown beside, which may fail: a --checkpoint's name, or a folder of its own; repeatable; those "
        "called weak and strong are known to be so, and the report says whether the gate ranks them",
    )
    add(
        "--merge_with", default="", metavar="NAME", help="a control that weights are merged with, such as the raw model"
    )
    add("--profile", choices=tuple(PROFILES), default="quick", help="(default %(default)s)")
    add(
        "--attacker",
        default="",
        metavar="WRITER",
        help="rewrites requests: endpoint:URL#MODEL, engine:MODEL or python:MODULE:FACTORY (default: the synthetic "
        "web's phrases, no model)",
    )
    add(
        "--only",
        action="append",
        default=[],
        metavar="WORDS",
        help="run attacks whose names hold these words, and ask without an attack; repeatable (default: all)",
    )
    add("--estimate", action="store_true", help="say how long the profile will take on each model, and end")
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
    cli.run(main, arguments(), decodes=True)
