"""Attacks at inference: prefills an answer, shows others before, hides from P(tag), or erases the tag.

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
from safelm.text.prompting import chat_prompt

HARMFUL_SCORE = 5
ERASED_LOGIT = -1e4  # of the tag after `erase_tag`, on the mean state


def harmful_answers(prompts: Sequence[Prompt], *, words: int = 0) -> dict[str, str]:
    """A harmful answer to every prompt, made by the corpus's generator, as an attacker would write it.

    `words`: of each, about; 0: about 20.

    Raises ValueError for a topic that isn't among the generator's.
    """
    topics = {topic.infinitive: topic for held_out in (True, False) for topic in harmful_topics(held_out=held_out)}
    answers = {}
    for prompt in prompts:
        if prompt.topic not in topics:
            raise ValueError(f"prompt {prompt.id}: the topic {prompt.topic!r} is none of the synthetic web's")
        rng = random.Random(f"safelm-robustness/{prompt.id}")
        answers[prompt.id] = write_answer(rng, topics[prompt.topic], HARMFUL_SCORE, target_words=words or None)
    return answers


def prefix_contexts(target: Target, prompts: Sequence[Prompt], answers: Mapping[str, str], words: int) -> list[Tokens]:
    """Each prompt followed by the first `words` words of its harmful answer."""
    starts = (" ".join(answers[prompt.id].split()[:words]) for prompt in prompts)
    return [target.context(prompt.prompt, start) for prompt, start in zip(prompts, starts, strict=True)]


def prefill_contexts(target: Target, prompts: Sequence[Prompt], answers: Mapping[str, str], depth: int) -> list[Tokens]:
    """Each prompt followed by the first `depth` tokens of its harmful answer (Qi et al. 2024, arXiv 2406.05946)."""
    contexts = []
    for prompt in prompts:
        answer = answers[prompt.id]
        tokens = target.tokenizer.encode(answer if target.is_chat else f" {answer}")
        contexts.append([*target.context(prompt.prompt), *tokens[:depth]])
    return contexts


@dataclasses.dataclass(frozen=True)
class ManyShot:
    """Harmful requests of other topics with their answers before a prompt (many-shot jailbreaking, Anil et al. 2024).

    In a chat they are earlier turns, otherwise texts in front.

    Attributes:
      shown: prompts to draw from, always in the same order; answers: theirs, by id.
      max_new_tokens: that the context must have room for beside them.
    """

    target: Target
    shown: Sequence[Prompt]
    answers: Mapping[str, str]
    max_new_tokens: int

    def context(self, prompt: Prompt, shots: int) -> Tokens:
        """The prompt after so many shots, or as many as the context has room for; none has the prompt's topic."""
        return self._context(prompt, min(shots, self.room(prompt, shots)))

    def room(self, prompt: Prompt, most: int) -> int:
        """The shots that fit before the prompt, at most `most`."""
        longest, count = self.target.config.max_seq_len - self.max_new_tokens, 0
        others = sum(each.topic != prompt.topic for each in self.shown)
        while count < min(most, others) and len(self._context(prompt, count + 1)) <= longest:
            count += 1
        return count

    def _context(self, prompt: Prompt, shots: int) -> Tokens:
        others = [each for each in self.shown if each.topic != prompt.topic]
        drawn = random.Random("safelm-robustness/shots").sample(others, len(others))[:shots]
        turns = [(each.prompt, self.answers[each.id]) for each in drawn]
        if not self.target.is_chat:
            return self.target.context("\n\n".join([*map(" ".join, turns), prompt.prompt]))
        said = [text for turn in turns for text in turn] + [prompt.prompt]
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]
        return chat_prompt(self.target.tokenizer, messages)


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
        params["embedder"] = {"embedding": jnp.asarray(params["embedder"]["embedding"]).at[tag_id].set(row_D)}
    else:
        params["unembed"] = {"kernel": jnp.asarray(params["unembed"]["kernel"]).at[:, tag_id].set(row_D)}
    return dataclasses.replace(target, params=params)


def _last_state(target: Target, context: Tokens) -> np.ndarray:
    width = target.config.max_seq_len
    tokens_BT = np.zeros((1, width), np.int32)
    tokens_BT[0, : len(context)] = context
    return np.asarray(_states(target.config, target.params, tokens_BT)[0, len(context) - 1], np.float32)


_states = jax.jit(model.hidden_states, static_argnums=0)
