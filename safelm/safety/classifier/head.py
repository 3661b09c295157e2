"""The linear 6-class head on an embedding, its loss, and its training on embeddings that don't change."""

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

ArrayLike = Array | np.ndarray
SOLVERS = ("adam", "exact", "ridge")
HeadParams = dict[str, Array | np.ndarray]  # kernel [D, 6], bias [6], float32


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


def init(dim: int) -> HeadParams:
    """A head that gives every class the same probability."""
    return {"kernel": jnp.zeros((dim, CLASSES), jnp.float32), "bias": jnp.zeros(CLASSES, jnp.float32)}


def apply(params: Any, x_BD: Float[ArrayLike, "B D"]) -> Float[ArrayLike, "B 6"]:
    """Logits of the six scores."""
    return x_BD @ params["kernel"] + params["bias"]


def weights_of(scores_B: Int[ArrayLike, " B"], harm_weight: float | Array) -> Any:
    """Each example's weight in the loss: lambda where its score is above 0, else 1."""
    return jnp.where(scores_B > 0, harm_weight, 1.0)


def weighted_loss(
    logits_BC: Float[ArrayLike, "B 6"], scores_B: Int[ArrayLike, " B"], harm_weight: float | Array
) -> Float[Array, ""]:
    """Mean cross-entropy over the six classes, that of unsafe examples times lambda (Maini et al. 2025, C.1)."""
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, scores_B)
    return jnp.mean(losses_B * weights_of(scores_B, harm_weight))


def fit(x_ND: Float[np.ndarray, "N D"], scores_N: Int[np.ndarray, " N"], recipe: HeadRecipe) -> HeadParams:
    """A head trained on embeddings; the same arguments give the same head."""
    mean_D, scale_D = np.zeros(x_ND.shape[1], np.float32), np.ones(x_ND.shape[1], np.float32)
    if recipe.standardize:
        mean_D, scale_D = x_ND.mean(0), x_ND.std(0)
        scale_D = np.where(scale_D > 1e-6 * max(float(scale_D.max()), 1e-12), scale_D, 1.0).astype(np.float32)
    standard_ND = jnp.asarray((x_ND - mean_D) / scale_D, jnp.float32)
    solve = {"adam": _adam, "exact": _exact, "ridge": _ridge}[recipe.solver]
    params = jax.tree.map(np.asarray, solve(standard_ND, jnp.asarray(scores_N), recipe))
    kernel = params["kernel"] / scale_D[:, None]
    return {"kernel": kernel.astype(np.float32), "bias": (params["bias"] - mean_D @ kernel).astype(np.float32)}


def batches(count: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One epoch's rows in a random order, in batches of one size: rows that are left over come in another epoch."""
    order = rng.permutation(count)
    batch_size = min(batch_size, count)
    return [order[start : start + batch_size] for start in range(0, count - batch_size + 1, batch_size)]


def _adam(x_ND: jax.Array, scores_N: jax.Array, recipe: HeadRecipe) -> HeadParams:
    optimizer = optax.adamw(recipe.learning_rate, weight_decay=0.0)

    @jax.jit
    def step(params: Any, state: Any, rows_B: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return weighted_loss(apply(params, x_ND[rows_B]), scores_N[rows_B], recipe.harm_weight)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = init(x_ND.shape[1])
    state = optimizer.init(params)
    rng = np.random.default_rng(recipe.seed)
    for _ in range(recipe.epochs):
        for rows_B in batches(len(x_ND), recipe.batch_size, rng):
            params, state = step(params, state, rows_B)
    return params


def _exact(x_ND: jax.Array, scores_N: jax.Array, recipe: HeadRecipe) -> HeadParams:
    weight = float(np.mean(weights_of(scores_N, recipe.harm_weight)))
    return _lbfgs(x_ND, scores_N, recipe.harm_weight, recipe.l2, weight)


def _ridge(x_ND: jax.Array, scores_N: jax.Array, recipe: HeadRecipe) -> HeadParams:
    weights_N = np.asarray(weights_of(scores_N, recipe.harm_weight), np.float64)
    kernel, bias = ridge.fit(np.asarray(x_ND), np.asarray(scores_N), weights_N / weights_N.mean(), recipe.l2)
    return {"kernel": kernel, "bias": bias}


@functools.partial(jax.jit, static_argnames="max_steps")
def _lbfgs(
    x_ND: jax.Array, scores_N: jax.Array, harm_weight: Any, l2: Any, mean_weight: Any, max_steps: int = 200
) -> HeadParams:
    """The optimum of a convex function: weights of mean 1, half the kernel's squared norm times l2."""

    def loss(params: Any) -> jax.Array:
        data = weighted_loss(apply(params, x_ND), scores_N, harm_weight) / mean_weight
        return data + 0.5 * l2 * jnp.sum(jnp.square(params["kernel"]))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        params, state, _, count = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradient), count + 1

    def unfinished(carry: Any) -> Any:
        return (carry[3] < max_steps) & (carry[2] > 1e-4)

    params = init(x_ND.shape[1])
    params, *_ = jax.lax.while_loop(unfinished, step, (params, solver.init(params), jnp.inf, 0))
    return params
