"""The weights of an n-gram model: logistic regression with ordered levels, by L-BFGS on sparse rows.

One direction for all levels (the all-threshold loss of Rennie and Srebro 2005): the logit of "the score is t or more"
is x·w + b_t. So a text's value is one number, on which thresholds are set later.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float, Int8

from safelm.safety.ngrams import features

LEVELS = (1, 3, 4, 5)  # labelled sets hold no text of score 2
_MOST_WINDOWS = 16  # of a safe page
_BLOCK = 512  # texts
_INT8_MAX = 127


@dataclasses.dataclass(frozen=True)
class Rows:
    """Windows to train on, their features as a product: of windows by words, and of words by buckets.

    Attributes:
      words_RU: for each word in a window 1 over the square root of the window's number of features.
      features_UB: for each word how many of its features fall into each bucket.
      text_R: the text each window is of.
    """

    words_RU: scipy.sparse.csr_array
    features_UB: scipy.sparse.csr_array
    text_R: np.ndarray

    def of(self, is_chosen_N: np.ndarray) -> "Rows":
        """The windows of some of the texts, which keep their numbers."""
        chosen = np.flatnonzero(is_chosen_N[self.text_R])
        return dataclasses.replace(self, words_RU=self.words_RU[chosen], text_R=self.text_R[chosen])


def rows(texts: Sequence[str], is_safe_N: np.ndarray, bits: int) -> Rows:
    """The windows of safe texts, and the first window of those that may be harmful: the others may be safe."""
    hashes, buckets, counts, parts = [], [], [], []
    for start in range(0, len(texts), _BLOCK):
        found = features.words(texts[start : start + _BLOCK])
        own_U, first = np.unique(found.hash_M, return_index=True)
        bucket_F, count_U = features.word_features(found, first, bits)
        hashes.append(own_U)
        buckets.append(np.split(bucket_F, np.cumsum(count_U)[:-1]))
        counts.append(count_U)
        parts.append((found, start))
    all_U, first = np.unique(np.concatenate(hashes), return_index=True)
    bucket_lists = [bucket_F for block in buckets for bucket_F in block]
    count_U = np.concatenate(counts)[first]
    bucket_F = np.concatenate([bucket_lists[i] for i in first])
    features_UB = _counted(np.repeat(np.arange(len(all_U)), count_U), bucket_F, (len(all_U), 1 << bits))
    blocks, text_R = [], []
    for found, start in parts:
        word_M = np.searchsorted(all_U, found.hash_M)
        windows = len(found.text_W)
        count_W = np.maximum(np.bincount(found.window_M, count_U[word_M], windows), 1)
        words_WU = _counted(found.window_M, word_M, (windows, len(all_U)), 1 / np.sqrt(count_W)[found.window_M])
        place_W = np.arange(windows) - np.searchsorted(found.text_W, found.text_W)
        kept = np.flatnonzero(place_W < np.where(is_safe_N[found.text_W + start], _MOST_WINDOWS, 1))
        blocks.append(words_WU[kept])
        text_R.append(found.text_W[kept] + start)
    return Rows(scipy.sparse.vstack(blocks, format="csr"), features_UB, np.concatenate(text_R))


def _counted(row_F: np.ndarray, column_F: np.ndarray, shape: tuple[int, int], value_F: Any = None) -> Any:
    values = np.ones(len(row_F)) if value_F is None else value_F
    return scipy.sparse.coo_array((values, (row_F, column_F)), shape=shape).tocsr()


def fit(
    data: Rows,
    target_NL: Float[np.ndarray, "N L"],
    weight_N: Float[np.ndarray, " N"],
    l2: float,
    most_steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Float[np.ndarray, " B"], float]:
    """The weight of each bucket, and the bias of the lowest level.

    Args:
      target_NL: probability that each text's score is at least each of LEVELS.
      weight_N: of each text in the mean loss, shared out among its windows.
      l2: times half the squared norm of the weights is added to the mean loss.
    """
    windows_N = np.bincount(data.text_R, minlength=len(weight_N))
    weight_R = (weight_N / np.maximum(windows_N, 1))[data.text_R]
    weight_R1 = (weight_R / weight_R.sum())[:, None]
    target_RL, words_RU, features_UB = target_NL[data.text_R], data.words_RU, data.features_UB
    words_UR, features_BU = words_RU.T.tocsr(), features_UB.T.tocsr()
    size = features_UB.shape[1]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias_L = parameters[:size], parameters[size:]
        logit_RL = (words_RU @ (features_UB @ weights))[:, None] + bias_L
        error_RL = weight_R1 * (0.5 * (1 + np.tanh(logit_RL / 2)) - target_RL)
        value = (weight_R1 * (np.logaddexp(0, logit_RL) - target_RL * logit_RL)).sum() + l2 / 2 * weights @ weights
        return value, np.concatenate([features_BU @ (words_UR @ error_RL.sum(1)) + l2 * weights, error_RL.sum(0)])

    found = scipy.optimize.minimize(
        loss,
        np.zeros(size + target_NL.shape[1]),
        jac=True,
        method="L-BFGS-B",
        callback=lambda _: on_step(),
        options={"maxiter": most_steps, "ftol": 1e-7, "gtol": 1e-6},
    )
    return found.x[:size], float(found.x[size])


def quantised(weight_B: Float[np.ndarray, " B"], clipped: float = 1e-4) -> tuple[Int8[np.ndarray, " B"], float]:
    """The weights as 8-bit whole numbers and their unit; a share `clipped` of the non-zero ones is cut to the range."""
    size = np.abs(weight_B[weight_B != 0])
    scale = float(np.quantile(size, 1 - clipped)) / _INT8_MAX if len(size) else 1.0
    return np.clip(np.rint(weight_B / scale), -_INT8_MAX, _INT8_MAX).astype(np.int8), scale
