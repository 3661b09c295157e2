"""Fits linear heads on the stream, one a layer, and chooses the layer on development cases."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Float32, Int

from safelm.safety.classifier import head as classifier_head
from safelm.stats.bootstrap import grouped_interval
from safelm.stats.intervals import Estimate

L2 = 1e-3
MOST_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A head: kernel and bias of the softmax over scores, its layer, and every layer's AUROC on development tokens."""

    layer: int
    kernel_DC: Float32[np.ndarray, "D C"]
    bias_C: Float32[np.ndarray, " C"]
    development: Mapping[int, float]


def spread_layers(num_layers: int, most: int = MOST_LAYERS) -> tuple[int, ...]:
    """Up to `most` layers from 1 to the last, evenly spread."""
    return tuple(sorted({round(layer) for layer in np.linspace(1, num_layers, min(most, num_layers))}))


def choose_layer(
    train_LND: Float32[np.ndarray, "L N D"],
    scores_N: Int[np.ndarray, " N"],
    development_LMD: Float32[np.ndarray, "L M D"],
    is_harmful_M: Bool[np.ndarray, " M"],
    layers: Sequence[int],
    *,
    min_score: int,
    l2: float = L2,
) -> Fitted:
    """A head for each layer, trained to the optimum, and that whose level tells development tokens apart best.

    Args:
      scores_N: harm scores of the training tokens, 0 to 5.
      is_harmful_M: of the development tokens.
      l2: weight of half the kernel's squared norm, on standardised features.

    Raises ValueError where either set lacks harmful or safe tokens.
    """
    for name, harmful in (("training", scores_N >= min_score), ("development", is_harmful_M)):
        if harmful.all() or not harmful.any():
            raise ValueError(
                f"{name} tokens: {int(harmful.sum())} of {len(harmful)} have a harm score of {min_score} or more: "
                "want both kinds"
            )
    recipe = classifier_head.HeadRecipe(solver="exact", l2=l2, standardize=True)
    fitted, found = {}, {}
    for place, layer in enumerate(layers):
        params = classifier_head.fit(train_LND[place], scores_N, recipe)
        fitted[layer] = (np.asarray(params["kernel"], np.float32), np.asarray(params["bias"], np.float32))
        found[layer] = area(level_of(development_LMD[place], *fitted[layer], min_score), is_harmful_M)
    best = max(layers, key=lambda layer: (found[layer], -layer))
    return Fitted(best, *fitted[best], development=found)


def level_of(
    x_ND: Float[np.ndarray, "N D"], kernel_DC: Float[np.ndarray, "D C"], bias_C: Float[np.ndarray, " C"], min_score: int
) -> Float[np.ndarray, " N"]:
    """P(harm score >= min_score) at each token."""
    return probabilities(x_ND, kernel_DC, bias_C)[:, min_score:].sum(1)


def probabilities(
    x_ND: Float[np.ndarray, "N D"], kernel_DC: Float[np.ndarray, "D C"], bias_C: Float[np.ndarray, " C"]
) -> Float[np.ndarray, "N C"]:
    """The probability of every score at each token."""
    logits_NC = x_ND.astype(np.float64) @ kernel_DC + bias_C
    shares_NC = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
    return shares_NC / shares_NC.sum(1, keepdims=True)


def area(level_N: Float[np.ndarray, " N"], is_harmful_N: Bool[np.ndarray, " N"]) -> float:
    """AUROC, ties counting half; NaN without both kinds. By ranks, for many tokens."""
    positives = int(is_harmful_N.sum())
    if not 0 < positives < len(is_harmful_N):
        return float("nan")
    ranks_N = scipy.stats.rankdata(level_N)
    above = ranks_N[is_harmful_N].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(ranks_N) - positives)))


def clustered_area(
    level_N: Float[np.ndarray, " N"], is_harmful_N: Bool[np.ndarray, " N"], groups_N: np.ndarray, draws: int = 500
) -> Estimate:
    """AUROC over tokens with a 95% interval over resampled groups (documents, categories)."""
    found = area(level_N, is_harmful_N)
    low, high = grouped_interval(area, level_N, is_harmful_N, groups=groups_N, draws=draws)
    return Estimate(found, min(found, low), max(found, high), len(level_N))


def best_threshold(level_N: Float[np.ndarray, " N"], is_harmful_N: Bool[np.ndarray, " N"]) -> float:
    """The level from which on calling a token harmful has the best F1."""
    order_N = np.argsort(-level_N, kind="stable")
    hits_N = np.cumsum(is_harmful_N[order_N])
    called_N = np.arange(1, len(order_N) + 1)
    is_last_N = np.append(np.diff(level_N[order_N]) != 0, True)  # of equal levels all are called or none
    f1_N = np.where(is_last_N, 2 * hits_N / (called_N + is_harmful_N.sum()), -1)
    return float(level_N[order_N][int(f1_N.argmax())])
