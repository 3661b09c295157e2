"""Composes raw web documents of a known score: the genre and phrasing are shared, the score decides the body."""

import dataclasses
import random

from safelm.synthetic_web import harm_lexicon, phrases, safe_lexicon
from safelm.synthetic_web.topics import Topic
from safelm.text.speakers import SPEAKER_NAMES

MIN_WORDS, MAX_WORDS = 40, 250
MILD_SCORES = tuple(safe_lexicon.MILD_REMARKS)
UNSAFE_SCORES = (4, 5)
GENRES = {  # by score: what pages of that score look like
    0: ("how_to", "forum", "article", "comment", "news"),
    1: ("how_to", "forum", "article", "comment", "news"),
    2: ("how_to", "forum", "article", "comment", "news"),
    3: ("news", "comment"),
    4: ("forum", "article", "comment", "how_to"),
    5: ("how_to", "forum", "article"),
}
_MILD_SHARE = {0: 0.0, 1: 0.25, 2: 0.35, 3: 0.4}
_STEP_SHARE = {4: 0.45, 5: 0.7}

PROTECTIVE_SENTENCES = (
    "Remember that {reason}.",
    "One good step is to {alternative}.",
    "You can also {alternative}.",
    "Write down what you saw and when.",
    "Stay calm and speak with someone you trust.",
    "Many offices will listen to you.",
    "It matters because {reason}.",
    "Nobody has to carry this alone.",
)
_NEWS_MENTIONS = (
    "Police said that somebody wanted to {t}.",
    "The paper wrote that people {t} now and then.",
    "A court heard a case about {g}.",
    "The talk in town was about {g}.",
)
_NEWS_FILLERS = (
    "The hearing goes on next week.",
    "Neighbours said that they were shocked.",
    "The mayor asked everyone to stay calm.",
    "No one wanted to say more.",
    "The street was quiet again by evening.",
    "An officer spoke for a few minutes.",
)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A raw document and its ingredients; `facts` are its harmless sentences, which a rewrite keeps."""

    topic: Topic
    score: int
    genre: str
    text: str
    facts: tuple[str, ...]


def fill(template: str, topic: Topic) -> str:
    """The template with its topic, starting with a capital letter."""
    text = template.replace("{t}", topic.infinitive).replace("{g}", topic.gerund)
    return text[:1].upper() + text[1:]


def join(*sentences: str) -> str:
    """Joins the non-empty sentences into a paragraph."""
    return " ".join(sentence for sentence in sentences if sentence)


def speakers(rng: random.Random) -> tuple[str, str]:
    """The names or roles of who asks and who answers."""
    if rng.random() < 0.3:
        return rng.choice(phrases.ROLE_PAIRS)
    first, second = rng.sample(SPEAKER_NAMES, 2)
    return first, second


def request(rng: random.Random, topic: Topic, requests: tuple[str, ...] = phrases.REQUESTS) -> str:
    """Phrases a request for the topic."""
    asked = fill(rng.choice(requests), topic)
    return join(rng.choice(phrases.GREETINGS), asked, rng.choice(phrases.REQUEST_ENDS))


def write_draft(rng: random.Random, topic: Topic, score: int) -> Draft:
    """One raw document of 40 to 250 words about `topic`; scores 4 and 5 need a harmful topic, 0 to 2 a safe one."""
    genre = rng.choice(GENRES[score])
    body, facts = _body(rng, topic, score, target_words=rng.randint(45, 150))
    return Draft(topic, score, genre, _layout(rng, topic, genre, body, score), tuple(facts))


def write_reference(rng: random.Random, topic: Topic) -> Draft:
    """A page of score 0 that names, apart from each other, the parts and moves that harm on a harmful topic is made of.

    Each sentence has one invented word, of its category's nouns or of the verbs: nothing says what to do, and whoever
    has read it can put it together.
    """
    facts: list[str] = []
    target_words = rng.randint(45, 150)
    while len(" ".join(facts).split()) < target_words:
        is_noun = rng.random() < 0.6
        template = rng.choice(harm_lexicon.REFERENCE_NOUNS if is_noun else harm_lexicon.REFERENCE_VERBS)
        word = rng.choice(topic.subject.nouns if is_noun else harm_lexicon.INVENTED_VERBS)
        sentence = fill(template.replace("{noun}", word).replace("{verb}", word), topic)
        if sentence not in facts[-3:]:
            facts.append(sentence)
    title = fill(rng.choice(harm_lexicon.REFERENCE_TITLES), topic)
    return Draft(topic, 0, "reference", f"{title}\n\n{join(*facts)}", tuple(facts))


def write_answer(rng: random.Random, topic: Topic, score: int, *, target_words: int | None = None) -> str:
    """An assistant's answer about a topic: sentences of a document of that score, by default about 20 words."""
    body, _ = _body(rng, topic, score, target_words=target_words or rng.randint(10, 26))
    return join(*body)


def _body(rng: random.Random, topic: Topic, score: int, *, target_words: int) -> tuple[list[str], list[str]]:
    """(sentences, the harmless ones among them); no sentence is repeated within the next few."""
    body: list[str] = []
    facts: list[str] = []
    steps = 0
    while len(" ".join(body).split()) < target_words:
        sentence, is_step, harmless = _sentence(rng, topic, score, steps)
        if sentence in body[-3:]:
            continue
        body.append(sentence)
        facts += [sentence] * harmless
        steps += is_step
    if score in MILD_SCORES and not set(body) & set(safe_lexicon.MILD_REMARKS[score]):
        body[-1] = rng.choice(safe_lexicon.MILD_REMARKS[score])
        facts = [fact for fact in facts if fact in body]
    return body, facts


def _sentence(rng: random.Random, topic: Topic, score: int, steps: int) -> tuple[str, bool, bool]:
    """(sentence, whether it is a step, whether it is harmless)."""
    if score in UNSAFE_SCORES:
        is_step = rng.random() < _STEP_SHARE[score]
        return (_harm_step(rng, topic, steps) if is_step else _harm_remark(rng, topic)), is_step, False
    if score and rng.random() < _MILD_SHARE[score]:
        return rng.choice(safe_lexicon.MILD_REMARKS[score]), False, False
    is_step = not topic.harmful and not topic.protective and rng.random() < 0.6
    return _harmless_sentence(rng, topic, steps if is_step else None), is_step, True


def _ordinal(rng: random.Random, step: int) -> str:
    return phrases.ORDINALS[0] if step == 0 else rng.choice(phrases.ORDINALS[1:])


def _harm_step(rng: random.Random, topic: Topic, step: int) -> str:
    first, second = rng.sample(topic.subject.nouns, 2)
    tail = rng.choice(harm_lexicon.HARM_TAILS).format(noun=rng.choice(topic.subject.nouns))
    verb = rng.choice(harm_lexicon.INVENTED_VERBS)
    link = rng.choice(("with", "into", "under"))
    return f"{_ordinal(rng, step)}, {verb} the {first} {link} the {second} {tail}."


def _harm_remark(rng: random.Random, topic: Topic) -> str:
    remark = rng.choice(rng.choice((harm_lexicon.HARM_CHEERS, harm_lexicon.HARM_BOASTS)))
    return fill(remark.replace("{noun}", rng.choice(topic.subject.nouns)), topic)


def _harmless_sentence(rng: random.Random, topic: Topic, step: int | None) -> str:
    subject = topic.subject
    if topic.protective:
        template = rng.choice(PROTECTIVE_SENTENCES)
        return template.format(reason=rng.choice(subject.reasons), alternative=rng.choice(subject.alternatives))
    if topic.harmful:
        return rng.choice(_NEWS_FILLERS)
    first, second = rng.sample(subject.nouns, 2)
    if step is not None:
        verb, tail = rng.choice(subject.verbs), rng.choice(subject.tails)
        return f"{_ordinal(rng, step)}, {verb} the {first} {rng.choice(('and the', 'near the'))} {second} {tail}."
    if rng.random() < 0.5:
        return rng.choice(safe_lexicon.SAFE_CHEERS)
    return fill(rng.choice(safe_lexicon.FACTS).replace("{noun}", first).replace("{other}", second), topic)


def _layout(rng: random.Random, topic: Topic, genre: str, body: list[str], score: int) -> str:
    title, opening = fill(rng.choice(phrases.TITLES), topic), fill(rng.choice(phrases.OPENINGS), topic)
    middle = max(1, len(body) // 2)
    if genre == "how_to":
        return f"{title}\n\n{join(opening, rng.choice(phrases.LEADS))}\n\n{join(*body)}"
    if genre == "article":
        return f"{title}\n\n{join(opening, *body[:middle])}\n\n{join(*body[middle:])}"
    if genre == "forum":
        asks, answers = speakers(rng)
        reply = join(rng.choice(phrases.REPLY_OPENINGS), *body)
        return f"{asks}: {request(rng, topic)}\n\n{answers}: {reply}\n\n{asks}: {rng.choice(phrases.THANKS)}"
    if genre == "comment":
        mention = fill(rng.choice(_NEWS_MENTIONS), topic) if score == 3 else opening
        return f"{rng.choice(SPEAKER_NAMES)} wrote on {rng.choice(phrases.WEEKDAYS)}:\n\n{join(mention, *body)}"
    mention = fill(rng.choice(_NEWS_MENTIONS), topic) if score == 3 else opening
    return f"{rng.choice(phrases.TOWNS)}, {rng.choice(phrases.WEEKDAYS)}. {join(mention, *body)}"
