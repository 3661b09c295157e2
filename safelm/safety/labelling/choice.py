"""Which documents of a pool are labelled: the most uncertain ones, no two nearly alike, and a random share.

Documents come one at a time and memory holds a few times as many as are wanted. The same documents give the same
choice in whatever order they come; ties and the random share are drawn by a hash of seed, file, row and id.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from safelm.safety.labelling.uncertainty import Opinion, uncertainty
from safelm.safety.synthesis.gates.duplicates import Duplicates, signature
from safelm.tags import MAX_SCORE

_SPARE, _SPARE_MORE = 4, 1000  # uncertain documents kept for each that is wanted, and more: near-duplicates fall out
_COMPARED = 20_000  # characters of a text that are looked at for near-duplicates


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A document that may be chosen: where it stands, its text, and what scorers say of it."""

    file: str
    row: int
    id: str
    text: str = dataclasses.field(repr=False)
    harm_score: int = 0
    opinions: Mapping[str, Opinion] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ChoiceSettings:
    """How many documents, and which.

    Attributes:
      documents: to choose. random_share: of them, drawn from the whole pool alike.
      method: see `uncertainty.METHODS`.
    """

    documents: int = 200
    random_share: float = 0.2
    method: str = "disagreement"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise ValueError(f"--documents={self.documents}: must be at least 1")
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"--random_share={self.random_share}: must be from 0 to 1")

    @property
    def num_random(self) -> int:
        return self.documents if self.method == "random" else round(self.documents * self.random_share)


class Smallest:
    """The values of the smallest keys, so many of them, of all that were added."""

    def __init__(self, count: int):
        self._count, self._found = count, []
        self._limit: Any = None

    def add(self, key: Any, value: Any) -> None:
        """Takes a value in unless enough have smaller keys. Keys are distinct."""
        if self._count and (self._limit is None or key < self._limit):
            self._found.append((key, value))
            if len(self._found) >= 2 * self._count:
                self._trim()

    def values(self) -> list[Any]:
        """By rising key."""
        self._trim()
        return [value for _, value in self._found]

    def _trim(self) -> None:
        self._found.sort(key=lambda pair: pair[0])
        del self._found[self._count :]
        if self._found and len(self._found) == self._count:
            self._limit = self._found[-1][0]


def draw(seed: int, candidate: Candidate) -> str:
    """A document's place in a random order; a moved corpus keeps its order."""
    place = "/".join([*candidate.file.split("/")[-2:], str(candidate.row), candidate.id])
    return hashlib.blake2b(f"{seed}/{place}".encode("utf-8", "replace"), digest_size=12).hexdigest()


class Chooser:
    """Chooses from candidates that are added one by one.

    Attributes:
      seen: how many were added. near_duplicates: how many `chosen` passed over.
    """

    def __init__(self, settings: ChoiceSettings):
        self.settings, self.seen, self.near_duplicates = settings, 0, 0
        self._random = Smallest(settings.num_random)
        wanted = settings.documents - settings.num_random
        spare = _SPARE * wanted + _SPARE_MORE if wanted else 0
        strata = MAX_SCORE + 1 if settings.method == "score" else 1
        self._uncertain = [Smallest(spare) for _ in range(strata)]

    def add(self, candidate: Candidate) -> None:
        """Takes in one document of the pool."""
        self.seen += 1
        settings = self.settings
        drawn = draw(settings.seed, candidate)
        stratum = candidate.harm_score if settings.method == "score" else 0
        self._random.add((drawn,), candidate)
        # Drawn anew for ties: the random share would take the first ones of them all.
        tie = draw(settings.seed + 1, candidate)
        self._uncertain[stratum].add((-uncertainty(settings.method, candidate.opinions), tie), candidate)

    def chosen(self) -> list[tuple[Candidate, bool]]:
        """The documents in the order to label them in, and whether each is of the random share.

        Near-duplicates are left out among the uncertain ones alone: the random share stands for the pool as it is.
        """
        random = self._random.values()
        places = {(each.file, each.row) for each in random}
        alike = Duplicates()
        for number, each in enumerate(random):
            alike.add(number, signature(each.text[:_COMPARED]))
        uncertain: list[Candidate] = []
        for each in self._by_uncertainty():
            if len(uncertain) == self.settings.documents - self.settings.num_random:
                break
            if (each.file, each.row) in places:
                continue
            if alike.add((each.file, each.row), signature(each.text[:_COMPARED])) is None:
                uncertain.append(each)
            else:
                self.near_duplicates += 1
        return _interleaved(random, uncertain)

    def _by_uncertainty(self) -> Iterator[Candidate]:
        """The most uncertain first; of several strata one of each in turn."""
        columns = [each.values() for each in self._uncertain]
        for place in range(max(map(len, columns))):
            yield from (column[place] for column in columns if place < len(column))


def _interleaved(random: list[Candidate], uncertain: list[Candidate]) -> list[tuple[Candidate, bool]]:
    """Both lists in their order, evenly mixed: whoever stops early has labelled their share of either."""
    ranked = [((index + 0.5) / len(random), True, each) for index, each in enumerate(random)]
    ranked += [((index + 0.5) / len(uncertain), False, each) for index, each in enumerate(uncertain)]
    return [(each, is_random) for _, is_random, each in sorted(ranked, key=lambda entry: entry[:2])]
