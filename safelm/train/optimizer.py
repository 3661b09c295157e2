"""AdamW with global-norm clipping and the learning-rate schedules of SmolLM2 and its kin.

Weight decay applies to matrices and embeddings, not to the norms' scales. Nanotron, which trained SmolLM2, decays every
parameter unless its config excludes some; at 0.01 times a learning rate below 3e-3 the difference is small, and scales
pulled towards 0 change the model without regularising it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

PyTree = Any
Number = float | int
Schedule = Callable[[Any], np.ndarray]

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
    weight_decay: Number = 0.01,
    clip_norm: Number = 1.0,
    decayed: PyTree | None = None,
) -> optax.GradientTransformation:
    """The direction of AdamW's step behind a clip to `clip_norm` (0: no clip): parameters -= rate * direction.

    The decay is decoupled and part of the direction, so the learning rate scales it too. `decayed` is a tree of bools
    like the parameters (see `decayed_params`); None decays all.
    """
    if name != "adamw":
        raise ValueError(f"optimizer.name is {name!r}: known is adamw")
    if clip_norm < 0:
        raise ValueError(f"optimizer.clip_norm is {clip_norm}: it must be positive, or 0 for no clipping")
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.chain(clip, adam, optax.add_decayed_weights(weight_decay, mask=decayed))


def decayed_params(logical_axes: PyTree) -> PyTree:
    """True for each parameter that weight decay applies to: those with two axes or more, the stack of layers aside."""

    def is_matrix(axes: tuple[str | None, ...]) -> bool:
        return len([axis for axis in axes if axis != "layers"]) >= 2

    return jax.tree.map(is_matrix, logical_axes, is_leaf=lambda node: isinstance(node, tuple))
