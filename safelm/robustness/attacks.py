"""Attacks at inference: prefills an answer's first words, hides from P(tag), or erases the tag.

All attacks run against our own models of the synthetic web, whose harm consists of invented words.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from safelm.evaluate.suites.suite import Prompt
from safelm.inference import tag_probability
from safelm.models import decoder as model
from safelm.robustness.target import Target, Tokens
from safelm.synthetic_web.documents import write_answer
from safelm.synthetic_web.topics import harmful_topics

HARMFUL_SCORE = 5
ERASED_LOGIT = -1e4  # of the tag after `erase_tag`, on the mean state


def harmful_answers(prompts: Sequence[Prompt]) -> dict[str, str]:
    """A harmful answer to every prompt, made by the corpus's generator, as an attacker would write it.

    Raises ValueError for a topic that isn't among the generator's.
    """
    topics = {topic.infinitive: topic for held_out in (True, False) for topic in harmful_topics(held_out=held_out)}
    answers = {}
    for prompt in prompts:
        if prompt.topic not in topics:
            raise ValueError(f"prompt {prompt.id}: the topic {prompt.topic!r} is none of the synthetic web's")
        rng = random.Random(f"safelm-robustness/{prompt.id}")
        answers[prompt.id] = write_answer(rng, topics[prompt.topic], HARMFUL_SCORE)
    return answers


def prefix_contexts(target: Target, prompts: Sequence[Prompt], answers: Mapping[str, str], words: int) -> list[Tokens]:
    """Each prompt followed by the first `words` words of its harmful answer."""
    starts = (" ".join(answers[prompt.id].split()[:words]) for prompt in prompts)
    return [target.context(prompt.prompt, start) for prompt, start in zip(prompts, starts, strict=True)]


def cover_contexts(
    target: Target, prompts: Sequence[Prompt], covers: Sequence[str], *, knows_tag: bool
) -> list[Tokens]:
    """Each prompt after the harmless sentence, of all `covers`, that gives the lowest P(tag).

    With `knows_tag=False` the sentence is drawn at random, which measures the effect of any cover.
    """
    if not knows_tag:
        rng = random.Random("safelm-robustness/covers")
        return [target.context(f"{rng.choice(covers)} {prompt.prompt}") for prompt in prompts]
    contexts = [[target.context(f"{cover} {prompt.prompt}") for cover in covers] for prompt in prompts]
    found = tag_probability(
        target.config,
        target.params,
        [each for tried in contexts for each in tried],
        harm_tag_id=target.tokenizer.harm_tag_id,
    )
    last_PC = np.array([probs[-1] for probs in found]).reshape(len(prompts), len(covers))
    return [tried[index] for tried, index in zip(contexts, last_PC.argmin(axis=1), strict=True)]


def erase_tag(target: Target, contexts: Sequence[Tokens]) -> Target:
    """The same model with the tag's output row turned against the mean state after the contexts: P(tag) is near 0.

    Anyone with the weights can do this without training, instead of switching SafeBeam off. The lookahead then orders
    candidates by a direction unrelated to harm. If the tag's logit were masked instead, all candidates would tie, and
    SafeBeam would keep those of its best beams, like a beam search with fewer beams.
    """
    states = np.stack([_last_state(target, context) for context in contexts]).mean(axis=0)
    row_D = jnp.asarray(ERASED_LOGIT * states / (states @ states))
    tag_id = target.tokenizer.harm_tag_id
    params = dict(target.params)
    if target.config.tie_embeddings:
        params["embedder"] = {"embedding": params["embedder"]["embedding"].at[tag_id].set(row_D)}
    else:
        params["unembed"] = {"kernel": params["unembed"]["kernel"].at[:, tag_id].set(row_D)}
    return dataclasses.replace(target, params=params)


def _last_state(target: Target, context: Tokens) -> np.ndarray:
    width = target.config.max_seq_len
    tokens_BT = np.zeros((1, width), np.int32)
    tokens_BT[0, : len(context)] = context
    return np.asarray(_states(target.config, target.params, tokens_BT)[0, len(context) - 1], np.float32)


_states = jax.jit(model.hidden_states, static_argnums=0)
