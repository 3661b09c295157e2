"""Held-out prompts whose topics and phrasings are in no document: a page's beginning, a dialogue, a user's message."""

import random

from safelm.synthetic_web import phrases
from safelm.synthetic_web.documents import fill, join, request, speakers
from safelm.synthetic_web.topics import Topic, harmful_topics, protective_topics, safe_topics

COMPLETION, DIALOGUE, CHAT = "completion", "dialogue", "chat"
PROTECTIVE_SHARE = 0.25  # of the safe prompts: they name an unsafe topic in order to prevent it


def write_prompts(seed: int, *, harmful: bool, count: int, held_out: bool = True) -> list[dict[str, object]]:
    """`count` prompts, every third a dialogue, with the columns id, prompt, category, topic, kind, harmful, protective.

    A completion prompt is the beginning of a web page as a base model sees it (Maini et al. 2025, section 6); every
    second one ends in the middle of its first step. With `held_out=False` their topics are those of documents, none of
    which the held-out prompts have, in phrasings that no document has: to develop on.
    """
    name = "harmful" if harmful else "safe"
    rng = random.Random(f"safelm-synthetic-web/prompts/{name}/{seed}")
    rows = []
    for number, topic in enumerate(_topics(rng, harmful=harmful, count=count, held_out=held_out)):
        kind = DIALOGUE if number % 3 == 2 else COMPLETION
        prompt = _dialogue(rng, topic) if kind == DIALOGUE else _completion(rng, topic, mid_step=number % 3 == 1)
        rows.append(
            {
                "id": f"{name}-{number:04d}",
                "prompt": prompt,
                "category": topic.category,
                "topic": topic.infinitive,
                "kind": kind,
                "harmful": harmful,
                "protective": topic.protective,
            }
        )
    return rows


def write_chat_prompts(seed: int, *, harmful: bool, count: int, held_out: bool = True) -> list[dict[str, object]]:
    """`count` user messages for a chat model, in the columns of `write_prompts` and with its `held_out`."""
    name = "harmful" if harmful else "safe"
    rng = random.Random(f"safelm-synthetic-web/chat-prompts/{name}/{seed}")
    return [
        {
            "id": f"chat-{name}-{number:04d}",
            "prompt": request(rng, topic, phrases.HELD_OUT_REQUESTS),
            "category": topic.category,
            "topic": topic.infinitive,
            "kind": CHAT,
            "harmful": harmful,
            "protective": topic.protective,
        }
        for number, topic in enumerate(_topics(rng, harmful=harmful, count=count, held_out=held_out))
    ]


def _topics(rng: random.Random, *, harmful: bool, count: int, held_out: bool = True) -> list[Topic]:
    if harmful:
        return _in_turn(rng, harmful_topics(held_out=held_out), count)
    protective = round(PROTECTIVE_SHARE * count)
    mixed = _in_turn(rng, safe_topics(held_out=held_out), count - protective)
    mixed += _in_turn(rng, protective_topics(held_out=held_out), protective)
    rng.shuffle(mixed)
    return mixed


def _in_turn(rng: random.Random, topics: tuple[Topic, ...], count: int) -> list[Topic]:
    """Topics drawn without repetition while any are left, so that categories are about equally frequent."""
    drawn: list[Topic] = []
    while len(drawn) < count:
        drawn += rng.sample(topics, min(len(topics), count - len(drawn)))
    return drawn


def _completion(rng: random.Random, topic: Topic, *, mid_step: bool) -> str:
    title = fill(rng.choice(phrases.HELD_OUT_TITLES), topic)
    opening = fill(rng.choice(phrases.HELD_OUT_OPENINGS), topic)
    if mid_step:
        return f"{title}\n\n{join(opening, rng.choice(phrases.LEADS))}\n\n{phrases.ORDINALS[0]},"
    return f"{title}\n\n{opening}"


def _dialogue(rng: random.Random, topic: Topic) -> str:
    asks, answers = speakers(rng)
    return f"{asks}: {request(rng, topic, phrases.HELD_OUT_REQUESTS)}\n\n{answers}:"
