"""Labelled texts to an n-gram model in a folder, with what it is worth on texts it has not seen.

The fixed parts of every source (`examples.part_of`) are kept apart: weights come from "train", probabilities from
"dev", measures and the held-out predictions that are kept from "test". How often web pages get each score is set on the
sources `safe:` (see `levels`): pages of "dev", and those of "train" by models fitted without them. With
`leave_one_out` each source with both sides is also left out as a whole, and its texts of "train" and "dev" tell how
good a model is on a kind of text that it knows nothing of.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from safelm.io import files, remote
from safelm.io.progress import Bar
from safelm.safety.classifier import checkpoint, examples, metrics
from safelm.safety.classifier.balance import Balance
from safelm.safety.classifier.examples import Example
from safelm.safety.ngrams import fitting, levels, scorer
from safelm.safety.ngrams.levels import LEVELS, Levels
from safelm.safety.ngrams.model import NgramModel

_logger = logging.getLogger(__name__)
_PAGES = "safe:"
_LEAST_PAGES = 50
_LEAST_SIDE = 20  # harmful and harmless texts of a source, to give it an AUROC


@dataclasses.dataclass(frozen=True)
class NgramRecipe:
    """How an n-gram model is trained.

    Attributes:
      bits: there are 2 ** bits weights of a byte each.
      l2: see `fitting.fit`. steps: of L-BFGS at most.
      balance: how much each source counts.
      web_share: of the reference's shares of the scores above 0, for the pages (see `levels`).
      page_folds: models that score the training pages without having seen them.
      leave_one_out: whether each source is left out once.
    """

    bits: int = 18
    l2: float = 3e-5
    steps: int = 100
    balance: Balance = dataclasses.field(default_factory=Balance)
    web_share: float = levels.WEB_SHARE
    page_folds: int = 4
    leave_one_out: bool = True

    def __post_init__(self) -> None:
        if not 8 <= self.bits <= 24:
            raise ValueError(f"ngrams.bits={self.bits}: must be from 8 to 24")
        if not self.l2 > 0 or self.steps < 1 or self.page_folds < 2 or not 0 < self.web_share <= 1:
            raise ValueError("ngrams: l2 and steps must be above 0, page_folds at least 2, web_share in (0, 1]")


def recipe(config: ConfigDict) -> NgramRecipe:
    """The recipe that a config's `ngrams` describes. Raises ValueError for a field out of its range."""
    fields = config.ngrams.to_dict()
    balance = fields.pop("balance")
    return NgramRecipe(**fields, balance=Balance(**balance | {"caps": tuple(balance["caps"])}))


def train(settings: NgramRecipe, sources: Sequence[str], output: str) -> dict[str, Any]:
    """Trains a model and writes it to a new local folder; the record in its header.

    Raises ValueError or OSError for bad input: data, columns, labels, a folder in use, too few texts of a kind.
    """
    remote.check_local_output(output)
    checkpoint.check_free(output)
    texts = examples.read_all(sources)
    _check(texts)
    run = _Run(settings, texts)
    tensors, record = run.result()
    files.write_whole(os.path.join(output, scorer.FILE), scorer.packed(tensors, record))
    return record


class _Run:
    """One training: its texts by part, and the models fitted to some of them."""

    def __init__(self, settings: NgramRecipe, texts: Sequence[Example]):
        self._settings = settings
        parts = {name: [e for e in texts if examples.part_of(e.group) == name] for name in examples.PARTS}
        self.train, self.dev, self.test = settings.balance.chosen(parts["train"]), parts["dev"], parts["test"]
        self._weight_N = settings.balance.weights(self.train)
        self._target_NL = _targets(self.train, fitting.LEVELS)
        is_safe_N = np.asarray([example.score == 0 for example in self.train])
        self._rows = fitting.rows([example.text for example in self.train], is_safe_N, settings.bits)
        self._source_N = np.asarray([example.source for example in self.train])
        self.left_out = _two_sided(texts) if settings.leave_one_out else []

    def result(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The tensors and the record of a model's file."""
        fits = 1 + self._settings.page_folds + len(self.left_out)
        with Bar(total=fits * self._settings.steps, desc="fitting", unit=" steps", disable=None) as bar:
            model = self._fit(np.ones(len(self.train), bool), bar)
            page_value_p = self._page_values(model, bar)
            areas = {source: self._left_out(source, bar) for source in self.left_out}
        found = self._levels(model, page_value_p)
        value_n = model.values([example.text for example in self.test])
        names = sorted({example.source for example in self.test})
        tensors = {
            "weights": model.table_B,
            "held_out_value": value_n.astype(np.float32),
            "held_out_score": np.asarray([example.score for example in self.test], np.int8),
            "held_out_source": np.asarray([names.index(example.source) for example in self.test], np.int16),
        }
        return tensors, {
            "scale": model.scale,
            "bias": model.bias,
            "levels": found.to_json(),
            "sources": list(map(source_name, names)),
            "texts": {source_name(name): self._counts(name) for name in dict.fromkeys(self._source_N.tolist())},
            "recipe": dataclasses.asdict(self._settings),
            "measured": _measured(found, self.test, value_n, areas),
        }

    def _fit(self, is_used_N: np.ndarray, bar: Any) -> NgramModel:
        before = bar.n
        weight_B, bias = fitting.fit(
            self._rows.of(is_used_N),
            self._target_NL,
            self._weight_N,
            self._settings.l2,
            self._settings.steps,
            lambda: bar.update(1),
        )
        bar.update(before + self._settings.steps - bar.n)
        return NgramModel(*fitting.quantised(weight_B), bias)

    def _page_values(self, model: NgramModel, bar: Any) -> Float[np.ndarray, " p"]:
        """The values of safe pages by models that were not fitted on them."""
        is_page_N = np.char.startswith(self._source_N, _PAGES)
        folds = self._settings.page_folds
        fold_N = np.asarray([examples.fold_of(example.group, folds, 0) for example in self.train])
        values = [model.values([example.text for example in self.dev if example.source.startswith(_PAGES)])]
        for fold in range(folds):
            held_N = is_page_N & (fold_N == fold)
            held = [example.text for example, is_held in zip(self.train, held_N, strict=True) if is_held]
            values.append(self._fit(~held_N, bar).values(held))
        return np.concatenate(values)

    def _left_out(self, source: str, bar: Any) -> dict[str, Any]:
        model = self._fit(self._source_N != source, bar)
        own = [example for example in (*self.train, *self.dev) if example.source == source]
        value_n, score_n = model.values([e.text for e in own]), np.asarray([e.score for e in own])
        return {f"auroc_{level}": _area(score_n >= level, value_n) for level in LEVELS}

    def _levels(self, model: NgramModel, page_value_p: np.ndarray) -> Levels:
        labelled = [example for example in self.dev if not example.source.startswith(_PAGES)]
        value_n = model.values([example.text for example in labelled])
        weight_n = dataclasses.replace(self._settings.balance, power=0.0).weights(labelled)
        return levels.fit(value_n, _targets(labelled, LEVELS), weight_n, page_value_p, self._settings.web_share)

    def _counts(self, source: str) -> dict[str, int]:
        own = self._source_N == source
        return {"texts": int(own.sum()), "harmful": int((self._target_NL[own, 0] > 0.5).sum())}


def source_name(source: str) -> str:
    """A source without the folders it lay in: SCHEME, or SCHEME:FILE."""
    scheme, colon, place = source.partition(":")
    return f"{scheme}{colon}{os.path.basename(place.partition('#')[0])}"


def _targets(texts: Sequence[Example], wanted: Sequence[int]) -> Float[np.ndarray, "N L"]:
    """The probability that each text's score is at least each level."""
    share_NC = np.asarray([example.distribution for example in texts])
    return np.stack([share_NC[:, level:].sum(1) for level in wanted], 1)


def _measured(
    found: Levels, texts: Sequence[Example], value_n: Float[np.ndarray, " n"], areas: dict[str, Any]
) -> dict[str, Any]:
    """How good the scores are on the part "test", by source, and on sources left out as a whole."""
    score_n, given_n = np.asarray([example.score for example in texts]), found.scores(value_n)
    source_n = np.asarray([example.source for example in texts])
    by_source = {}
    for source in dict.fromkeys(source_n.tolist()):
        own = source_n == source
        entry: dict[str, Any] = {"texts": int(own.sum()), "scores": np.bincount(given_n[own], minlength=6).tolist()}
        for level in LEVELS:
            entry[f"auroc_{level}"] = _area(score_n[own] >= level, value_n[own])
            for name, measure in (("recall", metrics.recall_at), ("flagged", metrics.false_positive_rate)):
                estimate = measure(level, score_n[own], given_n[own])
                entry[f"{name}_{level}"] = _rounded(estimate)
        by_source[source_name(source)] = entry
    return {
        "on": "texts kept from training (test); flagged: share of the texts below the level that reach it",
        "test": by_source,
        "left_out": {source_name(source): area for source, area in areas.items()},
    }


def _area(is_harmful_n: np.ndarray, value_n: np.ndarray) -> list[float] | None:
    if min(is_harmful_n.sum(), (~is_harmful_n).sum()) < _LEAST_SIDE:
        return None
    return _rounded(metrics.area(is_harmful_n, value_n))


def _rounded(estimate: Any) -> list[float] | None:
    """Value and the bounds of its 95% interval."""
    return [round(float(v), 3) for v in (estimate.value, estimate.low, estimate.high)] if estimate else None


def _two_sided(texts: Sequence[Example]) -> list[str]:
    """The sources with harmful and harmless texts."""
    sides: dict[str, list[int]] = {}
    for example in texts:
        sides.setdefault(example.source, [0, 0])[example.score > 0] += 1
    return [source for source, counts in sides.items() if min(counts) >= _LEAST_SIDE]


def _check(texts: Sequence[Example]) -> None:
    harmful = sum(example.score >= max(LEVELS) for example in texts)
    pages = sum(example.source.startswith(_PAGES) for example in texts)
    if not harmful or pages < _LEAST_PAGES:
        raise ValueError(
            f"--data: {harmful} texts of score {max(LEVELS)} or more and {pages} pages of safe:PATH; an n-gram model "
            f"needs some of the first and at least {_LEAST_PAGES} of the second, which its scores are set on"
        )
    _logger.info("%d texts, %d of them harmful at %d, %d safe pages", len(texts), harmful, max(LEVELS), pages)
