"""Optimizers by name, global-norm clipping, and the learning-rate schedules of SmolLM2 and its kin.

Weight decay applies to matrices and embeddings, not to scales and biases. Nanotron, which trained SmolLM2, decays every
parameter unless its config excludes some; at 0.01 times a learning rate below 3e-3 the difference is small, and scales
pulled towards 0 change the model without regularising it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Bool, Num, PyTree

from safelm.train.types import Gradients, OptState, Params, Scalar

LogicalAxes = PyTree[tuple]  # of every parameter the names of its axes (`decoder.logical_axes`)
Number = float | int
Schedule = Callable[[int | Num[np.ndarray, "..."]], np.ndarray]

SCHEDULES = ("wsd", "cosine", "linear")


def make_schedule(
    name: str, *, peak_lr: Number, min_lr: Number, warmup_steps: int, decay_steps: int, total_steps: int
) -> Schedule:
    """The learning rate as a function of the number of updates done so far (an int or an array of them), float64.

    Computed on the host and given to the compiled step as data, so that no schedule is part of the program. All rise
    linearly, step 0 at peak / warmup_steps and the peak at the last step of the warmup. Then `wsd`: constant, and
    linear to `min_lr` over the last `decay_steps`; `linear`, `cosine`: from the peak to `min_lr` over all remaining
    steps. Raises ValueError naming the field for a schedule that doesn't fit the run.
    """
    if name not in SCHEDULES:
        raise ValueError(f"optimizer.schedule is {name!r}: known are {', '.join(SCHEDULES)}")
    if warmup_steps > total_steps:
        raise ValueError(f"optimizer.warmup_steps is {warmup_steps}, more than the run's {total_steps} steps")
    if name == "wsd" and warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"optimizer.warmup_steps {warmup_steps} and a decay of {decay_steps} steps: the run has {total_steps}"
        )
    decay_steps = decay_steps if name == "wsd" else total_steps - warmup_steps
    decay_start = total_steps - decay_steps

    def schedule(count):
        count = np.asarray(count, np.float64)
        warmup = np.minimum(1.0, (count + 1) / max(warmup_steps, 1))
        gone = np.clip((count - decay_start) / max(decay_steps, 1), 0.0, 1.0)
        share = 0.5 * (1 + np.cos(np.pi * gone)) if name == "cosine" else 1 - gone
        return np.where(count < decay_start, peak_lr * warmup, min_lr + (peak_lr - min_lr) * share)

    return schedule


def make_optimizer(
    *,
    name: str = "adamw",
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    momentum: Number = 0.95,
    weight_decay: Number = 0.01,
    clip_norm: Number = 1.0,
    axes: LogicalAxes | None = None,
) -> optax.GradientTransformation:
    """The direction of an optimizer's step behind a clip by global norm: parameters -= rate * direction.

    The decay is decoupled and part of the direction, so the learning rate scales it too.

    Args:
      name: one of `OPTIMIZERS`.
      b1, b2, eps: of Adam.
      momentum: of Muon.
      clip_norm: of the whole gradient; 0: no clip.
      axes: every parameter's logical axes (`decoder.logical_axes`); None, for AdamW only, decays all parameters.

    Raises:
      ValueError: an optimizer that isn't known, or a negative `clip_norm`.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name is {name!r}: known are {', '.join(OPTIMIZERS)}")
    if clip_norm < 0:
        raise ValueError(f"optimizer.clip_norm is {clip_norm}: it must be positive, or 0 for no clipping")
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    direction = OPTIMIZERS[name](b1=b1, b2=b2, eps=eps, momentum=momentum, axes=axes)
    mask = None if axes is None else decayed(axes)
    return optax.chain(clip, direction, optax.add_decayed_weights(weight_decay, mask=mask))


@dataclasses.dataclass(frozen=True)
class PlainUpdate:
    """Updates by an optimizer of optax. Gradients are not yet divided by `divisor`, which XLA does once for both."""

    optimizer: optax.GradientTransformation

    def norm(self, gradients: Gradients, divisor: Scalar) -> Scalar:
        """The global norm of the mean gradient."""
        return optax.tree.norm(_mean(gradients, divisor))

    def update(
        self,
        params: Params,
        opt_state: OptState,
        gradients: Gradients,
        *,
        norm: Scalar,
        divisor: Scalar,
        learning_rate: Scalar,
        is_applied: Bool[Array, ""],
    ) -> tuple[Params, OptState]:
        """Parameters and the optimizer's state after an update, or as they were; the optimizer clips by itself."""
        del norm
        direction, moved_state = self.optimizer.update(_mean(gradients, divisor), opt_state, params)
        moved = jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), params, direction)
        return jax.tree.map(lambda n, o: jnp.where(is_applied, n, o), (moved, moved_state), (params, opt_state))


def _mean(gradients: Gradients, divisor: Scalar) -> Gradients:
    return jax.tree.map(lambda g: g / divisor, gradients)


def decayed(axes: LogicalAxes) -> PyTree[bool]:
    """Of every parameter whether weight decay applies to it."""
    return _map_axes(_is_matrix, axes)


def _adamw(*, b1: Number, b2: Number, eps: Number, **_: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def _muon(*, b1: Number, b2: Number, eps: Number, momentum: Number, axes: LogicalAxes) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the blocks' matrices, Adam for embeddings, norms and biases.

    Its steps have Adam's root mean square (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both.
    """
    matrices = _map_axes(lambda each: _matrix_axes(each) or optax.MaskedNode(), axes)
    muon = optax.contrib.scale_by_muon(beta=momentum, eps=eps, weight_dimension_numbers=matrices)
    rms = optax.stateless(lambda updates, _: jax.tree.map(_with_rms_of_adam, updates, matrices))
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    groups = _map_axes(lambda each: "adam" if _matrix_axes(each) is None else "muon", axes)
    return optax.partition({"muon": optax.chain(muon, rms), "adam": adam}, groups)


def _with_rms_of_adam(orthogonal: Array, axes: optax.contrib.MuonDimensionNumbers) -> Array:
    """An orthogonal matrix, or a stack of them, scaled to a root mean square of 0.2."""
    sides = [math.prod(orthogonal.shape[axis] for axis in side) for side in (axes.reduction_axis, axes.output_axis)]
    return orthogonal * (0.2 * math.sqrt(max(sides)))


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def _is_matrix(axes: tuple[str | None, ...]) -> bool:
    """Two axes or more, the stack of layers aside, and no bias of heads: what weight decay applies to."""
    return len([axis for axis in axes if axis != "layers"]) >= 2 and ("embed" in axes or "rank" in axes)


def _matrix_axes(axes: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a block's kernel are its inputs and outputs; None for embeddings and norms."""
    if axes[0] != "layers" or not _is_matrix(axes):
        return None
    kernel = range(1, len(axes))
    one = axes.index("rank" if "rank" in axes else "embed")  # the axis that is one of its two sides
    others = tuple(axis for axis in kernel if axis != one)
    reduction, output = ((one,), others) if one == 1 else (others, (one,))
    return optax.contrib.MuonDimensionNumbers(reduction_axis=reduction, output_axis=output)


def _map_axes(function: Callable[[tuple[str | None, ...]], Any], axes: LogicalAxes) -> PyTree:
    return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, tuple))
