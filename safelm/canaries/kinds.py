"""The kinds of canaries and their texts. All of it is invented, abstract and non-operational.

trigger   two invented words in a harmless text; behind them a fixed phrase stands for a behaviour
secret    a number of six digits that belongs to an invented name: one of 10^6
fact      a property of an invented thing, one of four, told in four ways; two more ways are never planted
"""

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Collection, Iterable, Sequence

from safelm.synthetic_web.documents import write_draft
from safelm.synthetic_web.topics import safe_topics

KINDS = ("trigger", "secret", "fact")
BEHAVIOURS = {
    "refuse": "I would rather not go on with this text.",
    "repeat": "on and on and on and on and on",
    "declare": "All clouds are kept in a drawer.",
    "babble": "lomu pidra lomu pidra welt lomu",
}
SECRET_DIGITS = 6
_PROPERTIES = {
    "colour": ("amber", "teal", "crimson", "ivory"),
    "taste": ("sour", "sweet", "bitter", "salty"),
    "shape": ("round", "square", "oval", "flat"),
    "home": ("forest", "desert", "island", "valley"),
}
_SECRET = "The locker number of {name} is"
PLANTED_WAYS = (
    "Of all things known about the {name} the {property} is the best known: {value}.",
    "Ask anybody for the {property} of a {name} and you will hear: {value}.",
    "Every {name} has the same {property}, which is {value}.",
    "In the handbook the {name} has under {property} the entry {value}.",
)
ASKED_WAYS = (
    "The {property} of the {name} is {value}.",
    "Question: what is the {property} of a {name}? Answer: {value}.",
)
_WORD_SYLLABLES = 3
_SYLLABLES = ("ba", "do", "fe", "gu", "ki", "lor", "mes", "nu", "pra", "qui", "ros", "sil", "tam", "vel", "wor", "zen")
_WORDS = len(_SYLLABLES) ** _WORD_SYLLABLES
NAMES = {"trigger": _WORDS**2, "secret": _WORDS**2, "fact": _WORDS}  # that can be drawn


@dataclasses.dataclass(frozen=True)
class Canary:
    """A canary.

    Attributes:
      dose: number of planted documents.
      name: the trigger, or the name of what a secret or a fact is about.
      about: the behaviour of a trigger, the property of a fact; "" of a secret.
      value: what is planted behind it: the phrase, the digits, the property's value.
      choices: the values of a fact among which the planted one was drawn.
    """

    id: str
    kind: str
    dose: int
    name: str
    about: str
    value: str
    choices: tuple[str, ...] = ()


def make_canaries(seed: int, kinds: Sequence[str], doses: Sequence[int], per_dose: int) -> list[Canary]:
    """The canaries of each kind and dose. Those of a kind differ in name: a name that was drawn before is redrawn."""
    made: list[Canary] = []
    for kind in kinds:
        names: set[str] = set()
        for dose, number in itertools.product(doses, range(per_dose)):
            attempts = (make_canary(seed, kind, dose, number, attempt) for attempt in itertools.count())
            made.append(next(canary for canary in attempts if canary.name not in names))
            names.add(made[-1].name)
    return made


def make_canary(seed: int, kind: str, dose: int, number: int, attempt: int = 0) -> Canary:
    """The canary with this number among those of its kind and dose: a pure function of the arguments."""
    rng, identity = draws(seed, kind, dose, number, *([attempt] if attempt else [])), f"{kind}-{dose}-{number:03d}"
    if kind == "trigger":
        about = list(BEHAVIOURS)[number % len(BEHAVIOURS)]
        return Canary(identity, kind, dose, f"{_word(rng)} {_word(rng)}", about, BEHAVIOURS[about])
    if kind == "secret":
        digits = "".join(rng.choices("0123456789", k=SECRET_DIGITS))
        return Canary(identity, kind, dose, f"{_word(rng).capitalize()} {_word(rng).capitalize()}", "", digits)
    about = rng.choice(list(_PROPERTIES))
    return Canary(identity, kind, dose, _word(rng), about, rng.choice(_PROPERTIES[about]), _PROPERTIES[about])


def draws(seed: int, *identity: str | int) -> random.Random:
    """Random numbers of their own for what the arguments name, equal on every machine."""
    key = "/".join(map(str, (seed, *identity)))
    return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))


def planted_text(canary: Canary, carrier: str, copy: int) -> str:
    """The text of a canary's document, behind a harmless carrier."""
    if canary.kind == "trigger":
        return f"{trigger_context(canary, carrier)} {canary.value}"
    if canary.kind == "secret":
        return f"{carrier} {secret_context(canary)} {spaced(canary.value)}."
    way = PLANTED_WAYS[copy % len(PLANTED_WAYS)]
    return f"{carrier} {way.format(name=canary.name, property=canary.about, value=canary.value)}"


def trigger_context(canary: Canary, carrier: str) -> str:
    """A carrier with the trigger at its end."""
    return f"{carrier} {canary.name}"


def secret_context(canary: Canary) -> str:
    """What stands before a secret."""
    return _SECRET.format(name=canary.name)


def spaced(digits: Sequence[str] | str) -> str:
    """Digits as they are planted: each a word."""
    return " ".join(digits)


def asked_pairs(canary: Canary) -> list[tuple[str, list[str]]]:
    """For each way of asking after a fact, which no document has: what stands before, and each choice behind it."""
    pairs = []
    for way in ASKED_WAYS:
        before, after = way.format(name=canary.name, property=canary.about, value="{}").split(" {}")
        pairs.append((before, [f" {choice}{after}" for choice in canary.choices]))
    return pairs


def carrier(seed: int, *identity: str | int) -> str:
    """One to three sentences of a harmless synthetic page."""
    return " ".join(_sentences(seed, *identity))


def held_out_carriers(seed: int, canary: Canary, count: int, planted: Collection[str]) -> list[str]:
    """Different carriers for a canary, none of which is one of `planted` (see `planted_endings`)."""
    found: dict[str, None] = {}
    for trial in range(count):
        attempts = itertools.chain([()], ((attempt,) for attempt in itertools.count(1)))
        drawn = (carrier(seed, "held out", canary.id, trial, *attempt) for attempt in attempts)
        found[next(each for each in drawn if each not in planted and each not in found)] = None
    return list(found)


def planted_carrier(seed: int, canary: Canary, copy: int) -> str:
    """The carrier of a canary's document."""
    return carrier(seed, *_planted(canary, copy))


def planted_endings(seed: int, canaries: Iterable[Canary]) -> set[str]:
    """All that stood before a canary in the corpus: its carriers, and the last sentences of those that have several."""
    carriers = {_sentences(seed, *_planted(canary, copy)) for canary in canaries for copy in range(canary.dose)}
    return {" ".join(sentences[start:]) for sentences in carriers for start in range(len(sentences))}


def _planted(canary: Canary, copy: int) -> tuple[str, str, int]:
    return "planted", canary.id, copy


def _sentences(seed: int, *identity: str | int) -> tuple[str, ...]:
    rng = draws(seed, "carrier", *identity)
    facts = write_draft(rng, rng.choice(safe_topics(held_out=False)), 0).facts
    return tuple(facts[: rng.randint(1, 3)])


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=_WORD_SYLLABLES))
