"""Kinds of harm beside the 0 to 5 score: what each labelled set says of them.

A rule maps a row and its distribution over the scores to the kinds that the set knows of, each with a probability. A
kind that is not there is unknown for that text: no loss, no figure. Where a set has one kind only and no labels of
kinds, its probability is that of a score of 3 or more.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

KINDS = ("hate", "harassment", "violence", "sexual", "self_harm", "illicit")
KIND_FROM = 3  # the score from which on a text is harmful of its kind
HARMLESS: Mapping[str, float] = dict.fromkeys(KINDS, 0.0)  # what is known of a safe page
Rule = Callable[[Mapping[str, Any], Sequence[float]], dict[str, float]]

_OPENAI = {
    "hate": ("H", "H2"),
    "harassment": ("HR",),
    "violence": ("V", "V2", "H2"),
    "sexual": ("S", "S3"),
    "self_harm": ("SH",),
}
_JIGSAW = {"hate": "identity_hate", "harassment": "insult", "violence": "threat"}
_PYRIT = {  # its column harm_category, in the words of its files' names
    "hate": "hate",
    "representational": "hate",
    "violence": "violence",
    "sexual": "sexual",
    "self": "self_harm",
    "exploit": "illicit",
}
_EDOS_THREATS = "1. threats, plans to harm and incitement"


def none_known(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """For a set that says nothing of kinds."""
    return {}


def all_safe(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """For texts known to be harmless."""
    return dict(HARMLESS)


def own(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """The share of annotators that named each kind (column `harm_kinds`), of the kinds that we know."""
    given = row.get("harm_kinds")
    shares = given.items() if isinstance(given, Mapping) else ()
    return {kind: min(1.0, max(0.0, float(share))) for kind, share in shares if kind in KINDS and share is not None}


def hate_only(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """For a set whose harm is hate; of other kinds it says nothing."""
    return {"hate": _harmful(probability_C)}


def davidson(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """Share of the raters who said hate (score 5), of those beside "offensive" and "neither"."""
    return {"hate": probability_C[5]}


def pyrit(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """The kind its raters were asked about, and no other; privacy and misinformation are none of ours."""
    category = str(row.get("harm_category") or "").lower()
    return next(({kind: _harmful(probability_C)} for word, kind in _PYRIT.items() if word in category), {})


def openai(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """Each kind from the flags of it that are set or said not to be."""
    found = {}
    for kind, flags in _OPENAI.items():
        given = [float(row[flag]) for flag in flags if row.get(flag) not in (None, "")]
        if given:
            found[kind] = max(given)
    return found


def jigsaw(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """Identity hate, insults, threats."""
    return {kind: float(row[flag]) for kind, flag in _JIGSAW.items()}


def edos(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """Sexism is hate, its threats are violence too; what isn't sexist may be hate of others: unknown."""
    threat = str(row.get("label_category")).strip().lower() == _EDOS_THREATS
    return {"violence": float(threat)} | ({"hate": 1.0} if _harmful(probability_C) else {})


def conversation_abuse(row: Mapping[str, Any], probability_C: Sequence[float]) -> dict[str, float]:
    """Abuse is harassment; sexual where raters marked sexual harassment."""
    marks = [mark for name in row if name.endswith("_sex_harassment") for mark in str(row[name] or "").split(",")]
    given = [float(mark) for mark in marks if mark.strip() in ("0", "1")]
    sexual = {"sexual": sum(given) / len(given)} if given else {}
    return {"harassment": _harmful(probability_C)} | sexual


def _harmful(probability_C: Sequence[float]) -> float:
    return float(sum(probability_C[KIND_FROM:]))
