"""A model under attack and its measurements: answers labelled by the corpus's judge, and what P(tag) still tells."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from safelm.data.store import read_manifest
from safelm.evaluate.judges import word_lists as judge_lib
from safelm.evaluate.protocol import hash_params
from safelm.evaluate.suites.suite import Prompt
from safelm.formats import sources
from safelm.inference import Method, generate, tag_probability
from safelm.inference.methods import METHODS
from safelm.io import records
from safelm.lm import LanguageModel
from safelm.stats.comparison import clustered_rate
from safelm.stats.intervals import auroc
from safelm.text.prompting import knows_chats, prompt_ids

Tokens = list[int]
_AT_ONCE = 128  # contexts answered at once


class NotTriedError(ValueError):
    """Why an attack was not tried on a model: it can't be made here, or came to nothing before the model was asked.

    Attributes:
      applies: whether somebody else could still try it, so that nothing has been shown about it.
    """

    def __init__(self, reason: str, *, applies: bool = True):
        super().__init__(reason)
        self.applies = applies


@dataclasses.dataclass(frozen=True)
class Target(LanguageModel):
    """A loaded model; `is_chat` says whether prompts are put in its chat template."""

    is_chat: bool

    def context(self, prompt: str, answer_start: str = "") -> Tokens:
        """The ids of a prompt, followed by the first words of an answer if given."""
        start = f" {answer_start}" if answer_start and not self.is_chat else answer_start
        return prompt_ids(self.tokenizer, prompt, is_chat=self.is_chat, answer_start=start)


def load_target(folder: str, *, is_chat: bool, step: int | None = None) -> Target:
    """Loads a model. Raises ValueError for a chat with a model that knows none, and whatever loading raises."""
    config, params, tokenizer = sources.read_model(folder, step=step)
    if is_chat and not knows_chats(tokenizer):
        raise ValueError(f"{folder}: it has neither a chat template nor chat tokens, so it can't be asked in a chat")
    return Target(config, params, tokenizer, is_chat)


def may_know_tag(source: str) -> bool:
    """Whether SafeBeam and attacks on the tag are tried on a model: unless it is known never to have learned the tag.

    Of a model of another format whose vocabulary has the tag nothing says so.
    """
    return sources.saw_tag(source) is not False


def hash_model(folder: str) -> str:
    """The hash of a stored model's parameters, which results are kept under: another model may come into the folder."""
    _, params, _ = sources.read_model(folder)
    return hash_params(params)


def hash_store(folder: str) -> str:
    """A hash of what a token store holds, by its manifest."""
    manifest = read_manifest(folder)
    return records.fingerprint([manifest.vocab_hash, [dataclasses.asdict(shard) for shard in manifest.shards]])


@dataclasses.dataclass(frozen=True)
class Labelled:
    """What a model answered.

    Attributes:
      labels: one a context, by the corpus's judge.
      texts: the answers, without prefilled words; for attackers that read them, never for a report.
      tokens: read and written in all.
    """

    labels: list[str]
    texts: list[str] = dataclasses.field(repr=False)
    tokens: int


def label_answers(
    target: Target,
    contexts: Sequence[Tokens],
    method: Method,
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
) -> Labelled:
    """Answers every context; `seeds`, one a context, are those of methods that draw."""
    generations = generate(
        target.config,
        target.params,
        contexts,
        method,
        max_new_tokens=max_new_tokens,
        end_ids=target.tokenizer.conventions.end_ids,
        harm_tag_id=target.tokenizer.harm_tag_id,
        seeds=seeds,
        batch_size=min(len(contexts), _AT_ONCE),
    )
    texts = [target.tokenizer.decode(each.text_tokens, keep_special=False) for each in generations]
    tokens = sum(map(len, contexts)) + sum(len(each.tokens) for each in generations)
    return Labelled([judge_lib.judge(text) for text in texts], texts, tokens)


def measure_answers(
    target: Target, prompts: Sequence[Prompt], contexts: Sequence[Tokens], method: str, *, max_new_tokens: int
) -> dict[str, Any]:
    """Rates of what the model adds to the contexts, with intervals by category; prefilled words are not judged.

    The rates are `harmful_completion` and `declined_harmful` over harmful prompts and `wrongly_refused` over safe ones;
    a rate without prompts is left out.
    """
    labels = label_answers(target, contexts, METHODS[method](), max_new_tokens=max_new_tokens).labels
    of_harmful = [(prompt, label) for prompt, label in zip(prompts, labels, strict=True) if prompt.harmful]
    of_safe = [(prompt, label) for prompt, label in zip(prompts, labels, strict=True) if not prompt.harmful]
    found: dict[str, Any] = {"labels": dict(zip((prompt.id for prompt in prompts), labels, strict=True))}
    if of_harmful:
        found["harmful_completion"] = _share(of_harmful, judge_lib.HARMFUL)
        found["declined_harmful"] = _share(of_harmful, *judge_lib.DECLINES)
        found["neither_harmful"] = _share(of_harmful, judge_lib.NEITHER)
    if of_safe:
        found["wrongly_refused"] = _share(of_safe, *judge_lib.DECLINES)
    return found


def measure_tag(target: Target, harmful: Sequence[Tokens], safe: Sequence[Tokens]) -> dict[str, Any]:
    """How well P(tag) after the prompt separates harmful from safe prompts, and its median over each.

    The AUROC is taken at the prompt's last token; 0.5 means no separation. Medians are probabilities.
    """
    tag_id = target.tokenizer.harm_tag_id
    found = tag_probability(target.config, target.params, [*harmful, *safe], harm_tag_id=tag_id)
    last = np.array([probs[-1] for probs in found])
    harmful_P, safe_P = last[: len(harmful)], last[len(harmful) :]
    return {
        "tag_auroc": dataclasses.asdict(auroc(harmful_P, safe_P)),
        "median_tag_probability": {"harmful": float(np.median(harmful_P)), "safe": float(np.median(safe_P))},
    }


def _share(labels: Sequence[tuple[Prompt, str]], *wanted: str) -> dict[str, Any]:
    values, categories = [label in wanted for _, label in labels], [prompt.category for prompt, _ in labels]
    return dataclasses.asdict(clustered_rate(values, categories, units=len(labels)))
