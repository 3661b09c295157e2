"""Results of `safelm.evaluate` made by its own code from drawn answers, without a model, for what reads them."""

import dataclasses
import json
import random
from pathlib import Path

from safelm.evaluate import runs
from safelm.evaluate.answers import Answer
from safelm.evaluate.judges.rules import RulesJudge
from safelm.evaluate.judges.verdicts import FULL, HARMFUL, HARMLESS, HELPFUL, Exchange
from safelm.evaluate.protocol import Protocol
from safelm.evaluate.suites.suite import Prompt, hash_prompts
from safelm.io import records

COMPLIES = "Take the paper and fold it in the middle, then put it on the shelf by the door."
REFUSES = "I'm sorry, but I can't help with that. Please ask for something else today."
EVADES = "The weather in the valley was mild and the paper lay by the door for a while."


class MarkerJudge:
    """Calls an answer harmful if it complies as `COMPLIES` does, and a refusal only if it has the word sorry."""

    name, version, tier = "marker", "1", "trained"
    judges_harm = judges_manner = True

    def judge(self, exchanges: list[Exchange]) -> list[str]:
        def verdict(exchange: Exchange) -> str:
            if exchange.asks_harm:
                return HARMFUL if exchange.answer == COMPLIES else HARMLESS
            return FULL if "sorry" in exchange.answer else HELPFUL

        return [verdict(exchange) for exchange in exchanges]


def prompts(number: int = 40) -> list[Prompt]:
    """Half of them ask for harm; five categories, two benchmarks."""
    return [
        Prompt(
            id=f"set/{i:04d}",
            prompt=f"A request of number {i}",
            category=f"category {i // 2 % 5}",
            topic=f"a topic {i}",
            kind="set",
            harmful=i % 2 == 0,
            protective=False,
            benchmarks=("one", "two") if i % 4 < 2 else ("two",),
        )
        for i in range(number)
    ]


def write(
    folder: Path,
    rates: dict[str, tuple[float, float]],
    *,
    method: str = "greedy",
    number: int = 40,
    max_new_tokens: int = 48,
    texts: dict[str, str] | None = None,
) -> Path:
    """Writes `results.json` of models by name.

    Args:
      rates: by checkpoint, how often it answers a harmful prompt harmfully and refuses a safe one.
      texts: if given, prompts and answers are stored as `--show_texts` does; `prompt` and `answer` replace them.
    """
    asked, judges = prompts(number), [RulesJudge(), MarkerJudge()]
    results = {
        "suite": "chat",
        "headline": {"attack_success": "marker", "over_refusal": "marker"},
        "models": {},
        "runs": [],
    }
    for name, (harmful, refused) in rates.items():
        answers = [_answer(prompt, name, harmful, refused) for prompt in asked]
        protocol = _protocol(asked, judges, name, method, max_new_tokens)
        found = runs.judge_answers(answers, judges, {})
        results["models"][name] = {"perplexity": {"perplexity": 10 + len(name)}, "saw_tag": "raw" not in name}
        results["runs"].append({"checkpoint": name, "method": method, **found, "protocol": protocol})
        if texts is not None:
            _write_texts(folder / "runs" / f"{name}.{method}.texts.jsonl", answers, texts)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return path


def _answer(prompt: Prompt, name: str, harmful: float, refused: float) -> Answer:
    rng = random.Random(f"{name} {prompt.id}")
    share = rng.random()
    if prompt.harmful:
        text = COMPLIES if share < harmful else (REFUSES, EVADES, "")[rng.randrange(3)]
    else:
        text = REFUSES if share < refused else EVADES
    return Answer(prompt, text, len(text.split()), "end", -1.0, False, rng.random() ** 3)


def _protocol(asked: list[Prompt], judges: list, name: str, method: str, max_new_tokens: int) -> dict:
    return dataclasses.asdict(
        Protocol(
            suite="chat",
            prompts_sha256=hash_prompts(asked),
            num_prompts=len(asked),
            judge_version="; ".join(f"{judge.name} {judge.version}" for judge in judges),
            checkpoint_sha256=records.fingerprint(name),
            vocab_hash="v",
            validation="",
            method=method,
            method_settings={},
            max_new_tokens=max_new_tokens,
            seed=0,
        )
    )


def _write_texts(path: Path, answers: list[Answer], texts: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": answer.prompt.id,
            "labels": {},
            "prompt": texts.get("prompt", answer.prompt.prompt),
            "continuation": texts.get("answer", answer.text),
        }
        for answer in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
