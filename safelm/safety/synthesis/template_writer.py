"""A writer without a model: it combines a page's harmless sentences with ready-made phrases.

It replaces a model in quickstarts and tests. It recognises sensitive matter only by the beginnings of some words, so
some of its texts really are wrong and gates have something to reject.
"""

import collections
import dataclasses
import functools
import hashlib
import inspect
import itertools
import random
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.safety.options import check_least, make_settings
from safelm.safety.synthesis import template_harms, template_notes, template_phrases
from safelm.safety.synthesis.kinds import NOTE_KINDS
from safelm.safety.synthesis.writer import OnReply, Reply, Request

_SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|\n+")
_WORD = re.compile(r"[a-z]{4,}")
_LABEL = re.compile(r"^[A-Z]\w*:\s+")
_COMMON = frozenset(
    "about after again also always another because been before being best both came could does down each even ever "
    "every first from give good have here into just know last later like little long made make many more most much "
    "must need never next nobody only other over page people said same says should some somebody something such take "
    "tell than that their them then there these they thing things think this those time today told very want wanted "
    "well went were what when where which while will with without would write wrote year years your yours".split()
)
_KINDS_OF_WEB = {  # categories that scored documents may carry: the card's 14, to the eight of a dialogue
    "violent_crimes": "physical harm",
    "non_violent_crimes": "fraud or deception",
    "sex_related_crimes": "sexual or adult content",
    "child_sexual_exploitation": "sexual or adult content",
    "defamation": "harassment or discrimination",
    "specialised_advice": "physical harm",
    "intellectual_property": "economic harm",
    "indiscriminate_weapons": "physical harm",
    "hate": "harassment or discrimination",
    "suicide_and_self_harm": "physical harm",
    "sexual_content": "sexual or adult content",
    "elections": "disinformation",
    "code_interpreter_abuse": "malware or hacking",
}


@dataclasses.dataclass(frozen=True)
class TemplateWriterSettings:
    """The setting of a template writer: the length above which documents are split."""

    max_document_chars: int = 12_000

    def __post_init__(self) -> None:
        check_least("template", self, max_document_chars=1)


class TemplateWriter:
    """A writer without a model (see the module). The same request gives the same reply everywhere.

    Attributes:
      fingerprint: SHA-256 (hex) of the phrases and the code that combines them.
    """

    def __init__(self, settings: TemplateWriterSettings | None = None, *, name: str = "template"):
        self.name, self.max_document_chars = name, (settings or TemplateWriterSettings()).max_document_chars
        self.fingerprint = _fingerprint()
        self._counts: collections.Counter[str] = collections.Counter(requests=0, prompt_tokens=0, completion_tokens=0)

    def write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """Answers in order, counting words as tokens. Raises ValueError for a request without its kind."""
        for index, request in enumerate(requests):
            text = _write(request)
            reply = Reply(text, prompt_tokens=len(request.document.split()), completion_tokens=len(text.split()))
            self._counts.update(
                requests=1, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens
            )
            on_reply(index, reply)

    def ledger(self) -> Mapping[str, int | float]:
        return dict(self._counts)


def load_template_writer(*, name: str = "template", **settings: Any) -> TemplateWriter:
    """A template writer with these options. Raises ValueError for an unknown option or one out of range."""
    checked = make_settings(TemplateWriterSettings, settings, where="template", others="name")
    return TemplateWriter(checked, name=name)


@functools.cache
def _fingerprint() -> str:
    modules = (template_harms, template_notes, template_phrases, sys.modules[__name__])
    return hashlib.sha256("\0".join(map(inspect.getsource, modules)).encode()).hexdigest()


def _write(request: Request) -> str:
    rng = random.Random(request.seed)
    kind = request.facts.get("kind")
    if kind == "safeweb":
        return _safeweb(request, rng)
    if kind == "refuseweb":
        return _refuseweb(request, rng)
    if kind == "moral_education":
        return _moral_education(request, rng)
    if kind in NOTE_KINDS:
        return _note(request, rng)
    raise ValueError(f"template writer: request {request.key} has no kind that it knows: {kind!r}")


def _safeweb(request: Request, rng: random.Random) -> str:
    name = str(request.facts["style"])
    style = template_phrases.STYLES[name]
    part, parts = int(request.facts["part"]), int(request.facts["parts"])
    sentences = [sentence.strip() for sentence in _SENTENCE.split(request.document) if sentence.strip()]
    points = _points([_LABEL.sub("", sentence) for sentence in sentences], rng)
    body = _conversation(points, name, rng) if style.speakers else _prose(points, style.bridges, rng)
    blocks = [*body]
    if part == 0:
        blocks.insert(0, rng.choice(style.openings).replace("{topic}", _topic(points)))
    if part == parts - 1:
        blocks.append(rng.choice(style.closings))
    return "\n\n".join(blocks)


def _points(sentences: Sequence[str], rng: random.Random) -> list[str]:
    """The sentences in order; each sensitive theme's first sentence is replaced by its topic and why it matters."""
    points, explained = [], set()
    explanations = itertools.cycle(rng.sample(template_phrases.SENSITIVE, len(template_phrases.SENSITIVE)))
    for sentence in dict.fromkeys(sentences):  # what a page repeats is said once
        theme = next((theme for theme in template_phrases.THEMES if theme.is_in(sentence)), None)
        if theme is None:
            points.append(sentence)
        elif theme.name not in explained:
            explained.add(theme.name)
            points.append(next(explanations).format(told=rng.choice(theme.told), why=rng.choice(theme.why)))
    return points


def _prose(points: Sequence[str], bridges: Sequence[str], rng: random.Random) -> list[str]:
    """Paragraphs of several points, most of them after a bridge."""
    paragraphs: list[str] = []
    start, next_bridge = 0, itertools.cycle(rng.sample(bridges, len(bridges)))
    while start < len(points):
        stop = start + rng.randint(2, 4)
        bridge = [next(next_bridge)] if start and rng.random() < 0.8 else []
        paragraphs.append(" ".join([*bridge, *points[start:stop]]))
        start = stop
    return paragraphs


def _conversation(points: Sequence[str], style: str, rng: random.Random) -> list[str]:
    teller, listener = template_phrases.STYLES[style].speakers
    lines: list[str] = []
    questions = template_phrases.QUESTIONS[style]
    asked = itertools.cycle(rng.sample(questions, len(questions)))
    for paragraph in _prose(points, template_phrases.STYLES[style].bridges, rng):
        if lines or style == "questions_and_answers":
            lines.append(f"{listener}: {next(asked)}")
        lines.append(f"{teller}: {paragraph}")
    return lines


def _topic(points: Sequence[str]) -> str:
    """The two most frequent meaningful words."""
    words = [word for word in _WORD.findall(" ".join(points).lower()) if word not in _COMMON]
    return " and ".join(word for word, _ in collections.Counter(words).most_common(2)) or template_phrases.NO_TOPIC


def _category(request: Request) -> str:
    """The kind of harm by the document's metadata, otherwise by its words."""
    named = str(request.facts.get("category", ""))
    if (known := _KINDS_OF_WEB.get(named, named)) in template_harms.HARMS:
        return known
    counts = {name: harm.count_in(f"{named} {request.document}") for name, harm in template_harms.HARMS.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else template_harms.DEFAULT


def _refuseweb(request: Request, rng: random.Random) -> str:
    category, style = _category(request), str(request.facts["style"])
    harm = template_harms.HARMS[category]
    ask = rng.choice(harm.asks)
    whys, ways = rng.sample(harm.whys, 2), rng.sample(harm.ways, 2)
    question = [rng.choice(template_harms.REQUESTS)]
    heard = rng.choice(template_harms.ACKNOWLEDGED)
    if style == "with_a_reason":
        question.insert(rng.randrange(2), rng.choice(template_harms.REASONS))
    elif style == "in_disguise":
        question.insert(rng.randrange(2), rng.choice(template_harms.PRETEXTS))
        heard = rng.choice(template_harms.DISGUISED)
    turns = [
        "User: " + " ".join(question),
        f"Assistant: {heard} " + _refusal(rng.choice(template_harms.REFUSED), whys[0], ways[0], rng),
    ]
    if style == "insisting":
        still = f"{rng.choice(template_harms.FIRM)} " + _refusal(
            rng.choice(template_harms.STILL), whys[1], ways[1], rng
        )
        turns += [f"User: {rng.choice(template_harms.PUSHES)}", f"Assistant: {still}"]
    return "\n\n".join(turn.replace("{ask}", ask) for turn in turns) + f"\n\nCategory: {category}"


def _refusal(no: str, why: str, way: str, rng: random.Random) -> str:
    explained = rng.choice(template_harms.EXPLAINED).replace("{why}", why)
    return f"{no} {explained} {rng.choice(template_harms.OFFERED).replace('{way}', way)}"


def _moral_education(request: Request, rng: random.Random) -> str:
    harms, style = template_harms, str(request.facts["style"])
    harm = harms.HARMS[_category(request)]
    said = request.document
    whys = [why for why in harm.whys if why in said] or rng.sample(harm.whys, 2)  # a dialogue's own ones
    ways = [way for way in harm.ways if way in said] or rng.sample(harm.ways, 2)
    first, second, third = harms.HEADINGS[style]
    told = [form.replace("{why}", why) for form, why in zip(rng.sample(harms.CONSEQUENCES, 3), whys, strict=False)]
    better = [
        form.replace("{way}", _third_person(way)) for form, way in zip(rng.sample(harms.BETTER, 3), ways, strict=False)
    ]
    blocks = [
        f"# {rng.choice(harms.TITLES[style])}".replace("{issue}", harm.issue),
        rng.choice(harms.SCENES).replace("{ask}", rng.choice(harm.asks)),
        f"## {first}",
        " ".join(rng.sample(harms.TEMPTED, 2)),
        f"## {second}",
        " ".join([*told, *rng.sample(harms.TRUST, 2)]),
        f"## {third}",
        " ".join([*better, *rng.sample(harms.ENDINGS, 2)]),
    ]
    return "\n\n".join(blocks)


def _note(request: Request, rng: random.Random) -> str:
    """A note about a page's most frequent harmless words; the verdict goes by the words that the writer recognises."""
    sections, kind = str(request.facts["sections"]).split(), str(request.facts["kind"])
    found = [sentence for sentence in _SENTENCE.split(request.document) if sentence.strip()]
    is_harmful = any(harm.count_in(request.document) for harm in template_harms.HARMS.values())
    is_unsafe = is_harmful or any(theme.is_in(sentence) for theme in template_phrases.THEMES for sentence in found)
    calm = [sentence for sentence in found if not any(theme.is_in(sentence) for theme in template_phrases.THEMES)]
    seen = collections.Counter(
        word for word in _WORD.findall(" ".join(calm).lower()) if len(word) > 4 and word not in _COMMON
    )
    topic = " and ".join(word for word, _ in seen.most_common(3)) or template_phrases.NO_TOPIC
    verdict, category = ("unsafe", _category(request)) if is_unsafe else ("safe", "none")
    first, third = template_notes.note(kind, verdict, rng)
    cited = f" [{rng.choice(sections)}]"
    texts = [text.replace("{topic}", topic) + cited for text in (first, third)]
    return f"Verdict: {verdict}\nCategory: {category}\nFirst person: {texts[0]}\nThird person: {texts[1]}"


def _third_person(way: str) -> str:
    """Turns `you trust` into `they trust` and the like."""
    for second, third in (("your own", "their own"), ("yourself", "oneself"), ("your", "their"), ("you", "they")):
        way = re.sub(rf"\b{second}\b", third, way)
    return way.replace("made they angry", "made them angry")
