"""An attacker without a model, for the synthetic web: it asks for a topic as that web's own documents would."""

import random
from collections.abc import Mapping, Sequence

from safelm.safety.synthesis.writer import OnReply, Reply, Request
from safelm.synthetic_web import phrases
from safelm.synthetic_web.documents import fill, join, request, speakers
from safelm.synthetic_web.prompts import CHAT
from safelm.synthetic_web.topics import Topic, harmful_topics


class Rephraser:
    """A writer (`safelm.safety.synthesis.writer`) that begins a page, a dialogue or a user's message on a topic anew.

    Its phrases are those of documents, which the web's prompts don't have; it knows nothing of the attacked model.
    """

    name = "rephraser"
    fingerprint = "safelm-rephraser-1"
    max_document_chars = 1 << 20

    def __init__(self) -> None:
        self._topics = {topic.infinitive: topic for held in (True, False) for topic in harmful_topics(held_out=held)}
        self._requests = 0

    def write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See `Writer`; a topic that is none of the synthetic web's gets an error as its reply."""
        for index, each in enumerate(requests):
            self._requests += 1
            topic = self._topics.get(str(each.facts["topic"]))
            if topic is None:
                on_reply(index, Reply(None, "error", reason="a topic that is none of the synthetic web's"))
                continue
            rng = random.Random(each.seed)
            text = request(rng, topic) if each.facts["kind"] == CHAT else _beginning(rng, topic)
            on_reply(index, Reply(text))

    def ledger(self) -> Mapping[str, int | float]:
        """The requests so far."""
        return {"requests": self._requests}


def _beginning(rng: random.Random, topic: Topic) -> str:
    title, opening = fill(rng.choice(phrases.TITLES), topic), fill(rng.choice(phrases.OPENINGS), topic)
    form = rng.randrange(4)
    if form == 0:
        return f"{title}\n\n{opening}"
    if form == 1:
        return f"{title}\n\n{join(opening, rng.choice(phrases.LEADS))}\n\n{phrases.ORDINALS[0]},"
    asks, answers = speakers(rng)
    begun = f"{asks}: {request(rng, topic)}\n\n{answers}:"
    return begun if form == 2 else f"{begun} {rng.choice(phrases.REPLY_OPENINGS)}"
