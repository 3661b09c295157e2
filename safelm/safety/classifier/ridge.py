"""A six-class head from ridge regression of the score: fewer effective parameters than a softmax, for little data.

The scores that occur are numbered 0, 1, .. in order, and one direction of the embedding is fitted to these numbers by
weighted least squares with l2. What it gives, value v, becomes a logit a * number(c) * v + bias(c) for each score c,
with a > 0 and the biases fitted by maximum likelihood to leave-one-out values. That is linear in the embedding, so a
head as any other; its expected score rises with v.
"""

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
from jaxtyping import Float, Int

from safelm.safety.classifier.metrics import CLASSES

_LEAST_SLOPE, _LARGEST_SLOPE = 1e-3, 1e3
_PRIOR = 1e-3  # keeps slope and biases finite where the scores separate


def fit(
    x_ND: Float[np.ndarray, "N D"], scores_N: Int[np.ndarray, " N"], weights_N: Float[np.ndarray, " N"], l2: float
) -> tuple[Float[np.ndarray, "D 6"], Float[np.ndarray, " 6"]]:
    """(kernel, bias) of the head.

    Args:
      weights_N: of each example in the loss; their mean must be 1.
      l2: weight of half the squared norm of the direction, beside half the mean weighted squared error; above 0.
    """
    if not l2 > 0:
        raise ValueError(f"head.l2={l2}: the ridge solver needs one above 0")
    number_C = np.interp(np.arange(CLASSES), np.unique(scores_N), np.arange(len(np.unique(scores_N))))
    direction_D, offset, left_out_N = _least_squares(
        np.asarray(x_ND, np.float64), number_C[scores_N], np.asarray(weights_N, np.float64), l2 * len(x_ND)
    )
    slope, bias_C = _classes(left_out_N, scores_N, weights_N, number_C)
    return direction_D[:, None] * slope * number_C, bias_C + slope * number_C * offset


def _least_squares(
    x_ND: np.ndarray, target_N: np.ndarray, weights_N: np.ndarray, penalty: float
) -> tuple[np.ndarray, float, np.ndarray]:
    """(direction, offset, each example's value from a fit without it), by the smaller of the two normal equations."""
    root_N = np.sqrt(weights_N)
    mean_D, mean = np.average(x_ND, axis=0, weights=weights_N), np.average(target_N, weights=weights_N)
    centred_ND, rest_N = (x_ND - mean_D) * root_N[:, None], (target_N - mean) * root_N
    if x_ND.shape[0] <= x_ND.shape[1]:
        gram_NN = centred_ND @ centred_ND.T
        factor = scipy.linalg.cho_factor(gram_NN + penalty * np.eye(len(gram_NN)))
        direction_D = centred_ND.T @ scipy.linalg.cho_solve(factor, rest_N)
        leverage_N = 1 - penalty * np.diagonal(scipy.linalg.cho_solve(factor, np.eye(len(gram_NN))))
    else:
        factor = scipy.linalg.cho_factor(centred_ND.T @ centred_ND + penalty * np.eye(x_ND.shape[1]))
        solved_DN = scipy.linalg.cho_solve(factor, centred_ND.T)
        direction_D, leverage_N = solved_DN @ rest_N, np.einsum("nd,dn->n", centred_ND, solved_DN)
    leverage_N = np.clip(leverage_N + weights_N / weights_N.sum(), 0, 1 - 1e-6)
    value_N = (x_ND - mean_D) @ direction_D + mean
    left_out_N = target_N - (target_N - value_N) / (1 - leverage_N)
    return direction_D, float(mean - mean_D @ direction_D), left_out_N


def _classes(
    value_N: np.ndarray, scores_N: np.ndarray, weights_N: np.ndarray, number_C: np.ndarray
) -> tuple[float, np.ndarray]:
    """Slope and biases that give the scores their greatest likelihood from the values alone."""
    is_score_NC = np.eye(CLASSES)[scores_N]
    weight_N1 = (weights_N / weights_N.sum())[:, None]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, bias_C = parameters[0], parameters[1:]
        log_NC = scipy.special.log_softmax(slope * value_N[:, None] * number_C + bias_C, axis=1)
        wrong_NC = (np.exp(log_NC) - is_score_NC) * weight_N1
        gradient = np.concatenate([[(wrong_NC * number_C * value_N[:, None]).sum()], wrong_NC.sum(0)])
        fitting = -(log_NC * is_score_NC * weight_N1).sum()
        return fitting + 0.5 * _PRIOR * (parameters**2).sum(), gradient + _PRIOR * parameters

    limits = [(_LEAST_SLOPE, _LARGEST_SLOPE), *[(None, None)] * CLASSES]
    found = scipy.optimize.minimize(loss, [1.0, *[0.0] * CLASSES], jac=True, method="L-BFGS-B", bounds=limits).x
    return float(found[0]), found[1:]
