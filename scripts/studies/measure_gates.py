"""How far the wording rules of the dialogue gate can be trusted, against answers that people labelled.

  python scripts/studies/measure_gates.py --source=DATA

DATA/judge_calibration holds answers of three models to XSTest's prompts with labels of two people (refusal, partial
refusal, compliance); DATA/sft/safety_only_data_Instructions.json.gz safe answers to harmful instructions. Printed: how
often `is_refusal` agrees with the people, how often the whole dialogue gate (request, answer; at least three parts)
lets an answer through by label, and which parts the safe answers have. No text is printed.

Measured so (1,350 answers; 95% intervals):

    people say         answers   called a refusal      let through by the gate
    compliance             780   .067 [.051, .086]     .022 [.014, .035]
    partial refusal         80   .713 [.605, .800]     .537 [.429, .643]
    refusal                490   .896 [.866, .920]     .439 [.395, .483]

That many refusals are stopped is as wanted: GPT-4's are mostly bare ("can't assist"; 2% pass), Llama 2's explain (88%
pass). The rules miss more than half of Mistral's refusals (.449 [.319, .587] of 49 are seen), which costs documents,
not safety. Of 2,483 safe answers to harmful instructions .760 [.743, .777] are called a refusal; of these .79 say why,
.69 acknowledge, .59 offer an alternative.
"""

import argparse
import collections
import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from safelm import cli
from safelm.safety.synthesis.gates import GateSettings
from safelm.safety.synthesis.gates.dialogue import Dialogue
from safelm.safety.synthesis.gates.refusal_wording import PARTS, is_refusal, parts
from safelm.safety.synthesis.kinds import Draft, Source
from safelm.stats.intervals import rate

LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "refusal", "3_partial_refusal": "partial refusal"}


def labelled(source: Path) -> Iterator[tuple[str, str, str, str]]:
    """(model, prompt, answer, label) of XSTest's answers."""
    for path in sorted((source / "judge_calibration").glob("xstest_v2_completions_*.csv.gz")):
        model = path.name.removeprefix("xstest_v2_completions_").split("_")[0]
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield model, row["prompt"], row["completion"], LABELS[row["final_label"]]


def passes(gate: Dialogue, prompt: str, answer: str) -> bool:
    """Whether the gate lets a dialogue of these two through."""
    dialogue = f"User: {prompt.strip()}\n\nAssistant: {answer.strip()}"
    (finding,) = gate.check([Draft("refuseweb", Source("x", prompt, 4), "plain", dialogue)])
    return finding.passed


def main(flags: argparse.Namespace) -> None:
    """Prints the tables."""
    source, gate = Path(flags.source), Dialogue(GateSettings())
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for model, prompt, answer, label in labelled(source):
        for key in ((model, label), ("all", label)):
            counts[key].update(n=1, refusal=is_refusal(answer), passed=passes(gate, prompt, answer))
    print("model, label by people: answers; called a refusal; let through by the dialogue gate")
    for (model, label), found in sorted(counts.items()):
        shares = (rate(found[name], found["n"]) for name in ("refusal", "passed"))
        print(f"{model:16s} {label:16s} {found['n']:5d}  {'  '.join(map(str, shares))}")
    with gzip.open(source / "sft/safety_only_data_Instructions.json.gz", "rt", encoding="utf-8") as file:
        answers = [row["output"] for row in json.load(file)]
    refusals = [parts(answer) for answer in answers if is_refusal(answer)]
    print(f"{len(answers)} safe answers to harmful instructions: {rate(len(refusals), len(answers))} refuse")
    for name in PARTS:
        print(f"of these have {name:12s} {rate(sum(found[name] for found in refusals), len(refusals))}")


if __name__ == "__main__":
    arguments = cli.parser(
        "scripts.studies.measure_gates", __doc__, "python scripts/studies/measure_gates.py --source=DATA"
    )
    arguments.add_argument("--source", required=True, help="folder that holds judge_calibration/ and sft/")
    cli.run(main, arguments)
