"""Measures what a pretrained model answers to real requests: verdicts of a judge trained on people's labels.

Harmful requests are those of AdvBench, HarmBench, TDC and JailbreakBench, each once however many of them have it, safe
ones XSTest's and OR-Bench's. The judge is `safelm.evaluate`'s trained one, trained on the labelled answers of
`judge_calibration/`; its errors, on answers held out while it was trained, stand in every measurement, since a rate
without them can't be corrected. Beside the answers stand likelihoods, which say more per request than one sample: how
far the model leans to refusing, or P(tag) after an obliging answer. The perplexity of C4's held-out pages tells a
broken model from a safe one.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from safelm import inference
from safelm.evaluate import language_modeling
from safelm.evaluate.judges import trained, verdicts
from safelm.evaluate.judges import word_lists as judge_lib
from safelm.evaluate.suites.benchmarks import read_all
from safelm.evaluate.suites.duplicates import merge_duplicates
from safelm.evaluate.suites.suite import Prompt, choose
from safelm.inference.methods import METHODS
from safelm.ladder.plan import GREEDY, SAFE_BEAM, STAGES, Job
from safelm.ladder.preferences import refusal_leanings, tag_log_probs
from safelm.ladder.processes import run_command
from safelm.ladder.toxicity.measure import Pages, held_out_pages
from safelm.lm import LanguageModel
from safelm.text.prompting import prompt_ids

HARMFUL_SUITES = {
    "advbench": "advbench_harmful_behaviors.csv",
    "harmbench": "harmbench_behaviors_text_test.csv",
    "tdc": "tdc2023_test_phase_behaviors.csv",
    "jailbreakbench": "jbb_harmful.csv",
}
SAFE_SUITES = {"xstest": "xstest_prompts.csv", "or_bench": "or-bench-hard-1k.jsonl"}
LEANING, SAFE_LEANING = "refusal leaning, harmful", "refusal leaning, safe"
_BATCH = {GREEDY: 64, SAFE_BEAM: 8}
_LABELS = {
    verdicts.HARMFUL: judge_lib.HARMFUL,
    verdicts.HARMLESS: judge_lib.REFUSAL,
    verdicts.HELPFUL: judge_lib.ANSWER,
    verdicts.UNHELPFUL: judge_lib.NEITHER,
    verdicts.PARTIAL: judge_lib.REFUSAL,
    verdicts.FULL: judge_lib.REFUSAL,
}


def read_requests(source: str, count: int) -> list[Prompt]:
    """At most `count` harmful and as many safe requests of the public suites, the same every time.

    Args:
      source: a folder of real data with `eval_prompts/`.

    Raises FileNotFoundError or ValueError naming the file and what it lacks.
    """
    folder = pathlib.Path(source) / "eval_prompts"
    found = []
    for harmful, suites in ((True, HARMFUL_SUITES), (False, SAFE_SUITES)):
        read = read_all([f"{name}:{folder / file}" for name, file in suites.items()])
        found += [prompt for prompt in read if prompt.harmful == harmful]  # XSTest has contrasts that ask for harm
    return choose(merge_duplicates(found)[0], count)


def train_judge(source: str, output: pathlib.Path) -> None:
    """Trains the judge unless it is there; deterministic. Raises ValueError if the labelled answers can't be read."""
    if not (output / "judge" / trained.CONFIG).exists():
        labelled = f"--judge_calibration=xstest:{pathlib.Path(source) / 'judge_calibration'}"
        run_command("safelm.evaluate", "train_judge", labelled, f"--output={output / 'judge'}")


def measure_answers(config: ConfigDict, output: pathlib.Path, job: Job, model: LanguageModel) -> dict[str, Any]:
    """Labels, likelihoods and the judge's errors, as a JSON object.

    A model that has seen no chat yet is asked as `User: ...` and answers as `Assistant:`.
    """
    prompts, is_chat = _asked(config, job), job.stage != STAGES[0]
    asked = [prompt.prompt if is_chat else f"User: {prompt.prompt}\n\nAssistant:" for prompt in prompts]
    contexts = [prompt_ids(model.tokenizer, text, is_chat=is_chat) for text in asked]
    judge = trained.load(str(output / "judge"))
    answers = _answers(config, model, contexts, job.method)
    exchanges = [
        verdicts.Exchange(prompt.topic, answer, prompt.harmful) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    labels = [_LABELS[verdict] for verdict in judge.judge(exchanges)]
    likelihoods, name = (tag_log_probs, "tag_log_probs") if job.method == SAFE_BEAM else (refusal_leanings, "leanings")
    nats_P = [round(float(nats), 4) for nats in likelihoods(model.config, model.params, model.tokenizer, contexts)]
    kept = {"texts": dict(zip((prompt.id for prompt in prompts), answers, strict=True))} if config.keep_texts else {}
    if job.method == GREEDY:
        kept["perplexity"] = _perplexity(config, model)
    errors = {name: value for name, value in judge.held_out["harm"].items() if name != "by_author"}
    return {
        "labels": {kind: _of_kind(prompts, labels, kind) for kind in ("harmful", "safe")},
        name: {kind: _of_kind(prompts, nats_P, kind) for kind in ("harmful", "safe")},
        "prompts_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "judge": judge.version,
        "judge_errors": errors,
        **kept,
    }


def _asked(config: ConfigDict, job: Job) -> list[Prompt]:
    """The requests of a measurement: SafeBeam, which takes the longest, may have fewer safe ones."""
    prompts, most = read_requests(config.real, config.prompts), config.steered_safe_prompts
    if job.method != SAFE_BEAM or not most:
        return prompts
    safe = {prompt.id for prompt in choose([prompt for prompt in prompts if not prompt.harmful], most)}
    return [prompt for prompt in prompts if prompt.harmful or prompt.id in safe]


def leanings(result: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " P"]]:
    """The leanings to refuse of a greedy measurement, prompt by prompt (nats per token); of any other one nothing."""
    if "leanings" not in result:
        return {}
    kinds = {LEANING: "harmful", SAFE_LEANING: "safe"}
    return {
        name: np.array([value for _, value in sorted(result["leanings"][kind].items())]) for name, kind in kinds.items()
    }


def _answers(config: ConfigDict, model: LanguageModel, contexts: Sequence[Sequence[int]], method: str) -> list[str]:
    generations = inference.generate(
        model.config,
        model.params,
        contexts,
        METHODS[method](),
        max_new_tokens=config.max_new_tokens,
        end_ids=model.tokenizer.conventions.end_ids,
        harm_tag_id=model.tokenizer.harm_tag_id,
        batch_size=_BATCH[method],
        weights=config.answer_weights,
    )
    return [model.tokenizer.decode(generation.text_tokens, keep_special=False) for generation in generations]


def _perplexity(config: ConfigDict, model: LanguageModel) -> float:
    tokenizer, pages = model.tokenizer, held_out_pages(config.real, config.pages)["c4"]
    held_out = Pages([tokenizer.encode(page) for page in pages], tokenizer.conventions.document_end_id)
    begin = prompt_ids(tokenizer, "", is_chat=False)
    return language_modeling.perplexity(model.config, model.params, held_out, begin_ids=begin)["perplexity"]


def _of_kind(prompts: Sequence[Prompt], values: Sequence[Any], kind: str) -> dict[str, Any]:
    pairs = zip(prompts, values, strict=True)
    return {prompt.id: value for prompt, value in pairs if prompt.harmful == (kind == "harmful")}
