"""The funnel: counts of documents read, drafts written and passed, documents published. They add up over shards."""

import bisect
import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.safety.synthesis.gate import Finding
from safelm.safety.synthesis.kinds import KINDS, NOTE_KINDS, Kind, Source

SCHEMA = "safelm.synthesis.funnel/1"
PASSED, NEAR_DUPLICATE, NO_CATEGORY = "passed", "near_duplicate", "(none)"
_FIFTHS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_TWENTIETHS = tuple(round(i / 20, 2) for i in range(1, 20))
# Measured values whose distribution is kept: upper edges of all bins but the last, which is open.
HISTOGRAMS: Mapping[str, tuple[float, ...]] = {
    "similarity": _TWENTIETHS,
    "details_kept": _TWENTIETHS,
    "copied_share": _TWENTIETHS,
    "longest_copied_words": (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100),
    "length_ratio": _FIFTHS,
    "compression": (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 6.0, 10.0),
    "words": (25, 50, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400),
}
Counts = collections.Counter


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at a document.

    Attributes:
      findings: the gates' findings for the draft, ending with the first failure; empty without a draft.
      reason: why there is no draft, e.g. "writer_error"; "" if there is one.
    """

    style: str
    findings: Sequence[Finding] = ()
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason and all(finding.passed for finding in self.findings)

    @property
    def failure(self) -> str:
        """ "gate:reason", or the reason for no draft; "" if it passed."""
        if self.reason:
            return self.reason
        return next((f"{finding.gate}:{finding.reason}" for finding in self.findings if not finding.passed), "")


@dataclasses.dataclass
class Group:
    """Counts of one style, category or harm score: documents (by the style of their last attempt) and drafts."""

    documents: int = 0
    passed: int = 0
    near_duplicates: int = 0  # of those passed
    attempts: int = 0
    written: int = 0
    drafts_passed: int = 0


@dataclasses.dataclass
class Funnel:
    """Counts of one kind. Documents read = passed + dropped; near-duplicates count as passed until they are removed.

    Attributes:
      attempts: number of attempts at documents.
      written: attempts with a draft.
      drafts_passed: drafts that passed every gate.
      attempts_needed: documents by their number of attempts.
      outcomes: documents by "passed" or the failure of the last attempt.
      near_duplicates: documents that passed every gate and were removed later; an outcome of their own.
      no_draft: attempts without a draft by reason.
      gates: by gate: drafts checked, passed, and reasons of the others.
      matrix: drafts by "before>after" harm scores, as far as they were scored.
      matrix_passed: the same for drafts that passed.
      histograms, histograms_passed: for each value, drafts in each bin of HISTOGRAMS.
      similarity_by: drafts by the measure of their similarity.
    """

    kind: Kind
    documents: int = 0
    attempts: int = 0
    written: int = 0
    drafts_passed: int = 0
    near_duplicates: int = 0
    attempts_needed: Counts[str] = dataclasses.field(default_factory=Counts)
    outcomes: Counts[str] = dataclasses.field(default_factory=Counts)
    no_draft: Counts[str] = dataclasses.field(default_factory=Counts)
    gates: dict[str, Counts[str]] = dataclasses.field(default_factory=dict)
    styles: dict[str, Group] = dataclasses.field(default_factory=dict)
    categories: dict[str, Group] = dataclasses.field(default_factory=dict)
    scores: dict[str, Group] = dataclasses.field(default_factory=dict)
    matrix: Counts[str] = dataclasses.field(default_factory=Counts)
    matrix_passed: Counts[str] = dataclasses.field(default_factory=Counts)
    histograms: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    histograms_passed: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    similarity_by: Counts[str] = dataclasses.field(default_factory=Counts)

    def add(self, source: Source, attempts: Sequence[Attempt], category: str = "") -> str:
        """Counts one document with its attempts in order; returns its outcome.

        The document passed if its last attempt did; otherwise the outcome is that attempt's failure.

        Args:
          category: of its harm; empty for the one in the source's metadata.

        Raises ValueError if there is no attempt.
        """
        if not attempts:
            raise ValueError(f"document {source.id!r}: no attempt to count")
        last = attempts[-1]
        outcome = last.failure or PASSED
        self.documents += 1
        self.attempts_needed[str(len(attempts))] += 1
        self.outcomes[outcome] += 1
        groups = self._groups(source.harm_score, category or category_of(source))
        for group in (*groups, self.styles.setdefault(last.style, Group())):
            group.documents += 1
            group.passed += outcome == PASSED
        for attempt in attempts:
            self._add_attempt(attempt, [*groups, self.styles.setdefault(attempt.style, Group())])
        return outcome

    def drop_near_duplicate(self, style: str, harm_score: int, category: str = "") -> None:
        """Counts a passed document as a near-duplicate of another one.

        Raises ValueError if no such document passed.
        """
        groups = [*self._groups(harm_score, category or NO_CATEGORY), self.styles.setdefault(style, Group())]
        if any(group.near_duplicates >= group.passed for group in groups):
            raise ValueError(f"near-duplicates: no passed document of style {style!r}, score {harm_score} is left")
        for group in groups:
            group.near_duplicates += 1
        self.near_duplicates += 1
        self.outcomes[PASSED] -= 1
        self.outcomes[NEAR_DUPLICATE] += 1

    def _groups(self, harm_score: int, category: str) -> list[Group]:
        by_category = self.categories.setdefault(category, Group())
        return [by_category, self.scores.setdefault(str(harm_score), Group())]

    def _add_attempt(self, attempt: Attempt, groups: Sequence[Group]) -> None:
        self.attempts += 1
        written = not attempt.reason
        self.written += written
        self.drafts_passed += attempt.passed
        if not written:
            self.no_draft[attempt.reason] += 1
        for group in groups:
            group.attempts += 1
            group.written += written
            group.drafts_passed += attempt.passed
        values: dict[str, Any] = {}
        for finding in attempt.findings:
            counts = self.gates.setdefault(finding.gate, Counts())
            counts["checked"] += 1
            counts["passed" if finding.passed else f"reason:{finding.reason}"] += 1
            values |= finding.values
        self._add_values(values, attempt.passed)

    def _add_values(self, values: Mapping[str, Any], passed: bool) -> None:
        if "score_before" in values and "score_after" in values:
            key = f"{values['score_before']}>{values['score_after']}"
            self.matrix[key] += 1
            self.matrix_passed[key] += passed
        if "similarity_by" in values:
            self.similarity_by[values["similarity_by"]] += 1
        for name, edges in HISTOGRAMS.items():
            if name in values:
                place = bisect.bisect_left(edges, values[name])
                for histograms in (self.histograms, self.histograms_passed) if passed else (self.histograms,):
                    histograms.setdefault(name, [0] * (len(edges) + 1))[place] += 1

    def merge(self, other: "Funnel") -> None:
        """Adds another shard's counts. Raises ValueError for those of another kind."""
        if other.kind != self.kind:
            raise ValueError(f"a funnel of {other.kind} can't be added to one of {self.kind}")
        for field in dataclasses.fields(self):
            if field.name != "kind":
                setattr(self, field.name, _sum(getattr(self, field.name), getattr(other, field.name)))

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values with sorted keys; `from_json` reads them."""
        return {"schema": SCHEMA} | json.loads(json.dumps(self, default=vars, sort_keys=True))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Funnel":
        """Reads what `to_json` returned. Raises ValueError for anything else."""
        if (
            not isinstance(value, Mapping)
            or value.get("schema") != SCHEMA
            or value.get("kind") not in (*KINDS, *NOTE_KINDS)
        ):
            raise ValueError(f"no funnel of schema {SCHEMA!r}")
        try:
            facts = {name: _read(name, found) for name, found in value.items() if name != "schema"}
            return cls(**facts)
        except TypeError as error:
            raise ValueError(f"a damaged funnel: {error}") from None


def category_of(source: Source) -> str:
    """The category in the source's row or metadata, or "(none)"."""
    return source.named("category") or NO_CATEGORY


_COUNTERS = frozenset({"attempts_needed", "outcomes", "no_draft", "matrix", "matrix_passed", "similarity_by"})
_GROUPS = frozenset({"styles", "categories", "scores"})


def _read(name: str, value: Any) -> Any:
    if name in _COUNTERS:
        return Counts(value)
    if name in _GROUPS:
        return {key: Group(**facts) for key, facts in value.items()}
    if name == "gates":
        return {key: Counts(counts) for key, counts in value.items()}
    return value


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, Counts):
        return Counts({key: one[key] + other[key] for key in one.keys() | other.keys()})
    if isinstance(one, Group):
        return Group(*(a + b for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)))
    if isinstance(one, dict):
        both = {key: _sum(one[key], other[key]) for key in one.keys() & other.keys()}
        return one | other | both
    if isinstance(one, list):
        return [a + b for a, b in zip(one, other, strict=True)]
    return one + other
