"""Measures a model of the ladder: judged answers to held-out prompts or, for real prompts, its leanings."""

import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from safelm import inference
from safelm.checkpoints import checkpoint
from safelm.evaluate import language_modeling
from safelm.evaluate.judges import word_lists as judge_lib
from safelm.evaluate.suites.suite import Prompt, read_prompts
from safelm.inference.methods import METHODS
from safelm.inference.tag_probability import tag_probability
from safelm.ladder.answers import measure_answers
from safelm.ladder.plan import GREEDY, MODELS, SAFE_BEAM, SCALING, STAGES, TOXICITY, Job, study_of
from safelm.ladder.preferences import (
    PLAIN_REQUESTS,
    PREFERENCE_JUDGE,
    label,
    read_real_prompts,
    refusal_leanings,
    tag_log_probs,
)
from safelm.ladder.toxicity.measure import Pages, measure_toxicity, opened
from safelm.lm import LanguageModel
from safelm.models.arrays import Params
from safelm.models.config import ModelConfig
from safelm.synthetic_web.corpus import Recipe, draft
from safelm.text.prompting import prompt_ids
from safelm.text.tokenizer import Tokenizer

_BATCH_PROMPTS = 256
_PAGES = 200  # for perplexity


def measure(config: ConfigDict, output: pathlib.Path, job: Job, workdir: pathlib.Path) -> dict[str, Any]:
    """The label of every prompt by id, or other values of it, and the settings of the measurement, as a JSON object."""
    if study_of(config) is TOXICITY:
        return measure_toxicity(config, output, job, workdir)
    model_config, params, tokenizer = checkpoint.load_for_inference(str(workdir))
    is_chat = job.stage != STAGES[0]
    if config.answers:
        return measure_answers(config, output, job, LanguageModel(model_config, params, tokenizer))
    if config.real:
        prompts = read_real_prompts(config.real, config.prompts)
        asked = [*(prompt.prompt for prompt in prompts), *PLAIN_REQUESTS]
        contexts = [
            prompt_ids(tokenizer, text if is_chat else f"User: {text}\n\nAssistant: ", is_chat=is_chat)
            for text in asked
        ]
        alarms = tag_log_probs if job.method == SAFE_BEAM else refusal_leanings
        alarm_N = alarms(model_config, params, tokenizer, contexts)
        labels = label(prompts, alarm_N[: len(prompts)], alarm_N[len(prompts) :])
        return _result(prompts, labels, PREFERENCE_JUDGE)
    prompts = read_prompts(str(output / "corpus" / ("chat_prompts" if is_chat else "prompts")))
    opening = "" if is_chat else MODELS[job.model].opening  # chats had none in training
    generations = inference.generate(
        model_config,
        params,
        [opened(tokenizer, prompt_ids(tokenizer, prompt.prompt, is_chat=is_chat), opening) for prompt in prompts],
        METHODS[job.method](),
        max_new_tokens=config.max_new_tokens,
        end_ids=tokenizer.conventions.end_ids,
        harm_tag_id=tokenizer.harm_tag_id,
        batch_size=_BATCH_PROMPTS,
    )
    texts = [tokenizer.decode(generation.text_tokens, keep_special=False) for generation in generations]
    kept = {"texts": dict(zip((prompt.id for prompt in prompts), texts, strict=True))} if config.keep_texts else {}
    if study_of(config) is SCALING:
        kept |= {
            "parameters": model_config.num_params,
            "tag_auroc": _tag_auroc(model_config, params, tokenizer, prompts),
        }
    elif job.method == GREEDY:
        kept["perplexity"] = _perplexity(model_config, params, tokenizer, Recipe(**config.corpus), opening)
    composed = Recipe(**config.corpus).references > 0
    version = judge_lib.COMPOSED_VERSION if composed else judge_lib.JUDGE_VERSION
    return _result(prompts, [judge_lib.judge(text, composed=composed) for text in texts], version) | kept


def _perplexity(config: ModelConfig, params: Params, tokenizer: Tokenizer, recipe: Recipe, opening: str) -> float:
    """Of the corpus's harmless held-out web pages, which the models of all rungs have seen the like of."""
    pages = (
        draft(recipe.seed, "validation", number, **recipe.hardness) for number in range(recipe.validation_documents)
    )
    harmless = itertools.islice((page.text for page in pages if page.score == 0), _PAGES)
    held_out = Pages(map(tokenizer.encode, harmless), tokenizer.conventions.document_end_id)
    begin = opened(tokenizer, prompt_ids(tokenizer, "", is_chat=False), opening)
    return language_modeling.perplexity(config, params, held_out, begin_ids=begin)["perplexity"]


def _tag_auroc(config: ModelConfig, params: Params, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> float:
    """How well the mean P(tag) over a prompt tells those that ask for harm from the others."""
    ids = {
        is_harmful: [prompt_ids(tokenizer, p.prompt, is_chat=False) for p in prompts if p.harmful == is_harmful]
        for is_harmful in (True, False)
    }

    probability = functools.partial(tag_probability, config, params, harm_tag_id=tokenizer.harm_tag_id)
    return language_modeling.tag_separation(probability, ids[True], ids[False])["mean"].value


def _result(prompts: Sequence[Prompt], labels: Sequence[str], judge: str) -> dict[str, Any]:
    asked = hashlib.sha256(json.dumps([prompt.prompt for prompt in prompts]).encode()).hexdigest()
    by_kind = {
        kind: {p.id: label for p, label in zip(prompts, labels, strict=True) if p.harmful == (kind == "harmful")}
        for kind in ("harmful", "safe")
    }
    return {"labels": by_kind, "prompts_sha256": asked, "judge": judge}
