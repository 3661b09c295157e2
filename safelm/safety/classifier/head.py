"""The linear head on an embedding, its loss, and its training on embeddings that don't change.

Six classes, the scores; beside them, where training texts say so, a logistic unit for each kind of harm.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from safelm.safety.classifier import ridge
from safelm.safety.classifier.metrics import CLASSES
from safelm.safety.classifier.targets import Targets

ArrayLike = Array | np.ndarray
SOLVERS = ("adam", "exact", "ridge")
# kernel [D, 6], bias [6] and, where there are kinds, kinds_kernel [D, K] and kinds_bias [K]; float32
HeadParams = dict[str, Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class HeadRecipe:
    """How the head is trained while the backbone stands still.

    Attributes:
      solver: "adam" (the paper's: some epochs of mini-batches), "exact" (L-BFGS to the optimum of the whole set) or
        "ridge" (least squares of the score along one direction, see `ridge`).
      harm_weight: lambda, by which the loss of examples with a score above 0 is multiplied (Maini et al. 2025, C.1).
      l2: weight of half the squared norm of the kernel, beside a mean loss whose weights have mean 1 (not "adam").
      standardize: whether features get mean 0 and deviation 1 for training (folded into the kernel afterwards).
    """

    solver: str = "adam"
    harm_weight: float = 1.0
    epochs: int = 1
    learning_rate: float = 1e-3
    batch_size: int = 32
    l2: float = 0.0
    standardize: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"head.solver={self.solver!r}: one of {', '.join(SOLVERS)}")
        for name in ("harm_weight", "learning_rate", "batch_size", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


def init(dim: int, kinds: int = 0) -> HeadParams:
    """A head that gives every class the same probability, and each kind one half."""
    params = {"kernel": jnp.zeros((dim, CLASSES), jnp.float32), "bias": jnp.zeros(CLASSES, jnp.float32)}
    if kinds:
        params |= {"kinds_kernel": jnp.zeros((dim, kinds), jnp.float32), "kinds_bias": jnp.zeros(kinds, jnp.float32)}
    return params


def apply(params: Any, x_BD: Float[ArrayLike, "*B D"]) -> Float[ArrayLike, "*B 6"]:
    """Logits of the six scores."""
    return x_BD @ params["kernel"] + params["bias"]


def apply_all(params: Any, x_BD: Float[ArrayLike, "*B D"]) -> Float[ArrayLike, "*B L"]:
    """Logits of the six scores and, behind them, of the kinds."""
    logits_BC = apply(params, x_BD)
    if "kinds_kernel" not in params:
        return logits_BC
    return jnp.concatenate([logits_BC, x_BD @ params["kinds_kernel"] + params["kinds_bias"]], axis=-1)


def weights_of(scores_B: Int[ArrayLike, " B"], harm_weight: float | Array) -> Any:
    """Each example's weight in the loss: lambda where its score is above 0, else 1."""
    return jnp.where(scores_B > 0, harm_weight, 1.0)


def weighted_loss(
    logits_BC: Float[ArrayLike, "B 6"], scores_B: Int[ArrayLike, " B"], harm_weight: float | Array
) -> Float[Array, ""]:
    """Mean cross-entropy over the six classes, that of unsafe examples times lambda (Maini et al. 2025, C.1)."""
    return score_loss(logits_BC, jax.nn.one_hot(scores_B, CLASSES), weights_of(scores_B, harm_weight))


def score_loss(
    logits_BC: Float[ArrayLike, "B 6"], votes_BC: Float[ArrayLike, "B 6"], weights_B: Float[ArrayLike, " B"]
) -> Float[Array, ""]:
    """Mean cross-entropy with the raters' distribution, each text's times its weight."""
    return jnp.mean(optax.softmax_cross_entropy(logits_BC, votes_BC) * weights_B)


def kinds_loss(
    logits_BK: Float[ArrayLike, "B K"], kinds_BK: Float[ArrayLike, "B K"], weights_B: Float[ArrayLike, " B"]
) -> Float[Array, ""]:
    """Mean over texts of the logistic losses of the kinds that are known of each (not NaN), times its weight."""
    is_known_BK = ~jnp.isnan(kinds_BK)
    losses_BK = optax.sigmoid_binary_cross_entropy(logits_BK, jnp.where(is_known_BK, kinds_BK, 0.0))
    return jnp.mean(jnp.where(is_known_BK, losses_BK, 0.0).sum(axis=-1) * weights_B)


def joint_loss(params: Any, x_BD: Any, votes_BC: Any, kinds_BK: Any, weights_B: Any, score_weights_B: Any) -> Any:
    """The loss of scores, by `score_weights_B`, and of kinds, by `weights_B`, which lambda does not change."""
    logits_BL = apply_all(params, x_BD)
    loss = score_loss(logits_BL[:, :CLASSES], votes_BC, score_weights_B)
    return loss + kinds_loss(logits_BL[:, CLASSES:], kinds_BK, weights_B) if kinds_BK.shape[1] else loss


def fit(x_ND: Float[np.ndarray, "N D"], targets: Targets | Int[np.ndarray, " N"], recipe: HeadRecipe) -> HeadParams:
    """A head trained on embeddings towards targets or whole scores; the same arguments give the same head."""
    if not isinstance(targets, Targets):
        targets = Targets.of_scores(targets)
    mean_D, scale_D = np.zeros(x_ND.shape[1], np.float32), np.ones(x_ND.shape[1], np.float32)
    if recipe.standardize:
        mean_D, scale_D = x_ND.mean(0), x_ND.std(0)
        scale_D = np.where(scale_D > 1e-6 * max(float(scale_D.max()), 1e-12), scale_D, 1.0).astype(np.float32)
    standard_ND = jnp.asarray((x_ND - mean_D) / scale_D, jnp.float32)
    solve = {"adam": _adam, "exact": _exact, "ridge": _ridge}[recipe.solver]
    params = dict(jax.tree.map(np.asarray, solve(standard_ND, targets, recipe)))
    for kernel, bias in (("kernel", "bias"), ("kinds_kernel", "kinds_bias")):
        if kernel in params:
            unscaled = params[kernel] / scale_D[:, None]
            params |= {
                kernel: unscaled.astype(np.float32),
                bias: (params[bias] - mean_D @ unscaled).astype(np.float32),
            }
    return params


def batches(count: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One epoch's rows in a random order, in batches of one size: rows that are left over come in another epoch."""
    order = rng.permutation(count)
    batch_size = min(batch_size, count)
    return [order[start : start + batch_size] for start in range(0, count - batch_size + 1, batch_size)]


def arrays(targets: Targets, harm_weight: float) -> tuple[jax.Array, ...]:
    """Votes, kinds, weights and weights times lambda: the last arguments of `joint_loss`, float32."""
    score_weights_N = targets.weights_N * np.asarray(weights_of(targets.scores_N, harm_weight))
    parts = (targets.votes_NC, targets.kinds_NK, targets.weights_N, score_weights_N)
    return tuple(jnp.asarray(part, jnp.float32) for part in parts)


def _adam(x_ND: jax.Array, targets: Targets, recipe: HeadRecipe) -> HeadParams:
    optimizer = optax.adamw(recipe.learning_rate, weight_decay=0.0)
    labels = arrays(targets, recipe.harm_weight)

    @jax.jit
    def step(params: Any, state: Any, rows_B: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return joint_loss(params, x_ND[rows_B], *(part[rows_B] for part in labels))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = init(x_ND.shape[1], len(targets.names))
    state = optimizer.init(params)
    rng = np.random.default_rng(recipe.seed)
    for _ in range(recipe.epochs):
        for rows_B in batches(len(x_ND), recipe.batch_size, rng):
            params, state = step(params, state, rows_B)
    return params


def _exact(x_ND: jax.Array, targets: Targets, recipe: HeadRecipe) -> HeadParams:
    *labels, score_weights_N = arrays(targets, recipe.harm_weight)
    return _lbfgs(x_ND, (*labels, score_weights_N / score_weights_N.mean()), recipe.l2)


def _ridge(x_ND: jax.Array, targets: Targets, recipe: HeadRecipe) -> HeadParams:
    """The scores by least squares, the kinds as the exact solver fits them."""
    *labels, weights_N = arrays(targets, recipe.harm_weight)
    weights_N = np.asarray(weights_N, np.float64)
    kernel, bias = ridge.fit(np.asarray(x_ND), targets.scores_N, weights_N / weights_N.mean(), recipe.l2)
    beside = _lbfgs(x_ND, (*labels, jnp.ones(len(x_ND))), recipe.l2) if targets.names else {}
    return {**beside, "kernel": kernel, "bias": bias}


@functools.partial(jax.jit, static_argnames="max_steps")
def _lbfgs(x_ND: jax.Array, labels: Any, l2: Any, max_steps: int = 200) -> HeadParams:
    """The optimum of a convex function: weights of mean 1, half the kernels' squared norm times l2."""

    def loss(params: Any) -> jax.Array:
        squares = [jnp.sum(jnp.square(value)) for name, value in params.items() if name.endswith("kernel")]
        return joint_loss(params, x_ND, *labels) + 0.5 * l2 * sum(squares)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        params, state, _, count = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradient), count + 1

    def unfinished(carry: Any) -> Any:
        return (carry[3] < max_steps) & (carry[2] > 1e-4)

    params = init(x_ND.shape[1], labels[1].shape[1])
    params, *_ = jax.lax.while_loop(unfinished, step, (params, solver.init(params), jnp.inf, 0))
    return params
