"""Combines several scorers by taking the highest score (Maini et al. 2025, section 3.1), and measures their agreement.

The paper takes the maximum because recall on unsafe text comes first: one scorer finds a document that another misses.
The price is the sum of all false alarms.
"""

import copy
import dataclasses
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from safelm.safety.scorer import Scorer, Verdict
from safelm.tags import MAX_SCORE, MIN_SCORE

NUM_SCORES = MAX_SCORE - MIN_SCORE + 1
UNSAFE_FROM = (1, 3, 4)  # the scores from which a document counts as unsafe, for agreement


class Ensemble:
    """The scorers of a run as one.

    Attributes:
      names: of the scorers, in order; equal names raise ValueError.
    """

    def __init__(self, scorers: Sequence[Scorer]):
        self.names = _distinct([scorer.name for scorer in scorers])

    def combine(self, verdicts: Sequence[Verdict]) -> Verdict:
        """Combines one document's verdicts, given in the scorers' order.

        The score is the highest one, the reason comes from the scorer that gave it (of equal scorers, the first with a
        reason), and the detail `decided_by` is its name. If no scorer gave a score there is none, and `decided_by` is
        "".
        """
        answered = [pair for pair in zip(self.names, verdicts, strict=True) if pair[1].score is not None]
        if not answered:
            return Verdict(None, details={"decided_by": ""})
        name, verdict = max(answered, key=lambda pair: (pair[1].score, bool(pair[1].reason)))
        return Verdict(verdict.score, verdict.reason, {"decided_by": name})


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two scorers on the documents that both scored.

    Attributes:
      confusion: number of documents by [first's score][second's score].
    """

    confusion: tuple[tuple[int, ...], ...]

    @property
    def documents(self) -> int:
        return int(np.sum(self.confusion))

    @property
    def exact(self) -> float | None:
        """Share of documents with equal scores; None, like all shares here, without documents."""
        return self._share(lambda a, b: a == b)

    @property
    def within_one(self) -> float | None:
        return self._share(lambda a, b: abs(a - b) <= 1)

    @property
    def weighted_kappa(self) -> float | None:
        """Cohen's kappa with quadratic weights: 1 for full agreement, 0 for chance.

        None if it is undefined: without documents, or if both scorers give every document the same score.
        """
        counts_66 = np.asarray(self.confusion, np.float64)
        total = counts_66.sum()
        if total == 0:
            return None
        scores = np.arange(NUM_SCORES)
        weights_66 = np.subtract.outer(scores, scores) ** 2
        by_chance_66 = np.outer(counts_66.sum(1), counts_66.sum(0)) / total
        expected = (weights_66 * by_chance_66).sum()
        return None if expected == 0 else float(1 - (weights_66 * counts_66).sum() / expected)

    def unsafe_agreement(self, unsafe_from: int) -> float | None:
        """Share of documents on which both agree whether the score is at least `unsafe_from`."""
        return self._share(lambda a, b: (a >= unsafe_from) == (b >= unsafe_from))

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "scorers": list(names),
            "documents": self.documents,
            "exact": self.exact,
            "within_one": self.within_one,
            "weighted_kappa": self.weighted_kappa,
            "unsafe": {f">={score}": self.unsafe_agreement(score) for score in UNSAFE_FROM},
            "confusion": [list(row) for row in self.confusion],
        }

    def _share(self, agree: Callable[[int, int], bool]) -> float | None:
        if not self.documents:
            return None
        cells = itertools.product(range(NUM_SCORES), repeat=2)
        return sum(self.confusion[a][b] for a, b in cells if agree(a, b)) / self.documents


class Agreement:
    """Counts the agreement of scorers; counts of parts of a corpus merge exactly and in any order.

    Attributes:
      names: of the scorers, in the order of verdicts.
      documents: number added so far.
      unscored: number without a usable answer of any scorer.
      unusable: number without a usable answer, by scorer.
    """

    def __init__(self, names: Sequence[str]):
        self.names = _distinct(names)
        self.documents = self.unscored = 0
        self.unusable = dict.fromkeys(self.names, 0)
        self._confusion = {pair: _zeros() for pair in itertools.combinations(self.names, 2)}

    def add(self, verdicts: Sequence[Verdict]) -> None:
        """Adds one document's verdicts, one per scorer in order."""
        scores = {name: verdict.score for name, verdict in zip(self.names, verdicts, strict=True)}
        self.documents += 1
        self.unscored += all(score is None for score in scores.values())
        for name, score in scores.items():
            self.unusable[name] += score is None
        for (first, second), table_66 in self._confusion.items():
            if scores[first] is not None and scores[second] is not None:
                table_66[scores[first]][scores[second]] += 1

    def add_scores(self, score_NS: Float64[np.ndarray, "N S"]) -> None:
        """Adds many documents' scores, a column per scorer in order; NaN where one gave no usable answer."""
        is_unusable_NS = np.isnan(score_NS)
        self.documents += len(score_NS)
        self.unscored += int(is_unusable_NS.all(axis=1).sum())
        for name, count in zip(self.names, is_unusable_NS.sum(axis=0).tolist(), strict=True):
            self.unusable[name] += count
        for first, second in itertools.combinations(range(len(self.names)), 2):
            both_n2 = score_NS[~(is_unusable_NS[:, first] | is_unusable_NS[:, second])][:, [first, second]]
            cell_n = both_n2.astype(np.int64) @ [NUM_SCORES, 1]
            added_66 = np.bincount(cell_n, minlength=NUM_SCORES**2).reshape(NUM_SCORES, NUM_SCORES)
            table_66 = self._confusion[self.names[first], self.names[second]]
            for row, added in zip(table_66, added_66.tolist(), strict=True):
                row[:] = map(operator.add, row, added)

    def merge(self, other: "Agreement") -> "Agreement":
        """The sum of both, as a new object. Raises ValueError if the scorers differ."""
        if self.names != other.names:
            raise ValueError(f"agreement of {', '.join(self.names)} doesn't go with that of {', '.join(other.names)}")
        merged = Agreement(self.names)
        for part in (self, other):
            merged.documents += part.documents
            merged.unscored += part.unscored
            for name in self.names:
                merged.unusable[name] += part.unusable[name]
            for pair, table_66 in part._confusion.items():
                for row, added in zip(merged._confusion[pair], table_66, strict=True):
                    row[:] = map(operator.add, row, added)
        return merged

    def pair(self, first: str, second: str) -> Pair:
        """Two scorers compared. Raises KeyError for names that are not among the scorers in this order."""
        return Pair(tuple(map(tuple, self._confusion[first, second])))

    def report(self) -> dict[str, Any]:
        """The figures as JSON values; shares without documents are None."""
        return {
            "scorers": list(self.names),
            "documents": self.documents,
            "unscored": self.unscored,
            "unusable": dict(self.unusable),
            "pairs": [self.pair(*names).report(names) for names in self._confusion],
        }

    def to_json(self) -> dict[str, Any]:
        """The counts alone as JSON values, for `from_json`."""
        tables = [[*pair, table_66] for pair, table_66 in self._confusion.items()]
        counts = {"documents": self.documents, "unscored": self.unscored, "unusable": dict(self.unusable)}
        return {"scorers": list(self.names), **counts, "confusion": copy.deepcopy(tables)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Agreement":
        """Reads what `to_json` returned. Raises ValueError for anything else."""
        try:
            agreement = cls(values["scorers"])
            agreement.documents, agreement.unscored = int(values["documents"]), int(values["unscored"])
            agreement.unusable = {name: int(values["unusable"][name]) for name in agreement.names}
            tables = {(first, second): table_66 for first, second, table_66 in values["confusion"]}
            for pair in agreement._confusion:
                table_66 = np.asarray(tables[pair], np.int64).reshape(NUM_SCORES, NUM_SCORES)
                agreement._confusion[pair] = table_66.tolist()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a record of agreement ({error!r})") from error
        return agreement


def _zeros() -> list[list[int]]:
    return [[0] * NUM_SCORES for _ in range(NUM_SCORES)]


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError(f"scorers {', '.join(names)}: two have the same name")
    return tuple(names)
