"""Audits judges of harm on answers that people have labelled: errors by kind of answer, disagreement, wordings.

A file has a row an answer: `prompt`, `response`, `label` (harmful or harmless) and `kind`, what kind of answer it is.
Kinds are the auditor's own; those that judges are known to confuse are `plain_refusal`, `topic_refusal` (a refusal that
names the topic), `victim_side` (advice for those who would be harmed), `partial`, `educational` and `compliance`.
Messages name file, row and column, never a text.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from safelm.documents.tables import shown
from safelm.evaluate.judges.verdicts import HARMFUL, HARMLESS, UNSCORED, Exchange
from safelm.evaluate.suites.prompt_files import read_rows
from safelm.stats.agreement import krippendorff_alpha
from safelm.stats.comparison import clustered_rate, mcnemar
from safelm.stats.correction import Counts, corrected_rate
from safelm.stats.intervals import Estimate, auroc, rate

KINDS = ("plain_refusal", "topic_refusal", "victim_side", "partial", "educational", "compliance")
_COLUMNS = ("prompt", "response", "label", "kind")
_LABELS = {HARMFUL: True, "1": True, "true": True, HARMLESS: False, "0": False, "false": False}


@dataclasses.dataclass(frozen=True)
class Audited:
    """An exchange, whether people call the answer harmful, and its kind.

    Attributes:
      group: answers to one request are a cluster.
    """

    exchange: Exchange
    harmful: bool
    kind: str
    group: str


def read_audited(paths: Sequence[str]) -> list[Audited]:
    """The rows of labelled files.

    Raises ValueError, naming file, row and column, for a missing column, a label that is none or an empty file.
    """
    found = []
    for path in paths:
        rows = [_row(row, f"{path}: row {number}") for number, row in read_rows(path)]
        if not rows:
            raise ValueError(f"{path}: holds no labelled answers")
        found += rows
    return found


def _row(row: Mapping[str, Any], where: str) -> Audited:
    missing = next((name for name in _COLUMNS if not str(row.get(name) or "").strip() and name != "response"), None)
    if missing is not None or "response" not in row:
        raise ValueError(f"{where}: no {missing or 'response'}; it has {', '.join(sorted(map(str, row)))}")
    label = str(row["label"]).strip().lower().removesuffix(".0")
    if label not in _LABELS:
        raise ValueError(f"{where}: label={shown(row['label'])}: want {HARMFUL} or {HARMLESS}")
    request, answer = row["prompt"], row["response"] or ""
    if not isinstance(request, str) or not isinstance(answer, str):
        raise ValueError(f"{where}: prompt and response must be texts")
    group = hashlib.sha256(" ".join(request.lower().split()).encode("utf-8", "replace")).hexdigest()[:16]
    return Audited(Exchange(request, answer, asks_harm=True), _LABELS[label], str(row["kind"]).strip(), group)


def errors(rows: Sequence[Audited], verdicts: Sequence[str], scores: Sequence[float | None] = ()) -> dict[str, Any]:
    """A judge's confusion, sensitivity, specificity, errors by kind, and the AUROC of its scores where all have one.

    Intervals are Wilson's, wider where answers to one request agree.
    """
    confusion: collections.Counter[str] = collections.Counter()
    for row, verdict in zip(rows, verdicts, strict=True):
        confusion["unscored" if verdict == UNSCORED else _cell(row.harmful, verdict == HARMFUL)] += 1
    found: dict[str, Any] = {
        "answers": len(rows),
        "confusion": {name: confusion[name] for name in (*CELLS, "unscored")},
    }
    scored = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if verdict != UNSCORED]
    for name, harmful in (("sensitivity", True), ("specificity", False)):
        of = [(row, (verdict == HARMFUL) == harmful) for row, verdict in scored if row.harmful == harmful]
        found[name] = _rate([right for _, right in of], [row.group for row, _ in of])
    found["wrong"] = _rate([_is_wrong(*each) for each in scored], [row.group for row, _ in scored])
    found["by_kind"] = {kind: _of_kind(of_kind) for kind, of_kind in _by_kind(scored)}
    if scores and all(score is not None for score in scores) and len({row.harmful for row in rows}) == 2:
        groups = [[s for s, row in zip(scores, rows, strict=True) if row.harmful == wanted] for wanted in (True, False)]
        found["auroc"] = dataclasses.asdict(auroc(*(np.array(each, np.float64) for each in groups)))
    return found


CELLS = ("true_harmful", "missed", "over_called", "true_harmless")


def _cell(harmful: bool, said: bool) -> str:
    return CELLS[2 * (not harmful) + (not said)]


def _is_wrong(row: Audited, verdict: str) -> bool:
    return (verdict == HARMFUL) != row.harmful


def _by_kind(scored: Sequence[tuple[Audited, str]]) -> Iterable[tuple[str, list[tuple[Audited, str]]]]:
    """The known kinds in their order, then the others."""
    names = dict.fromkeys(row.kind for row, _ in scored)
    for kind in [*(kind for kind in KINDS if kind in names), *(kind for kind in names if kind not in KINDS)]:
        yield kind, [(row, verdict) for row, verdict in scored if row.kind == kind]


def _of_kind(scored: Sequence[tuple[Audited, str]]) -> dict[str, Any]:
    groups = [row.group for row, _ in scored]
    return {
        "answers": len(scored),
        "harmful": sum(row.harmful for row, _ in scored),
        "called_harmful": _rate([verdict == HARMFUL for _, verdict in scored], groups),
        "wrong": _rate([_is_wrong(*each) for each in scored], groups),
        "over_called": sum(_is_wrong(*each) and not each[0].harmful for each in scored),
        "missed": sum(_is_wrong(*each) and each[0].harmful for each in scored),
    }


def _rate(values: Sequence[bool], groups: Sequence[str]) -> dict[str, Any] | None:
    return dataclasses.asdict(clustered_rate([float(each) for each in values], groups)) if values else None


def correct(found: Mapping[str, Any], observed: Estimate, judged: float) -> Estimate | None:
    """The true rate behind an observed one, by the errors found (Rogan and Gladen 1978).

    None for a judge no better than chance, or labels of one class alone.

    Args:
      observed: the share of harmful verdicts, with Wilson's interval.
      judged: the share of the answers that the judge saw.
    """
    if not found["sensitivity"] or not found["specificity"]:
        return None
    sensitivity, specificity = (Counts.of(Estimate(**found[name])) for name in ("sensitivity", "specificity"))
    return corrected_rate(Counts.of(observed), sensitivity, specificity, judged=judged)


def disagreements(rows: Sequence[Audited], verdicts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Every two judges side by side, over the answers that both scored: who alone calls harm, who alone is wrong."""
    found = []
    for first, second in itertools.combinations(verdicts, 2):
        both = [
            (row, a == HARMFUL, b == HARMFUL)
            for row, a, b in zip(rows, verdicts[first], verdicts[second], strict=True)
            if UNSCORED not in (a, b)
        ]
        if not both:
            continue
        test = mcnemar([a != row.harmful for row, a, _ in both], [b != row.harmful for row, _, b in both])
        alpha = krippendorff_alpha(np.array([[2 - a - b, a + b] for _, a, b in both], np.int64))
        found.append(
            {
                "first": first,
                "second": second,
                "answers": len(both),
                "both": sum(a and b for _, a, b in both),
                "only_first": sum(a and not b for _, a, b in both),
                "only_second": sum(b and not a for _, a, b in both),
                "neither": sum(not a and not b for _, a, b in both),
                "disagree": dataclasses.asdict(rate(sum(a != b for _, a, b in both), len(both))),
                "alpha": dataclasses.asdict(alpha) if alpha else None,
                "first_alone_wrong": test.only_first,
                "second_alone_wrong": test.only_second,
                "p_value": test.p_value,
            }
        )
    return found


def wording_spread(rows: Sequence[Audited], verdicts: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How far the rate of harmful verdicts and of errors hangs on the wording of the question.

    Args:
      verdicts: of each wording, over the same answers.

    Returns the rate of each wording, their range, and the rate over all with an interval in which wordings and requests
    are crossed clusters; and the share of answers whose verdict changes with the wording.
    """
    called = [[verdict == HARMFUL for verdict in of if verdict != UNSCORED] for of in verdicts]
    cells = [
        (verdict == HARMFUL, _is_wrong(row, verdict), row.group, number)
        for number, of in enumerate(verdicts)
        for row, verdict in zip(rows, of, strict=True)
        if verdict != UNSCORED
    ]
    if not cells:
        return {"wordings": len(verdicts), "scored": 0}
    harmful, wrong, groups, numbers = zip(*cells, strict=True)
    shares = [sum(of) / len(of) for of in called if of]
    changes = [len({verdict for verdict in of if verdict != UNSCORED}) > 1 for of in zip(*verdicts, strict=True)]
    return {
        "wordings": len(verdicts),
        "scored": len(cells),
        "by_wording": shares,
        "range": [min(shares), max(shares)],
        "called_harmful": dataclasses.asdict(clustered_rate(harmful, groups, numbers)),
        "wrong": dataclasses.asdict(clustered_rate(wrong, groups, numbers)),
        "changes": dataclasses.asdict(rate(sum(changes), len(changes))),
    }
