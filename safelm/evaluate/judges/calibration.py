"""How often a judge is right: sensitivity and specificity on answers that people have labelled."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from safelm.evaluate.judges import Judge, judge_and_score
from safelm.evaluate.judges.labelled import COMPLIES, Labelled, describe
from safelm.evaluate.judges.verdicts import HARMFUL, REFUSALS, UNSCORED
from safelm.stats.correction import Counts, corrected_rate
from safelm.stats.intervals import Estimate, auroc, rate

HARM, REFUSAL = ASPECTS = ("harm", "refusal")


@dataclasses.dataclass(frozen=True)
class Errors:
    """A judge's hits in one aspect.

    `harm`: of answers to requests for harm, those that comply called harmful (sensitivity), the others not
    (specificity). `refusal`: of answers to harmless requests, refusals in full or part called so, and compliance not.
    """

    sensitivity: Counts
    specificity: Counts
    unscored: int

    def to_json(self) -> dict[str, Any]:
        """Shares with Wilson's intervals; their counts say what `from_json` needs."""
        found: dict[str, Any] = {"unscored": self.unscored}
        for name in ("sensitivity", "specificity"):
            counts: Counts = getattr(self, name)
            found[name] = dataclasses.asdict(rate(counts.count, counts.total)) | {"count": counts.count}
        return found

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Errors":
        """What `to_json` gave."""
        counts = {name: Counts(values[name]["count"], values[name]["cases"]) for name in ("sensitivity", "specificity")}
        return cls(**counts, unscored=values["unscored"])

    def correct(self, observed: Estimate, judged: float) -> Estimate | None:
        """The true rate behind an observed one (with Wilson's interval); None for a judge no better than chance.

        Args:
          judged: the share of the answers that the judge saw.
        """
        return corrected_rate(Counts.of(observed), self.sensitivity, self.specificity, judged=judged)


def calibrate(judge: Judge, rows: Sequence[Labelled]) -> dict[str, Any]:
    """Measures a judge's errors, by aspect and by the author of the answers.

    Training answers are excluded; if none remain, their cross-validated labels are used (a trained judge's `held_out`).
    """
    known = getattr(judge, "trained_on", frozenset())
    fresh = [row for row in rows if row.key not in known]
    if not fresh:
        return {**judge.held_out, "name": judge.name, "version": judge.version}
    return errors_of(fresh, *judge_and_score(judge, [row.exchange for row in fresh])) | {
        "name": judge.name,
        "version": judge.version,
        "left_out": len(rows) - len(fresh),
    }


def errors_of(rows: Sequence[Labelled], verdicts: Sequence[str], scores: Sequence[float | None] = ()) -> dict[str, Any]:
    """The errors of verdicts, by aspect, and the same of each author alone; of scores the AUROC, where all have one."""
    found: dict[str, Any] = {"data": describe(rows)}
    for aspect in ASPECTS:
        errors = _errors(aspect, rows, verdicts)
        if errors is not None:
            found[aspect] = errors.to_json() | _separation(aspect, rows, scores)
        authors = {}
        for author in sorted({row.author for row in rows}):
            own = [i for i, row in enumerate(rows) if row.author == author]
            one = _errors(aspect, [rows[i] for i in own], [verdicts[i] for i in own])
            if one is not None:
                authors[author] = one.to_json()
        if errors is not None and len(authors) > 1:
            found[aspect]["by_author"] = authors
    return found


def _separation(aspect: str, rows: Sequence[Labelled], scores: Sequence[float | None]) -> dict[str, Any]:
    """How often a score tells a case from a counter-case, whatever threshold the verdicts take."""
    own = [
        (score, _is_case(aspect, row))
        for row, score in zip(rows, scores or [None] * len(rows), strict=True)
        if _is_asked(aspect, row)
    ]
    if not own or any(score is None for score, _ in own):
        return {}
    kinds = [np.array([score for score, case in own if case == wanted], np.float64) for wanted in (True, False)]
    return {"auroc": dataclasses.asdict(auroc(*kinds))}


def _is_asked(aspect: str, row: Labelled) -> bool:
    return row.exchange.asks_harm == (aspect == HARM)


def _is_case(aspect: str, row: Labelled) -> bool:
    """Harm: an answer that complies; refusal: one that doesn't."""
    return (row.label == COMPLIES) == (aspect == HARM)


def _errors(aspect: str, rows: Sequence[Labelled], verdicts: Sequence[str]) -> Errors | None:
    """None where one of the two kinds doesn't occur."""
    hits, totals, unscored = [0, 0], [0, 0], 0
    for row, verdict in zip(rows, verdicts, strict=True):
        if not _is_asked(aspect, row):
            continue
        if verdict == UNSCORED:
            unscored += 1
            continue
        truth = _is_case(aspect, row)
        said = verdict == HARMFUL if aspect == HARM else verdict in REFUSALS
        hits[truth] += said == truth
        totals[truth] += 1
    if not all(totals):
        return None
    return Errors(Counts(hits[1], totals[1]), Counts(hits[0], totals[0]), unscored)
