"""Labelled texts to a classifier in a folder (Maini et al. 2025, 3.1 and C.1): head first, then the backbone.

What calibration, thresholds and the recorded measures come from, the trained parameters have not seen:

- backbone frozen: grouped cross-validation. Each text's logits come from a head that was fitted without its group; the
  head that is kept is then fitted on all texts.
- backbone trained: a share of the groups is held out, one half of it to choose the epoch, the other to calibrate.

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

from safelm.safety.classifier import calibration, checkpoint, examples, head, metrics, training_state, tuning
from safelm.safety.classifier.embedding_cache import CachedEmbedder
from safelm.safety.classifier.head import HeadRecipe
from safelm.safety.classifier.tuning import TuningRecipe
from safelm.safety.embedding import Backbone, Embedder, load_backbone

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole training run.

    Attributes:
      backbone: the arguments of `load_backbone`.
      head, tuning: how each is trained; `tuning.last_n` 0 keeps the backbone as it is.
      l2: what to choose `head.l2` from, by cross-validated cross-entropy (frozen backbone, not "adam").
      target_recall: per level (1 and 3) the share of unsafe held-out texts that the threshold lets the classifier find.
      folds: of the cross-validation. held_out: the share of texts kept from training when the backbone is trained.
    """

    backbone: Mapping[str, Any]
    head: HeadRecipe = dataclasses.field(default_factory=HeadRecipe)
    tuning: TuningRecipe = dataclasses.field(default_factory=TuningRecipe)
    l2: tuple[float, ...] = ()
    target_recall: Mapping[int, float] = dataclasses.field(default_factory=lambda: dict.fromkeys((1, 3), 0.9))
    folds: int = 5
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
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
    texts = examples.read_all(sources)
    _check_scores(texts)
    backbone = backbone or load_backbone(**recipe.backbone)
    if recipe.tuning.last_n == 0:
        fitted = _frozen(backbone, texts, recipe, cache)
    else:
        fitted = _tuned(backbone, texts, recipe, training_state.Place(output, recipe, texts, backbone.fingerprint))
    record = {
        "data": _described(sources, texts),
        "recipe": dataclasses.asdict(recipe) | {"backbone": dict(backbone.spec)},
        **fitted.record,
    }
    checkpoint.save(output, backbone, fitted.head, fitted.calibration, record, fitted.params)
    training_state.remove(output)
    return record


@dataclasses.dataclass(frozen=True)
class _Fitted:
    head: head.HeadParams
    calibration: calibration.Calibration
    record: dict[str, Any]
    params: Any = None


def _frozen(backbone: Backbone, texts: Sequence[examples.Example], recipe: Recipe, cache: str | None) -> _Fitted:
    x_CD, text_C = CachedEmbedder(Embedder(backbone), cache).embed([e.text for e in texts])
    scores_N, groups = np.asarray([e.score for e in texts]), [e.group for e in texts]
    final, fitted, l2, logits_NK = fit_head(x_CD, text_C, scores_N, groups, recipe)
    how = f"{recipe.folds}-fold cross-validation, whole groups"
    return _Fitted(final, fitted, {"l2": l2, "measured": measures(how, fitted, logits_NK, scores_N)})


def fit_head(
    x_CD: Float[np.ndarray, "C D"],
    text_C: Int32[np.ndarray, " C"],
    scores_N: Int[np.ndarray, " N"],
    groups: Sequence[str],
    recipe: Recipe,
) -> tuple[head.HeadParams, calibration.Calibration, float, Float[np.ndarray, "N 6"]]:
    """A head on embeddings of all chunks, its calibration, the l2 chosen, and the logits that calibrated it.

    Those logits are each text's (worst chunk) from a head that was fitted without its group.
    """
    fold_N = examples.folds_of(groups, recipe.folds, recipe.seed)
    chosen, logits_NK = cross_fit(x_CD, text_C, scores_N, fold_N, recipe)
    fitted = calibration.fit(logits_NK, scores_N, recipe.target_recall)
    return head.fit(_first(x_CD, text_C, len(scores_N)), scores_N, chosen), fitted, chosen.l2, logits_NK


def cross_fit(
    x_CD: Float[np.ndarray, "C D"],
    text_C: Int32[np.ndarray, " C"],
    scores_N: Int[np.ndarray, " N"],
    fold_N: Int[np.ndarray, " N"],
    recipe: Recipe,
) -> tuple[HeadRecipe, Float[np.ndarray, "N 6"]]:
    """The head recipe with its l2 chosen, and each text's logits (worst chunk) from a head fitted without its fold."""
    first_ND = _first(x_CD, text_C, len(scores_N))
    tried = []
    for l2 in recipe.l2 or (recipe.head.l2,):
        candidate = dataclasses.replace(recipe.head, l2=l2)
        logits_NK = np.zeros((len(scores_N), head.CLASSES), np.float32)
        for fold in np.unique(fold_N):
            inside_C = fold_N[text_C] == fold
            params = head.fit(first_ND[fold_N != fold], scores_N[fold_N != fold], candidate)
            logits_CK = np.asarray(head.apply(params, x_CD[inside_C]))
            _, local_C = np.unique(text_C[inside_C], return_inverse=True)
            logits_NK[fold_N == fold] = worst_chunks(logits_CK, local_C.astype(np.int32), int((fold_N == fold).sum()))
        tried.append((cross_entropy(logits_NK, scores_N), candidate, logits_NK))
    _, chosen, logits_NK = min(tried, key=lambda entry: entry[0])
    return chosen, logits_NK


def _tuned(
    backbone: Backbone, texts: Sequence[examples.Example], recipe: Recipe, place: training_state.Place
) -> _Fitted:
    part_N = _parts([e.group for e in texts], recipe.held_out, recipe.seed)
    train_set, select_set, calibrate_set = ([e for e, p in zip(texts, part_N, strict=True) if p == i] for i in range(3))
    scores = np.asarray([e.score for e in train_set])
    chunks, select = (_first_ids(backbone, part) for part in (train_set, select_set))
    first = head.fit(CachedEmbedder(Embedder(backbone)).first_chunks([e.text for e in train_set]), scores, recipe.head)
    select_scores = np.asarray([e.score for e in select_set])
    params, final = tuning.tune(
        backbone,
        first,
        chunks,
        scores,
        recipe.tuning,
        recipe.head.harm_weight,
        lambda logits: selection(recipe.tuning.selection, logits(), select_scores),
        select,
        resume=place.read(backbone, recipe.tuning, first),
        on_epoch=place.write,
    )
    logits_CK, text_C = Embedder(backbone, params).map_chunks([e.text for e in calibrate_set], final, head.apply)
    held_scores = np.asarray([e.score for e in calibrate_set])
    held_NK = worst_chunks(logits_CK, text_C, len(calibrate_set))
    fitted = calibration.fit(held_NK, held_scores, recipe.target_recall)
    how = f"{len(calibrate_set)} texts of groups held out from training and from the choice of the epoch"
    return _Fitted(final, fitted, {"measured": measures(how, fitted, held_NK, held_scores)}, params)


def selection(name: str, logits_NK: Float[np.ndarray, "N 6"], scores_N: Int[np.ndarray, " N"]) -> tuple[float, float]:
    """(the measure that decides, macro-F1), of the head's likeliest scores. See `tuning.SELECTIONS`."""
    given_N = logits_NK.argmax(1)
    second = metrics.macro_f1(scores_N, given_N)
    if name == "macro_f1":
        return second, second
    if name == "auroc_1":
        found = metrics.area(scores_N >= 1, calibration.level_logit(1, logits_NK))
    else:
        found = metrics.recall_at(int(name.removeprefix("recall_")), scores_N, given_N)
    if found is None:
        raise ValueError(f"selection by {name}: the held-out texts are all of one kind")
    return found.value, second


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
    how: str, fitted: calibration.Calibration, logits_NK: Float[np.ndarray, "N 6"], scores_N: Int[np.ndarray, " N"]
) -> dict[str, Any]:
    """What config.json says of the classifier's quality, `how` saying on which texts."""
    result: dict[str, Any] = {"on": how, **metrics.summary(scores_N, fitted.scores(logits_NK))}
    result["spearman"] = metrics.spearman(calibration.expected_score(logits_NK), scores_N.astype(np.float64))
    for level in metrics.LEVELS:
        probability_N = fitted.probability(level, logits_NK)
        area = metrics.area(scores_N >= level, calibration.level_logit(level, logits_NK))
        result[f"auroc_{level}"] = vars(area) if area else None
        result[f"calibration_error_{level}"] = metrics.expected_calibration_error(scores_N >= level, probability_N)
    return result


def _first(x_CD: np.ndarray, text_C: np.ndarray, texts: int) -> np.ndarray:
    return x_CD[np.searchsorted(text_C, np.arange(texts))]


def _first_ids(backbone: Backbone, texts: Sequence[examples.Example]) -> list[np.ndarray]:
    return [next(backbone.tokenizer.chunks([e.text], backbone.max_tokens))[1] for e in texts]


def _parts(groups: Sequence[str], held_out: float, seed: int) -> Int[np.ndarray, " n"]:
    """0 training, 1 choice of the epoch, 2 calibration: whole groups, half of `held_out` for each of the last two."""
    fold_N = examples.folds_of(groups, max(3, round(2 / held_out)), seed)
    return np.where(fold_N == 0, 1, np.where(fold_N == 1, 2, 0))


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
