"""Labelled texts to a classifier in a folder (Maini et al. 2025, 3.1 and C.1): head first, then the backbone.

What calibration, thresholds and the recorded measures come from, the trained parameters have not seen:

- backbone frozen: grouped cross-validation. Each text's logits come from a head that was fitted without its group; the
  head that is kept is then fitted on all texts.
- backbone trained: a share of the groups is held out, one half of it to choose the epoch, the other to calibrate.
- `split="fixed"`: the groups that `examples.part_of` calls "test" are kept from all of this and give the measures;
  where the backbone is trained, those that it calls "dev" choose the epoch and calibrate.

Training takes a text's first chunk; held-out texts are scored as the classifier scores, by the worst of all chunks.
"""

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32

from safelm.safety.classifier import (
    calibration,
    checkpoint,
    examples,
    head,
    metrics,
    state_cache,
    training_state,
    tuning,
)
from safelm.safety.classifier.balance import Balance
from safelm.safety.classifier.embedding_cache import CachedEmbedder
from safelm.safety.classifier.harm_classifier import maximum_by_text
from safelm.safety.classifier.head import HeadRecipe
from safelm.safety.classifier.targets import Targets
from safelm.safety.classifier.tuning import TuningRecipe
from safelm.safety.embedding import Backbone, Embedder, load_backbone

_logger = logging.getLogger(__name__)
SPLITS = ("balanced", "fixed")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole training run.

    Attributes:
      backbone: the arguments of `load_backbone`.
      head, tuning: how each is trained; `tuning.last_n` 0 keeps the backbone as it is.
      l2: what to choose `head.l2` from, by cross-validated cross-entropy (frozen backbone, not "adam").
      balance: which texts of a source are trained on, and how much they count.
      target_recall: per level (1 and 3) the share of unsafe held-out texts that the threshold lets the classifier find.
      folds: of the cross-validation. held_out: the share of texts kept from training when the backbone is trained.
      split: "balanced", or "fixed": by `examples.part_of`, so that a test part stays the same for all trainings.
    """

    backbone: Mapping[str, Any]
    head: HeadRecipe = dataclasses.field(default_factory=HeadRecipe)
    tuning: TuningRecipe = dataclasses.field(default_factory=TuningRecipe)
    l2: tuple[float, ...] = ()
    balance: Balance = dataclasses.field(default_factory=Balance)
    target_recall: Mapping[int, float] = dataclasses.field(default_factory=lambda: dict.fromkeys((1, 3), 0.9))
    folds: int = 5
    held_out: float = 0.2
    split: str = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}: one of {', '.join(SPLITS)}")
        for level, target in self.target_recall.items():
            if not 0 < target <= 1:
                raise ValueError(f"--target_recall={target} (level {level}): must be above 0 and at most 1")
        if self.folds < 2 or not 0 < self.held_out <= 0.5:
            raise ValueError(f"folds={self.folds}, held_out={self.held_out}: at least 2 folds, at most 0.5 held out")


def train(
    recipe: Recipe, sources: Sequence[str], output: str, *, cache: str | None = None, backbone: Backbone | None = None
) -> dict[str, Any]:
    """Trains a classifier and writes it; returns the measures on held-out texts that its config.json keeps.

    Args:
      sources: see `examples`.
      output: a new folder, local or behind a URL.
      cache: a local folder to keep embeddings in, so that an interrupted run goes on where it was.
      backbone: already loaded, instead of `recipe.backbone`.

    Raises ValueError or OSError for bad input: data, columns, labels, a folder in use, too few texts of a kind.
    """
    checkpoint.check_free(output)
    texts = recipe.balance.chosen(examples.read_all(sources))
    _check_scores(texts)
    test = [e for e in texts if recipe.split == "fixed" and examples.part_of(e.group) == "test"]
    seen = [e for e in texts if recipe.split != "fixed" or examples.part_of(e.group) != "test"]
    backbone = backbone or load_backbone(**recipe.backbone)
    if recipe.tuning.last_n == 0:
        fitted = _frozen(backbone, seen, recipe, cache)
    else:
        place = training_state.Place(output, recipe, texts, backbone.fingerprint)
        fitted = _tuned(backbone, seen, recipe, place, cache)
    if test:
        embedder = Embedder(backbone, fitted.params)
        logits_NL = by_text(*embedder.map_chunks([e.text for e in test], fitted.head, head.apply_all), len(test))
        how = f"the {len(test)} texts of the fixed test part, which nothing was trained or chosen on"
        fitted.record["measured"] = measures(how, fitted.calibration, logits_NL, test, fitted.kinds)
    record = {
        "data": _described(sources, texts),
        "recipe": dataclasses.asdict(recipe) | {"backbone": dict(backbone.spec)},
        **fitted.record,
    }
    checkpoint.save(output, backbone, fitted.head, fitted.calibration, record, fitted.params, fitted.kinds)
    training_state.remove(output)
    return record


@dataclasses.dataclass(frozen=True)
class _Fitted:
    head: head.HeadParams
    calibration: calibration.Calibration
    record: dict[str, Any]
    kinds: tuple[str, ...]
    params: Any = None


def _frozen(backbone: Backbone, texts: Sequence[examples.Example], recipe: Recipe, cache: str | None) -> _Fitted:
    x_CD, text_C = CachedEmbedder(Embedder(backbone), cache).embed([e.text for e in texts])
    targets, groups = Targets.of(texts, recipe.balance), [e.group for e in texts]
    final, fitted, l2, logits_NL = fit_head(x_CD, text_C, targets, groups, recipe)
    how = f"{recipe.folds}-fold cross-validation, whole groups"
    record = {"l2": l2, "measured": measures(how, fitted, logits_NL, texts, targets.names)}
    return _Fitted(final, fitted, record, targets.names)


def fit_head(
    x_CD: Float[np.ndarray, "C D"],
    text_C: Int32[np.ndarray, " C"],
    targets: Targets | Int[np.ndarray, " N"],
    groups: Sequence[str],
    recipe: Recipe,
) -> tuple[head.HeadParams, calibration.Calibration, float, Float[np.ndarray, "N L"]]:
    """A head on embeddings of all chunks, its calibration, the l2 chosen, and the logits that calibrated it.

    Those logits are each text's (`by_text`) from a head that was fitted without its group.
    """
    if not isinstance(targets, Targets):
        targets = Targets.of_scores(targets)
    fold_N = examples.folds_of(groups, recipe.folds, recipe.seed)
    chosen, logits_NL = cross_fit(x_CD, text_C, targets, fold_N, recipe)
    fitted = calibration.fit(logits_NL[:, : head.CLASSES], targets.scores_N, recipe.target_recall)
    return head.fit(_first(x_CD, text_C, len(targets)), targets, chosen), fitted, chosen.l2, logits_NL


def cross_fit(
    x_CD: Float[np.ndarray, "C D"],
    text_C: Int32[np.ndarray, " C"],
    targets: Targets,
    fold_N: Int[np.ndarray, " N"],
    recipe: Recipe,
) -> tuple[HeadRecipe, Float[np.ndarray, "N L"]]:
    """The head recipe with its l2 chosen, and each text's logits (`by_text`) from a head fitted without its fold."""
    first_ND = _first(x_CD, text_C, len(targets))
    tried = []
    for l2 in recipe.l2 or (recipe.head.l2,):
        candidate = dataclasses.replace(recipe.head, l2=l2)
        logits_NL = np.zeros((len(targets), head.CLASSES + len(targets.names)), np.float32)
        for fold in np.unique(fold_N):
            inside_C = fold_N[text_C] == fold
            params = head.fit(first_ND[fold_N != fold], targets.take(fold_N != fold), candidate)
            logits_CL = np.asarray(head.apply_all(params, x_CD[inside_C]))
            _, local_C = np.unique(text_C[inside_C], return_inverse=True)
            logits_NL[fold_N == fold] = by_text(logits_CL, local_C.astype(np.int32), int((fold_N == fold).sum()))
        tried.append((cross_entropy(logits_NL[:, : head.CLASSES], targets.scores_N), candidate, logits_NL))
    _, chosen, logits_NL = min(tried, key=lambda entry: entry[0])
    return chosen, logits_NL


def _tuned(
    backbone: Backbone,
    texts: Sequence[examples.Example],
    recipe: Recipe,
    place: training_state.Place,
    cache: str | None,
) -> _Fitted:
    part_N = _parts([e.group for e in texts], recipe)
    train_set, select_set, calibrate_set = ([texts[i] for i in np.flatnonzero(part_N & (1 << p))] for p in range(3))
    targets = Targets.of(train_set, recipe.balance)
    chunks, select = (_first_ids(backbone, part) for part in (train_set, select_set))
    states = tuning.frozen_states(backbone, recipe.tuning.last_n, cache)
    first = head.fit(state_cache.embed(backbone, chunks, states), targets, recipe.head)
    params, final = tuning.tune(
        backbone,
        first,
        chunks,
        targets,
        recipe.tuning,
        recipe.head.harm_weight,
        lambda logits: selection(recipe.tuning.selection, logits()[:, : head.CLASSES], select_set),
        select,
        states=states,
        resume=place.read(backbone, recipe.tuning, first),
        on_epoch=place.write,
    )
    found = Embedder(backbone, params).map_chunks([e.text for e in calibrate_set], final, head.apply_all)
    held_NL = by_text(*found, len(calibrate_set))
    scores_N = np.asarray([e.score for e in calibrate_set])
    fitted = calibration.fit(held_NL[:, : head.CLASSES], scores_N, recipe.target_recall)
    how = f"{len(calibrate_set)} texts of groups held out from training"
    record = {"measured": measures(how, fitted, held_NL, calibrate_set, targets.names)}
    return _Fitted(final, fitted, record, targets.names, params)


def selection(name: str, logits_NK: Float[np.ndarray, "N 6"], texts: Sequence[examples.Example]) -> tuple[float, float]:
    """(the measure that decides, macro-F1), of the head's likeliest scores. See `tuning.SELECTIONS`."""
    scores_N = np.asarray([e.score for e in texts])
    given_N = logits_NK.argmax(1)
    second = metrics.macro_f1(scores_N, given_N)
    if name == "macro_f1":
        return second, second
    if name == "auroc_by_source":
        areas = [area["value"] for area in area_by_source(logits_NK, texts).values()]
        if not areas:
            raise ValueError(
                "selection by auroc_by_source: no source has held-out texts of scores below 3 and from 3 on"
            )
        return float(np.mean(areas)), second
    if name == "auroc_1":
        found = metrics.area(scores_N >= 1, calibration.level_logit(1, logits_NK))
    else:
        found = metrics.recall_at(int(name.removeprefix("recall_")), scores_N, given_N)
    if found is None:
        raise ValueError(f"selection by {name}: the held-out texts are all of one kind")
    return found.value, second


def area_by_source(
    logits_NK: Float[np.ndarray, "N 6"], texts: Sequence[examples.Example]
) -> dict[str, dict[str, float]]:
    """AUROC of a score of 3 or more inside each source that has texts on both sides of it."""
    scores_N, value_N = np.asarray([e.score for e in texts]), calibration.level_logit(3, logits_NK)
    sources_N = np.asarray([e.source for e in texts])
    found = {
        source: metrics.area(scores_N[sources_N == source] >= 3, value_N[sources_N == source])
        for source in dict.fromkeys(sources_N.tolist())
    }
    return {source: vars(area) for source, area in found.items() if area}


def by_text(
    logits_CL: Float[np.ndarray, "C L"], text_C: Int32[np.ndarray, " C"], texts: int
) -> Float[np.ndarray, "N L"]:
    """Each text's logits: the scores' of its worst chunk, and of each kind the largest."""
    kinds = [
        maximum_by_text(logits_CL[:, i], text_C, texts).astype(np.float32)
        for i in range(head.CLASSES, logits_CL.shape[1])
    ]
    worst_NK = worst_chunks(logits_CL[:, : head.CLASSES], text_C, texts)
    return np.concatenate([worst_NK, *(kind_N[:, None] for kind_N in kinds)], axis=1)


def worst_chunks(
    logits_CK: Float[np.ndarray, "C 6"], text_C: Int32[np.ndarray, " C"], texts: int
) -> Float[np.ndarray, "N 6"]:
    """Each text's logits: those of the chunk with the highest expected score."""
    order = np.lexsort((calibration.expected_score(logits_CK), text_C))
    last_N = np.searchsorted(text_C[order], np.arange(texts), side="right") - 1
    return logits_CK[order[last_N]]


def cross_entropy(logits_NK: Float[np.ndarray, "N 6"], scores_N: Int[np.ndarray, " N"]) -> float:
    """Mean over texts, natural logarithm."""
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted_NK).sum(1)) - shifted_NK[np.arange(len(scores_N)), scores_N]))


def measures(
    how: str,
    fitted: calibration.Calibration,
    logits_NL: Float[np.ndarray, "N L"],
    texts: Sequence[examples.Example],
    kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """What config.json says of the classifier's quality, `how` saying on which texts."""
    scores_N, logits_NK = np.asarray([e.score for e in texts]), logits_NL[:, : head.CLASSES]
    result: dict[str, Any] = {"on": how, **metrics.summary(scores_N, fitted.scores(logits_NK))}
    result["spearman"] = metrics.spearman(calibration.expected_score(logits_NK), scores_N.astype(np.float64))
    for level in metrics.LEVELS:
        probability_N = fitted.probability(level, logits_NK)
        area = metrics.area(scores_N >= level, calibration.level_logit(level, logits_NK))
        result[f"auroc_{level}"] = vars(area) if area else None
        result[f"calibration_error_{level}"] = metrics.expected_calibration_error(scores_N >= level, probability_N)
    result["auroc_3_by_source"] = area_by_source(logits_NK, texts)
    known_NK = Targets.of(texts, names=kinds).kinds_NK
    for i, kind in enumerate(kinds):
        known = ~np.isnan(known_NK[:, i])
        area = metrics.area(known_NK[known, i] >= 0.5, logits_NL[known, head.CLASSES + i]) if known.any() else None
        result[f"auroc_{kind}"] = vars(area) if area else None
    return result


def _first(x_CD: np.ndarray, text_C: np.ndarray, texts: int) -> np.ndarray:
    return x_CD[np.searchsorted(text_C, np.arange(texts))]


def _first_ids(backbone: Backbone, texts: Sequence[examples.Example]) -> list[np.ndarray]:
    return [next(backbone.tokenizer.chunks([e.text], backbone.max_tokens))[1] for e in texts]


def _parts(groups: Sequence[str], recipe: Recipe) -> Int[np.ndarray, " n"]:
    """Bits: 1 training, 2 choice of the epoch, 4 calibration; whole groups, half of `held_out` for each of 2 and 4.

    With the fixed split the same texts choose and calibrate.
    """
    if recipe.split == "fixed":
        return np.asarray([6 if examples.part_of(group) == "dev" else 1 for group in groups])
    fold_N = examples.folds_of(groups, max(3, round(2 / recipe.held_out)), recipe.seed)
    return np.where(fold_N == 0, 2, np.where(fold_N == 1, 4, 1))


def _described(sources: Sequence[str], texts: Sequence[examples.Example]) -> dict[str, Any]:
    """What was trained on: counts and a hash of the texts by source (what is installed differs from place to place)."""
    by_source = {}
    for source in sources:
        own = [e for e in texts if e.source == source]
        digest = hashlib.sha256("".join(sorted(examples.text_key(e.text) for e in own)).encode()).hexdigest()
        by_source[source] = {
            "texts": len(own),
            "groups": len({e.group for e in own}),
            "by_score": _counts(own),
            "sha256": digest,
        }
    return {"sources": list(sources), "texts": len(texts), "by_score": _counts(texts), "by_source": by_source}


def _counts(texts: Sequence[examples.Example]) -> dict[str, int]:
    return {str(score): count for score, count in sorted(collections.Counter(e.score for e in texts).items())}


def _check_scores(texts: Sequence[examples.Example]) -> None:
    counts = _counts(texts)
    if "0" not in counts or not set(counts) & {"3", "4", "5"}:
        raise ValueError(f"--data: texts by score are {counts}; needs some of score 0 and some of 3 or more")
    _logger.info("%d texts, by score %s", len(texts), counts)
