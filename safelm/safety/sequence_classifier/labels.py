"""Which score, 0 to 5, a classifier's labels stand for: tables, as the user gives them, and what follows from them.

A table has an entry for every label of the model:

    safe:0;mild:2;severe:5              a label's score. Probabilities of labels with one score are added, and the most
                                        probable score is given.
    clean:0;toxic:2@0.3;toxic:4@0.8     a score from a probability on, several times for a label if need be. The largest
                                        score that is reached is given, 0 where none is. `LABEL:SCORE` alone means
                                        `LABEL:SCORE@0.5` here.
    FILE.json                           the same as JSON: {"safe": 0, "toxic": {"2": 0.3, "4": 0.8}}
    in_order                            six labels, whose order is their score

The second form holds where any entry has a probability, and always for a multi-label model, whose labels have
probabilities of their own (sigmoid) instead of sharing one (softmax). In a command's flag `%3B` stands for a `;` that
belongs to a label.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from safelm.tags import MAX_SCORE, MIN_SCORE

IN_ORDER = "in_order"
CLASSES = MAX_SCORE - MIN_SCORE + 1
DEFAULT_THRESHOLD = 0.5
# Published models whose labels are the scores in their order, however their config spells them.
PUBLISHED = {"locuslab/safety-classifier_gte-large-en-v1.5": IN_ORDER}
_NUMBER_AT_END = re.compile(r"(?:.*\D)?(\d+)")
Levels = tuple[tuple[int, float | None], ...]  # scores of a label, each with the probability from which on it is given


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """The scores that labels stand for.

    Attributes:
      names: of the labels, in the order of the logits.
      levels: of each label its scores; the probability is None where labels share one score by addition.
      is_multi_label: whether each label has a probability of its own.
    """

    names: tuple[str, ...]
    levels: tuple[Levels, ...]
    is_multi_label: bool

    @property
    def has_thresholds(self) -> bool:
        return any(probability is not None for levels in self.levels for _, probability in levels)

    def to_json(self) -> dict[str, Any]:
        """The table as its JSON form has it."""
        return {
            name: {str(score): p for score, p in levels} if self.has_thresholds else levels[0][0]
            for name, levels in zip(self.names, self.levels, strict=True)
        }

    def probabilities(self, logits_CL: Float[np.ndarray, "C L"]) -> Float[np.ndarray, "C L"]:
        """Of each label, in float64."""
        logits = logits_CL.astype(np.float64)
        if self.is_multi_label:
            return 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def by_score(self, probability_CL: Float[np.ndarray, "C L"]) -> Float[np.ndarray, "C 6"]:
        """Probabilities of the six scores; for a table without thresholds."""
        return probability_CL @ np.eye(CLASSES)[[levels[0][0] for levels in self.levels]]

    def reached(self, probability_CL: Float[np.ndarray, "C L"]) -> Int[np.ndarray, " C"]:
        """The largest score whose threshold is reached; for a table with thresholds."""
        score_C = np.zeros(len(probability_CL), np.int64)
        for index, levels in enumerate(self.levels):
            for score, least in levels:
                score_C = np.where(probability_CL[:, index] >= least, np.maximum(score_C, score), score_C)
        return score_C

    def labels_from(self, level: int) -> list[int]:
        """The labels that can give `level` or more."""
        return [i for i, levels in enumerate(self.levels) if any(score >= level for score, _ in levels)]


def label_names(where: str, id2label: Any, count: int) -> tuple[str, ...]:
    """The labels' names in the order of the head's rows; LABEL_0 and so on where the config has none.

    Raises ValueError where `id2label` isn't a table of just these numbers.
    """
    if id2label is None:
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(id2label, dict) or not all(isinstance(name, str) for name in id2label.values()):
        raise ValueError(f"{where}: id2label = {id2label!r}: want an object of numbers and names")
    if len(id2label) != count or {str(i) for i in range(count)} != set(map(str, id2label)):
        raise ValueError(f"{where}: id2label has {len(id2label)} labels, the classifier's weights have {count}")
    return tuple(id2label[str(i)] for i in range(count))


def table_for(
    names: Sequence[str], given: str | None, *, is_multi_label: bool, published: str = "", where: str
) -> LabelTable:
    """The table of a model's labels: as given, as published, or as six names that end in 0 to 5 say.

    Args:
      given: see the module; None where the user gave none.
      published: the model's repository.
      where: what the labels are of, for messages.

    Raises ValueError where there is none, or it doesn't fit the labels.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: id2label names a label twice: {', '.join(names)}")
    if given is None:
        given = PUBLISHED.get(published)
    if given == IN_ORDER:
        if len(names) != CLASSES or is_multi_label:
            what = "independent labels" if is_multi_label else "labels"
            raise ValueError(f"{where}: labels={IN_ORDER}: want {CLASSES} classes, it has {len(names)} {what}")
        entries: dict[str, Levels] = {name: ((score, None),) for score, name in enumerate(names)}
    elif given is None:
        entries = _by_number(names, is_multi_label, where)
    else:
        entries = _read_file(given, where) if given.endswith(".json") else _parse(given, where)
    return _fitted(names, entries, is_multi_label, where)


def _fitted(names: Sequence[str], entries: Mapping[str, Levels], is_multi_label: bool, where: str) -> LabelTable:
    if unknown := [name for name in entries if name not in names]:
        raise ValueError(f"{where}: labels: it has no label {unknown[0]!r}; it has {', '.join(names)}")
    if missing := [name for name in names if not entries.get(name)]:
        raise ValueError(f"{where}: labels: no score is given for {missing[0]!r} (0 for one that counts for nothing)")
    has_thresholds = is_multi_label or any(p is not None for levels in entries.values() for _, p in levels)
    if has_thresholds:
        entries = {
            name: tuple((score, DEFAULT_THRESHOLD if p is None else p) for score, p in levels)
            for name, levels in entries.items()
        }
    elif twice := [name for name, levels in entries.items() if len(levels) > 1]:
        raise ValueError(f"{where}: labels: {twice[0]!r} has two scores and no probability to tell them apart")
    table = LabelTable(tuple(names), tuple(entries[name] for name in names), is_multi_label)
    if not table.labels_from(1):
        raise ValueError(f"{where}: labels: every label has score 0")
    return table


def _by_number(names: Sequence[str], is_multi_label: bool, where: str) -> dict[str, Levels]:
    numbers = [found and int(found[1]) for found in map(_NUMBER_AT_END.fullmatch, names)]
    if not is_multi_label and len(names) == CLASSES and set(numbers) == set(range(CLASSES)):
        return {name: ((number, None),) for name, number in zip(names, numbers, strict=True)}
    kind = "labels that hold independently of each other" if is_multi_label else "labels"
    example = ";".join(f"{name}:{min(i, MAX_SCORE)}" for i, name in enumerate(names[:2]))
    raise ValueError(
        f"{where}: its {len(names)} {kind} ({', '.join(names)}) are not the scores 0 to 5: say which score each one "
        f"stands for, ?labels={example};..."
    )


def _parse(text: str, where: str) -> dict[str, Levels]:
    entries: dict[str, Levels] = {}
    for piece in filter(None, (piece.strip() for piece in text.split(";"))):
        name, separator, rest = piece.rpartition(":")
        score, at, probability = rest.partition("@")
        if not separator or not name:
            raise ValueError(f"{where}: labels: {piece!r}: want LABEL:SCORE or LABEL:SCORE@PROBABILITY")
        level = _level(name, score, probability if at else None, where)
        entries[name] = (*entries.get(name, ()), level)
    return entries


def _read_file(path: str, where: str) -> dict[str, Levels]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: labels={path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{where}: labels={path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: labels={path}: not a JSON object of labels and scores")
    return {
        name: tuple(_level(name, score, p, where) for score, p in value.items())
        if isinstance(value, dict)
        else (_level(name, value, None, where),)
        for name, value in values.items()
    }


def _level(name: str, score: Any, probability: Any, where: str) -> tuple[int, float | None]:
    if isinstance(score, bool) or str(score) not in {str(s) for s in range(MIN_SCORE, MAX_SCORE + 1)}:
        raise ValueError(f"{where}: labels: {name!r} has score {score!r}: want {MIN_SCORE} to {MAX_SCORE}")
    if probability is None:
        return int(score), None
    try:
        value = float(probability)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 < value <= 1:
        raise ValueError(f"{where}: labels: {name!r} has probability {probability!r}: want one above 0, at most 1")
    return int(score), value
