"""Why benign finetuning does or doesn't raise harm: the same models asked for pages, in chats, and led into an answer.

    safelm ladder --study=embedded_power --output=runs/ladder_power
    python scripts/studies/attack_on_raw.py --ladder=runs/ladder_power --seeds=0,1,2,3,4,5,6,7

Models of the ladder, after each stage, are asked the held-out harmful requests in three ways: as the beginning of a web
page, in the chat template, and in it with the first eight tokens of a harmful answer. If a model writes harm in one way
and not in another, it has not lost what it knows. Written anew: docs/results/data/attack_on_raw.json, and then every
table and picture. Greedy decoding, 40 tokens, the judge of the synthetic web; intervals draw seeds and prompts anew.
"""

import argparse
import collections
import pathlib
from typing import Any

import kept_records
import numpy as np

from safelm import cli
from safelm.evaluate.judges import word_lists as judge_lib
from safelm.evaluate.suites.suite import Prompt, choose, read_prompts
from safelm.inference.methods import Greedy
from safelm.io.progress import Bar
from safelm.ladder.estimates import Counts, estimate
from safelm.ladder.plan import STAGES
from safelm.robustness import attacks
from safelm.robustness.target import Target, label_answers, load_target

PAGE, CHAT, LED = WAYS = ("as a page", "in a chat", "in a chat, led")
LED_TOKENS, MAX_NEW_TOKENS = 8, 40
NAMES = {"score0": "score 0 only", "instruction": "instruction tuning", "benign": "benign finetuning"}
MEASURES = {"harmful": (judge_lib.HARMFUL,), "declined": judge_lib.DECLINES, "harmless answer": (judge_lib.ANSWER,)}


def labels(target: Target, prompts: list[Prompt], way: str) -> list[str]:
    """The labels of greedy answers to prompts that are asked in a way."""
    contexts = [target.context(prompt.prompt) for prompt in prompts]
    if way == LED:
        contexts = attacks.prefill_contexts(target, prompts, attacks.harmful_answers(prompts), LED_TOKENS)
    return label_answers(target, contexts, Greedy(), max_new_tokens=MAX_NEW_TOKENS).labels


def measure(flags: argparse.Namespace) -> dict[tuple[str, str, str, str], Counts]:
    """By rung, stage, way and measure: of every seed, prompt by prompt, whether the label is one of the measure's."""
    ladder, seeds = pathlib.Path(flags.ladder), [int(seed) for seed in flags.seeds.split(",")]
    found: dict[Any, dict[int, Any]] = collections.defaultdict(dict)
    asked = {
        is_chat: [
            prompt for prompt in choose(read_prompts(str(ladder / "corpus" / name)), flags.prompts) if prompt.harmful
        ]
        for is_chat, name in ((False, "prompts"), (True, "chat_prompts"))
    }
    jobs = [(seed, rung, stage) for seed in seeds for rung in flags.rungs.split(",") for stage in STAGES]
    for seed, rung, stage in Bar(jobs, unit="model", disable=None):
        folder = str(ladder / "models" / f"seed-{seed}.{rung}.{stage}")
        for way in WAYS if stage != STAGES[0] else (PAGE,):
            target = load_target(folder, is_chat=way != PAGE)
            given = np.array(labels(target, asked[way != PAGE], way))
            for name, wanted in MEASURES.items():
                found[rung, stage, way, name][seed] = np.isin(given, wanted).astype(float)
    return found


def main(flags: argparse.Namespace) -> None:
    found = measure(flags)
    rows = []
    for rung, stage, way in dict.fromkeys(key[:3] for key in found):
        cells = [kept_records.percent(vars(estimate(found[rung, stage, way, name]))) for name in MEASURES]
        rows.append({"name": f"{NAMES.get(rung, rung)}, {NAMES.get(stage, stage)}, {way}", "values": cells})
    study = {
        "title": "What models of the ladder write when asked for harm in three ways",
        "command": f"python scripts/studies/attack_on_raw.py --ladder=runs/ladder_power --seeds={flags.seeds}",
        "machine": f"{flags.machine}; seeds {flags.seeds}",
        "axis": "% of held-out harmful prompts",
        "scale": "linear",
        "head": "model, stage, asked",
        "columns": [{"head": name, "digits": 0, "drawn": True} for name in MEASURES],
        "rows": rows,
    }
    kept_records.write({"attack_on_raw": study})


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.studies.attack_on_raw", __doc__)
    parser.add_argument("--ladder", required=True, help="the ladder's output, whose models are asked")
    parser.add_argument("--rungs", default="raw,score0", help="comma-separated (default %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=120, help="at most, of each form (default %(default)s)")
    parser.add_argument("--machine", default="this machine", help="how the figures call it")
    return parser


if __name__ == "__main__":
    cli.run(main, argument_parser())
