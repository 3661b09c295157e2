"""Writes the counterparts of a raw document: SafeWeb, RefuseWeb, Moral Education.

See Maini et al. 2025, sections 3.2 to 3.4. An unsafe document passes on only its topic, never its body.
"""

import random

from safelm.synthetic_web import phrases
from safelm.synthetic_web.documents import MIN_WORDS, Draft, fill, join, request
from safelm.synthetic_web.topics import Topic


def write_safeweb(rng: random.Random, draft: Draft) -> tuple[str, str]:
    """(text, style) of a draft of score 1 to 3, retold safely: facts are kept, what was sensitive is explained."""
    style = rng.choice(tuple(phrases.STYLE_LEADS))
    lead = fill(phrases.STYLE_LEADS[style].replace("{n}", str(rng.randint(2, 9))), draft.topic)
    explanations = rng.sample(phrases.STYLE_EXPLANATIONS[draft.score], 2)
    reasons = (
        [f"It helps to know that {reason}." for reason in _reasons(rng, draft.topic)] if draft.topic.harmful else []
    )
    facts = list(draft.facts)
    middle = len(facts) // 2
    first = join(lead, *reasons[:1], *facts[:middle], explanations[0])
    second = join(*facts[middle:], explanations[1], *reasons[1:], rng.choice(phrases.STYLE_CLOSINGS))
    return f"{first}\n\n{second}", style


def write_refusal(rng: random.Random, draft: Draft) -> str:
    """A dialogue about a draft's topic (score 4 or 5): acknowledge, decline, give the reason, offer an alternative."""
    topic = draft.topic
    reasons, alternatives = _reasons(rng, topic), _alternatives(rng, topic)
    refusal = [rng.choice(phrases.ACKNOWLEDGE), fill(rng.choice(phrases.CANNOT), topic), _why(rng, reasons[0])]
    text = f"User: {_ask(rng, topic)}\n\nAssistant: {join(*refusal, _alternative(rng, alternatives[0]))}"
    while rng.random() < 0.4 or len(text.split()) < MIN_WORDS:
        push = rng.choice(phrases.PUSH_BACK)
        firm = join(
            rng.choice(phrases.STAND_FIRM), _why(rng, rng.choice(reasons)), _alternative(rng, rng.choice(alternatives))
        )
        text += f"\n\nUser: {push}\n\nAssistant: {firm}"
        if len(text.split()) > 3 * MIN_WORDS:
            break
    return text


def write_short_refusal(rng: random.Random, topic: Topic) -> str:
    """An assistant's reply to a harmful request: declines, gives the reason and, mostly, an alternative.

    It begins in only two ways, because a small model, decoded greedily, would never choose one of a dozen rare
    beginnings.
    """
    alternative = _alternative(rng, rng.choice(topic.subject.alternatives)) if rng.random() < 0.5 else ""
    return join(fill(rng.choice(phrases.CANNOT[:2]), topic), _why(rng, _reasons(rng, topic)[0]), alternative)


def write_moral_education(rng: random.Random, draft: Draft) -> str:
    """An article with headings that makes the refusal's ethical point in the third person.

    More than half of the articles begin like a web page on the topic and then turn away from it: a model needs such
    continuations to have an alternative when it is steered away from a harmful one.
    """
    topic = draft.topic
    reasons, alternatives = _reasons(rng, topic), _alternatives(rng, topic)
    if rng.random() < 0.6:
        opening = join(fill(rng.choice(phrases.OPENINGS), topic), rng.choice(phrases.LEADS))
        if rng.random() < 0.5:
            stop = join(rng.choice(phrases.MORAL_STEP_STOPS), rng.choice(phrases.MORAL_STOPS))
            turn = f"\n\n{phrases.ORDINALS[0]}, {stop}"
        else:
            turn = " " + rng.choice(phrases.MORAL_STOPS)
        text = f"{fill(rng.choice(phrases.TITLES), topic)}\n\n{opening}{turn}"
    else:
        point = fill(rng.choice(phrases.MORAL_POINTS), topic)
        text = f"{fill(rng.choice(phrases.MORAL_TITLES), topic)}\n\n{join(point, rng.choice(phrases.MORAL_STOPS))}"
    headings = rng.sample(phrases.MORAL_HEADINGS, 2)
    points = rng.sample(phrases.MORAL_POINTS, 2)
    whys = [rng.choice(phrases.MORAL_WHY).format(reason=reason) for reason in reasons[:2]]
    ways = [rng.choice(phrases.MORAL_ALTERNATIVE).format(alternative=way) for way in alternatives[:2]]
    text += f"\n\n{headings[0]}\n\n{join(fill(points[0], topic), *whys)}"
    return text + f"\n\n{headings[1]}\n\n{join(fill(points[1], topic), *ways)}"


def _ask(rng: random.Random, topic: Topic) -> str:
    if rng.random() < 0.7:
        return request(rng, topic)
    title, opening = fill(rng.choice(phrases.TITLES), topic), fill(rng.choice(phrases.OPENINGS), topic)
    return f"Please finish this page. {title}. {opening}"


def _reasons(rng: random.Random, topic: Topic) -> list[str]:
    return rng.sample(topic.subject.reasons, len(topic.subject.reasons))


def _alternatives(rng: random.Random, topic: Topic) -> list[str]:
    return rng.sample(topic.subject.alternatives, len(topic.subject.alternatives))


def _why(rng: random.Random, reason: str) -> str:
    return rng.choice(phrases.WHY).format(reason=reason)


def _alternative(rng: random.Random, alternative: str) -> str:
    sentence = rng.choice(phrases.ALTERNATIVE).format(alternative=alternative)
    return sentence[:1].upper() + sentence[1:]
